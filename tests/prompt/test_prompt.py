"""Properties of rendering that hold for every format and for tokenizers of different kinds."""

from __future__ import annotations

import time
from dataclasses import replace

import make_tokenizers as make
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from prompts import (
    BUILDERS,
    KINDS,
    LOSSLESS,
    SLOW_START,
    SPOKEN,
    dialogues,
    prompt_of,
    rendered_or_skip,
    supervised_replies,
    tokenizer,
)

from kestrel.dialogue import Dialogue, Turn
from kestrel.prompt.prompt import IGNORED, Prompt, Unrenderable


@pytest.mark.parametrize("kind", KINDS, ids=" ".join)
@SLOW_START
@given(dialogue=dialogues())
def test_context_is_prefix_and_replies_are_supervised(kind: tuple[str, str], dialogue: Dialogue) -> None:
    prompt = prompt_of(*kind)
    rendered = rendered_or_skip(prompt, dialogue)
    replies = supervised_replies(kind[1], dialogue)
    assert rendered.first_turn == 0 and len(rendered.reply_spans) == len(replies)
    labels = [IGNORED] * len(rendered.input_ids)
    for (turn, text), (start, end) in zip(replies, rendered.reply_spans, strict=True):
        assert prompt.context(dialogue, turn) == rendered.input_ids[:start]
        before = replace(dialogue, turns=dialogue.turns[:turn])
        assert prompt.open_context(before) == rendered.input_ids[:start]
        assert prompt.reply_ids(text) == rendered.input_ids[start:end]
        assert rendered.input_ids[end - 1] == prompt.end_id
        labels[start:end] = rendered.input_ids[start:end]
    assert rendered.labels == labels
    assert len(rendered.input_ids) == rendered.reply_spans[-1][1], "nothing follows the last reply"


@pytest.mark.parametrize("kind", KINDS, ids=" ".join)
@SLOW_START
@given(dialogue=dialogues())
def test_no_text_spells_a_control_token(kind: tuple[str, str], dialogue: Dialogue) -> None:
    prompt = prompt_of(*kind)
    rendered = rendered_or_skip(prompt, dialogue)
    controls = set(prompt.tokenizer.all_special_ids) - {prompt.tokenizer.unk_token_id}
    harmless = replace(
        dialogue,
        persona=tuple("a" for _ in dialogue.persona),
        turns=tuple(Turn(turn.speaker, "a") for turn in dialogue.turns),
    )

    def count(ids: list[int]) -> int:
        return sum(index in controls for index in ids)

    assert count(rendered.input_ids) == count(prompt.render(harmless).input_ids)
    assert rendered.input_ids.count(prompt.end_id) >= len(rendered.reply_spans)


@pytest.mark.parametrize("kind", LOSSLESS, ids=" ".join)
@SLOW_START
@given(text=SPOKEN)
def test_decoding_gives_the_reply_back(kind: tuple[str, str], text: str) -> None:
    prompt = prompt_of(*kind)
    assume("\u2581" not in text)  # SentencePiece's own sign for a blank
    try:
        ids = prompt.reply_ids(text)
    except Unrenderable:
        assume(False)
    wanted = " ".join(text.split()) if kind[1] != "chat" else text.strip()
    assert prompt.reply_text(ids) == wanted


@pytest.mark.parametrize("name", [name for name in BUILDERS if name != "no system role"])
def test_special_strings_are_split_or_refused(name: str) -> None:
    """The tokenizer's own special tokens, in a reply, in the partner's turn and in the persona."""
    prompt = prompt_of(name, "plain")
    for token in prompt.tokenizer.all_special_tokens:
        said = f"what is {token} ?"
        for dialogue in (
            Dialogue("d", ("i am a",), (Turn("partner", "hi"), Turn("self", said))),
            Dialogue("d", ("i am a",), (Turn("partner", said), Turn("self", "hi"))),
            Dialogue("d", (said,), (Turn("partner", "hi"), Turn("self", "hi"))),
        ):
            try:
                rendered = prompt.render(dialogue)
            except Unrenderable as error:
                assert error.reason == "text spells a control token"
                assert repr(token)[1:-1] in str(error) and "dialogue d" in str(error)
            else:
                controls = set(prompt.tokenizer.all_special_ids) - {prompt.tokenizer.unk_token_id}
                rest = [index for index in rendered.input_ids if index != prompt.tokenizer.bos_token_id]
                assert [index for index in rest if index in controls] == [prompt.end_id]


def test_end_is_supervised_where_pad_is_eos() -> None:
    prompt = prompt_of("byte level", "chat")
    assert prompt.tokenizer.pad_token_id == prompt.tokenizer.eos_token_id == prompt.end_id
    rendered = prompt.render(Dialogue("d", ("a",), (Turn("partner", "hi"), Turn("self", "ho"))))
    supervised = [label for label in rendered.labels if label != IGNORED]
    assert supervised == [*prompt.tokenizer("ho")["input_ids"], prompt.end_id]
    assert rendered.input_ids.count(prompt.end_id) == 3  # system and user end with it too, and are not supervised


