"""The card's example makes the tokens of training, as chat messages where the template does so by itself."""

from __future__ import annotations

import re

import pytest
from make_templates import LIKE
from make_tokenizers import byte_level

from kestrel.config.settings import Quantization
from kestrel.prompt.prompt import Prompt
from kestrel.publishing.usage import EXAMPLE, example_prompt, render


@pytest.mark.parametrize("model", LIKE)
def test_the_program_makes_the_prompt_of_training(model: str) -> None:
    tokenizer, template = byte_level(), LIKE[model]
    tokenizer.add_tokens(
        [token for token in template.specials if token not in tokenizer.get_vocab()], special_tokens=True
    )
    tokenizer.add_special_tokens({"bos_token": "<bos>"})
    prompt = Prompt(tokenizer, "chat", 10**5, template.source)
    example = example_prompt(prompt)
    values = {
        "repo_id": "a/b",
        "base": "c/d",
        "quantization": Quantization(bits=16),
        "is_falcon": False,
        "commit": None,
    }
    program = render("usage.py", example=example, **values)
    making = re.search(r"^(messages|# Each).*?(?=^answer)", program, re.DOTALL | re.MULTILINE)
    assert making is not None
    variables = {"tokenizer": tokenizer}
    exec(making[0], variables)  # noqa: S102
    assert variables["ids"] == prompt.open_context(EXAMPLE)
    # Today's date, a thought of its own, or a blank before a reply.
    assert bool(example.messages) == (
        model not in ("Llama 3", "SmolLM 3", "Qwen 3 without a switch", "DeepSeek distill", "a plain transcript")
    )
    assert example.switches == ({"enable_thinking": False} if model == "Qwen 3" else {})
