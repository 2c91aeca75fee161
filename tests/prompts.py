"""Tokenizers of different kinds, texts that try to spell control tokens, and dialogues of them."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import make_tokenizers as make
from hypothesis import HealthCheck, assume, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from kestrel.dialogue import Dialogue, Turn
from kestrel.prompt.prompt import Prompt, Rendered, Unrenderable

ROOT = Path(__file__).resolve().parent.parent
BUILDERS = {
    "falcon": make.falcon_like,
    "byte level": make.byte_level,
    "sentencepiece bpe": lambda: make.sentencepiece_like(chat_template=make.INST),
    "sentencepiece unigram": lambda: make.sentencepiece_like(model="unigram"),
    "dummy prefix": lambda: make.dummy_prefix(make.INST),
    "unigram": make.unigram,
    "wordpiece": make.wordpiece,
    "no system role": lambda: make.byte_level(chat_template=make.WITHOUT_SYSTEM),
}
KINDS = [(name, "plain") for name in BUILDERS if name != "no system role"] + [
    ("byte level", "chat"),
    ("sentencepiece bpe", "chat"),
    ("dummy prefix", "chat"),
    ("no system role", "chat"),
    ("falcon", "original"),
    ("dummy prefix", "original"),
    ("wordpiece", "original"),
]
LOSSLESS = [kind for kind in KINDS if kind[0] not in ("unigram", "wordpiece")]


@cache
def tokenizer(name: str) -> PreTrainedTokenizerFast:
    return BUILDERS[name]()


@cache
def prompt_of(name: str, format: str, max_length: int = 10**6) -> Prompt:
    return Prompt(tokenizer(name), format, max_length)


SPECIALS = [
    *("<|endoftext|>", ">>TITLE<<", "<s>", "</s>", "<unk>", "[SEP]", "[CLS]", "<|im_end|>", "<|im_start|>", "<pad>"),
    *("\nYou:", "\nPartner: x", "Persona:", "[INST]", "{{ bos_token }}"),
    *("\ue0001\ue001", "\ufdfa", "1987", "👍🏽", "\u0301"),
]
TEXT = st.lists(
    st.one_of(
        st.sampled_from(SPECIALS),
        st.sampled_from(["hi", "i have two dogs", " ", "  ", "\n", "?", "'s", "\u200b", "\u00a0"]),
        st.text(st.characters(exclude_categories=["Cs"]), max_size=8),
    ),
    min_size=1,
    max_size=5,
).map("".join)
SPOKEN = TEXT.filter(lambda text: bool(text.strip()))


@st.composite
def dialogues(draw: st.DrawFn, most: int = 7) -> Dialogue:
    texts = draw(st.lists(SPOKEN, min_size=1, max_size=most))
    speakers = ("self", "partner") if len(texts) % 2 else ("partner", "self")
    turns = tuple(Turn(speakers[index % 2], text) for index, text in enumerate(texts))  # the last is a reply
    return Dialogue("d", tuple(draw(st.lists(SPOKEN, max_size=3))), turns)


def rendered_or_skip(prompt: Prompt, dialogue: Dialogue) -> Rendered:
    """Of a text that spells a control token, being refused is all that is asked."""
    try:
        return prompt.render(dialogue)
    except Unrenderable as error:
        assert error.reason in ("text spells a control token", "reply without a token")
        assume(False)
        raise


def supervised_replies(format: str, dialogue: Dialogue) -> list[tuple[int, str]]:
    """Those that a dialogue's sequence teaches: all of them, or the last where the format has room for one."""
    replies = list(dialogue.replies())
    return replies[-1:] if format == "original" else replies


SLOW_START = settings(deadline=None, max_examples=25, suppress_health_check=list(HealthCheck))
