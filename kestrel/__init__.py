"""Kestrel: LoRA fine-tuning of causal language models on persona dialogue, with proofs."""

__version__ = "0.1.0"