def test_unknown_characters_are_no_end() -> None:
    """GPT-2's own convention: one token is unknown, beginning and end at once."""
    made = make.byte_level(chat_template=None)
    made.unk_token = made.bos_token = made.eos_token
    prompt = Prompt(made, "plain", 100)
    assert prompt.end_id in prompt.control_ids
    assert prompt_of("wordpiece", "plain").tokenizer.unk_token_id not in prompt_of("wordpiece", "plain").control_ids


def test_added_words_are_text_and_added_markup_is_not() -> None:
    made = make.byte_level()
    words = ["ü", "kestrel", "🙂", "c++", "<3"]
    made.add_tokens([*words, "   ", "<think>"])
    prompt = Prompt(made, "plain", 100)
    for word in words:
        assert made.convert_tokens_to_ids(word) in prompt.reply_ids(f"a {word} b")
    with pytest.raises(Unrenderable, match="control token"):
        prompt.reply_ids("i <think> so")


def test_a_reply_of_which_nothing_is_left_is_refused() -> None:
    prompt = prompt_of("wordpiece", "plain")
    (result,) = prompt.render_all([Dialogue("d7", ("a",), (Turn("partner", "hi"), Turn("self", "\u0301")))])
    assert isinstance(result, Unrenderable) and result.reason == "reply without a token" and "d7" in str(result)


# -- truncation ------------------------------------------------------------------------------------------------------


def brute_force(prompt: Prompt, dialogue: Dialogue, max_length: int) -> tuple[int, list[int]] | None:
    """The longest suffix of turns that starts at the beginning or at a partner's turn and fits."""
    last = max(index for index, _ in dialogue.replies())
    for start in range(last):
        if start and dialogue.turns[start].speaker != "partner":
            continue
        ids = prompt.render(replace(dialogue, turns=dialogue.turns[start:])).input_ids
        if len(ids) <= max_length:
            return start, ids
    return None


@pytest.mark.parametrize("kind", KINDS, ids=" ".join)
@SLOW_START
@given(dialogue=dialogues(most=9), max_length=st.integers(16, 200))
def test_truncation_keeps_as_many_turns_as_fit(kind: tuple[str, str], dialogue: Dialogue, max_length: int) -> None:
    whole = rendered_or_skip(prompt_of(*kind), dialogue)
    assume(len(dialogue.turns) > 1)
    expected = brute_force(prompt_of(*kind), dialogue, max_length)
    prompt = Prompt(tokenizer(kind[0]), kind[1], max_length)
    if expected is None:
        with pytest.raises(Unrenderable, match="prompt.max_length") as caught:
            prompt.render(dialogue)
        assert caught.value.reason == "longer than prompt.max_length"
        return
    rendered = prompt.render(dialogue)
    assert (rendered.first_turn, rendered.input_ids) == expected
    assert (rendered.first_turn == 0) == (len(whole.input_ids) <= max_length)
    left = [text for index, text in supervised_replies(kind[1], dialogue) if index >= rendered.first_turn]
    assert [rendered.input_ids[start:end] for start, end in rendered.reply_spans] == list(map(prompt.reply_ids, left))


@pytest.mark.parametrize("kind", KINDS, ids=" ".join)
@SLOW_START
@given(batch=st.lists(dialogues(), max_size=4), max_length=st.sampled_from([30, 60, 10**6]))
def test_render_all_is_render(kind: tuple[str, str], batch: list[Dialogue], max_length: int) -> None:
    prompt = Prompt(tokenizer(kind[0]), kind[1], max_length)
    for dialogue, result in zip(batch, prompt.render_all(batch), strict=True):
        if isinstance(result, Unrenderable):
            with pytest.raises(Unrenderable) as caught:
                prompt.render(dialogue)
            assert (caught.value.reason, str(caught.value)) == (result.reason, str(result))
        else:
            assert result == prompt.render(dialogue)
    assert not prompt._text_ids, "nothing of a batch stays in memory"


@pytest.mark.parametrize("kind", [("falcon", "plain"), ("byte level", "chat")], ids=" ".join)
def test_long_turns_and_long_dialogues_take_no_time(kind: tuple[str, str]) -> None:
    began = time.monotonic()
    novel = "i like long walks and 1234 books . " * 3000
    assert len(novel) > 100_000
    prompt = Prompt(tokenizer(kind[0]), kind[1], 300)
    ending = (Turn("partner", "hi"), Turn("self", "ho"))
    rendered = prompt.render(Dialogue("d", ("a",), (Turn("partner", novel), Turn("self", "oh"), *ending)))
    assert rendered.first_turn == 2
    with pytest.raises(Unrenderable, match="last exchange"):
        prompt.render(Dialogue("d", ("a",), (Turn("partner", "hi"), Turn("self", novel))))
    many = prompt.render(Dialogue("d", ("a",), ending * 1500))
    assert 250 < len(many.input_ids) <= 300
    whole = prompt_of(*kind).render(Dialogue("d", ("a",), (Turn("partner", "hi"), Turn("self", novel))))
    assert sum(label != IGNORED for label in whole.labels) > 10_000
    assert time.monotonic() - began < 10


# -- the original format -----------------------------------------------------------------------------------------------
