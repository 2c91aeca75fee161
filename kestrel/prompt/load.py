"""The prompt that the settings ask for, with the base's tokenizer."""

from __future__ import annotations

from pathlib import Path

from kestrel.config.settings import Settings
from kestrel.errors import KestrelError
from kestrel.prompt.prompt import Prompt
from kestrel.prompt.tokenizer import load_tokenizer


def load_prompt(settings: Settings, max_length: int | None = None) -> Prompt:
    """The prompt of the settings, with the base's tokenizer.

    Args:
        max_length: in tokens, instead of prompt.max_length.

    Raises:
        KestrelError: the tokenizer cannot be loaded, or the chat template cannot be read or used.
    """
    tokenizer, chosen, template = load_tokenizer(settings.model), settings.prompt, None
    if chosen.chat_template is not None:
        try:
            template = Path(chosen.chat_template).read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise KestrelError(f"prompt.chat_template {chosen.chat_template} cannot be read: {reason}") from None
    longest = max_length or chosen.max_length
    return Prompt(tokenizer, chosen.format, longest, template, chosen.system, chosen.labels)
