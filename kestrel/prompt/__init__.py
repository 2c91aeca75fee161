"""How a dialogue becomes tokens: the prompt formats, which tokens are supervised, and the tokenizer."""
