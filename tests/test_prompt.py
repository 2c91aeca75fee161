"""Properties of rendering that hold for every format and for tokenizers of different kinds."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import replace
from functools import cache
from pathlib import Path

import make_tokenizers as make
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from kestrel.chat_template import ChatTemplate
from kestrel.dialogue import Dialogue, Turn
from kestrel.errors import KestrelError
from kestrel.prompt import IGNORED, Prompt, Rendered, Unrenderable, tokenizer_fingerprint

ROOT = Path(__file__).resolve().parent.parent
BUILDERS = {
    "falcon": make.falcon_like,
    "byte level": make.byte_level,
    "sentencepiece bpe": lambda: make.sentencepiece_like(chat_template=make.INST),
    "sentencepiece unigram": lambda: make.sentencepiece_like(model="unigram"),
    "unigram": make.unigram,
    "wordpiece": make.wordpiece,
    "no system role": lambda: make.byte_level(chat_template=make.WITHOUT_SYSTEM),
}
KINDS = [(name, "plain") for name in BUILDERS if name != "no system role"] + [
    ("byte level", "chat"),
    ("sentencepiece bpe", "chat"),
    ("no system role", "chat"),
    ("falcon", "original"),
    ("sentencepiece bpe", "original"),
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
    *(
        "\nYou:",
        "\nPartner: x",
        "Persona:",
        "[INST]",
        "{{ bos_token }}",
        "\ue0001\ue001",
        "\ufdfa",
        "1987",
        "👍🏽",
        "\u0301",
    ),
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
    assert prompt.end_id in prompt._control_ids
    assert prompt_of("wordpiece", "plain").tokenizer.unk_token_id not in prompt_of("wordpiece", "plain")._control_ids


def test_added_words_are_text_and_added_markup_is_not() -> None:
    made = make.byte_level()
    made.add_tokens(["ü", "   ", "kestrel", "<think>"])
    prompt = Prompt(made, "plain", 100)
    assert made.convert_tokens_to_ids("ü") in prompt.reply_ids("a kestrel ü")
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
    assert not prompt._texts, "nothing of a batch stays in memory"


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


@SLOW_START
@given(dialogue=dialogues())
def test_original_format_is_the_string_of_the_original_project(dialogue: Dialogue) -> None:
    """Built here as that project's script builds it, of texts as they stand in its data set: on one line each."""
    prompt = prompt_of("falcon", "original")
    clean = replace(
        dialogue,
        persona=tuple(" ".join(text.split()) for text in dialogue.persona),
        turns=tuple(Turn(turn.speaker, " ".join(turn.text.split())) for turn in dialogue.turns),
    )
    *history, last = clean.turns
    row = {
        "persona_b": list(clean.persona),
        "dialogue": [f"Persona {'A' if turn.speaker == 'partner' else 'B'}: {turn.text}" for turn in history],
        "reference": last.text,
    }
    lines = ["", f"Persona B: {', '.join(row['persona_b'])}", "", "Conversation:", f"{row['dialogue']}"]
    theirs = "\n    ".join([*lines, f"<AI>: {row['reference']}", ""]).replace("\n    \n", "\n\n").strip()
    for given_dialogue in (clean, dialogue):
        *before, end = prompt.segments(given_dialogue)
        assert "".join(segment.text for segment in before) == theirs and end.kind == "end"


def test_original_format_tokenizes_as_one_string_does() -> None:
    """The boundary before a reply is one that the tokenizer makes too, so nothing is tokenized otherwise than there."""
    prompt = prompt_of("falcon", "original")
    for reply in ("i have two dogs .", "2 dogs", "'tis 1987 !", "( hi )", "Zoë ?"):
        turns = (Turn("partner", 'hi ! any "pets" ?'), Turn("self", "no"), Turn("partner", "i'm sad"))
        dialogue = Dialogue("d", ("i have two dogs.", "i like cars."), (*turns, Turn("self", reply)))
        whole = "".join(segment.text for segment in prompt.segments(dialogue)[:-1])
        assert prompt.render(dialogue).input_ids == [*prompt.tokenizer(whole)["input_ids"], prompt.end_id]


def test_original_format_gives_every_reply_a_prompt() -> None:
    prompt = prompt_of("falcon", "original")
    turns = tuple(Turn(speaker, f"{speaker} {n}") for n in range(3) for speaker in ("partner", "self"))
    dialogue = Dialogue("d", ("i am a",), turns)
    for turn, text in dialogue.replies():
        alone = prompt.render(replace(dialogue, turns=turns[: turn + 1]))
        assert prompt.context(dialogue, turn) + prompt.reply_ids(text) == alone.input_ids
    assert prompt.identity()["sha256"] != prompt_of("falcon", "plain").identity()["sha256"]


# -- chat templates ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["byte level", "sentencepiece bpe", "no system role"])
@SLOW_START
@given(dialogue=dialogues())
def test_chat_segments_are_the_templates_own_rendering(name: str, dialogue: Dialogue) -> None:
    prompt = prompt_of(name, "chat")
    system = "\n".join(["You are the following person. Answer as this person would.", *dialogue.persona]).strip()
    messages = [
        {"role": "user" if turn.speaker == "partner" else "assistant", "content": turn.text.strip()}
        for turn in dialogue.turns
    ]
    if messages[0]["role"] == "assistant":
        messages.insert(0, {"role": "user", "content": "(You speak first.)"})
    if name == "no system role":
        messages[0]["content"] = f"{system}\n\n{messages[0]['content']}"
    else:
        messages.insert(0, {"role": "system", "content": system})
    theirs = prompt.tokenizer.apply_chat_template(messages, tokenize=False)
    ours = "".join(segment.text for segment in prompt.segments(dialogue))
    assert theirs.startswith(ours) and not theirs[len(ours) :].strip()
    reply = next(segment.text for segment in reversed(prompt.segments(dialogue)) if segment.kind == "reply")
    generation = prompt.tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
    assert ours.startswith(generation + reply)
    if name == "byte level" and not any(token in ours for token in ("<|endoftext|>",)) and _speaks_no_control(dialogue):
        assert prompt.render(dialogue).input_ids == prompt.tokenizer(ours)["input_ids"]


def _speaks_no_control(dialogue: Dialogue) -> bool:
    said = "".join([*dialogue.persona, *(turn.text for turn in dialogue.turns)])
    return not any(token in said for token in ("<|im_start|>", "<|im_end|>", "<|endoftext|>"))


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (make.REWRITING, "differently once the reply"),
        (make.UNCLOSED, "no control token"),
        (None, "no chat template"),
        ("{{ nonsense(", "template fails"),
        ("{% for m in messages | reverse %}{{ m['content'] }}<|im_end|>{% endfor %}", "reorders messages|differently"),
        ("{{ raise_exception('not today') }}", "not today"),
    ],
)
def test_unusable_templates_are_refused(template: str | None, message: str) -> None:
    with pytest.raises(KestrelError, match=message) as caught:
        Prompt(make.byte_level(chat_template=template), "chat", 100)
    assert "prompt.format: plain" in str(caught.value)


def test_a_template_that_takes_back_a_thought_from_earlier_replies_is_refused() -> None:
    """A reply's own prompt may agree while history does not: the thought goes only when another exchange follows."""
    template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}{{ '!' if m['role'] == 'user' and messages | length > 5 }}\n"
        "{{ m['content'] }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    with pytest.raises(KestrelError, match="differently"):
        Prompt(make.byte_level(chat_template=template), "chat", 100)


def test_a_template_with_a_date_renders_the_same_tomorrow() -> None:
    made = make.byte_level(chat_template=make.DATED)
    text = "".join(segment.text for segment in Prompt(made, "chat", 1000).segments(EXCHANGE))
    assert "Today is 26 Jul 2024." in text


def test_blanks_around_a_reply_are_the_replys() -> None:
    template = ChatTemplate(tokenizer("sentencepiece bpe"), ["<s>", "</s>"])
    assert (template.lead, template.end) == (" ", " </s>")
    assert template.frames(("partner", "self", "partner"))[1:] == ["\n<</SYS>>\n\n", " [/INST]", "<s>[INST] "]


# -- identity ----------------------------------------------------------------------------------------------------------

EXCHANGE = Dialogue("d", ("i am a",), (Turn("partner", "hi"), Turn("self", "ho")))


def test_identity_changes_with_what_shapes_a_prompt() -> None:
    other_eos = make.falcon_like()
    other_eos.eos_token = ">>TITLE<<"
    plain = make.byte_level()
    identities = {
        "falcon": prompt_of("falcon", "plain"),
        "other texts": Prompt(make.falcon_like([*make.TEXTS, "kestrels hover " * 20]), "plain", 10),
        "other eos": Prompt(other_eos, "plain", 10),
        "byte level": Prompt(plain, "plain", 10),
        "chat": Prompt(plain, "chat", 10),
        "dated": Prompt(make.byte_level(chat_template=make.DATED), "chat", 10),
        "template beyond the canary": Prompt(make.byte_level(chat_template=make.CHATML + "{# 2 #}"), "chat", 10),
    }
    hashes = {name: prompt.identity()["sha256"] for name, prompt in identities.items()}
    assert len(set(hashes.values())) == len(hashes)


def test_identity_does_not_change_with_use() -> None:
    made = make.falcon_like()
    prompt = Prompt(made, "plain", 16)
    before = prompt.identity()
    made(["a b c d"], truncation=True, max_length=2)
    assert prompt.identity() == before
    assert Prompt(made, "plain", 500).identity() == before, "max_length is a setting of its own"


def test_identity_is_stable_across_processes_and_saving(tmp_path: Path) -> None:
    for name in ("falcon", "byte level", "sentencepiece bpe", "wordpiece"):
        tokenizer(name).save_pretrained(str(tmp_path / name))
    code = (
        "import sys; from pathlib import Path; from transformers import AutoTokenizer; from kestrel.prompt import Prompt\n"
        "for path in sorted(Path(sys.argv[1]).iterdir()):\n"
        "    print(Prompt(AutoTokenizer.from_pretrained(path), 'plain', 64).identity()['sha256'])"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "7"}
    there = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], env=environment, capture_output=True, text=True, check=True
    )
    here = [
        Prompt(AutoTokenizer.from_pretrained(path), "plain", 64).identity()["sha256"]
        for path in sorted(tmp_path.iterdir())
    ]
    assert len(set(here)) == 4 and there.stdout.split() == here
    assert here[1] == Prompt(tokenizer("falcon"), "plain", 64).identity()["sha256"]


def test_fingerprint_of_a_tokenizer_without_a_backend() -> None:
    class Slow:
        def __init__(self, vocab: dict[str, int]):
            self.special_tokens_map = {"eos_token": "b"}
            self.get_vocab = lambda: vocab

    assert tokenizer_fingerprint(Slow({"a": 0})) != tokenizer_fingerprint(Slow({"a": 1}))


def test_a_tokenizer_without_an_end_is_refused() -> None:
    made = make.falcon_like()
    made.eos_token = None
    for format in ("plain", "chat"):
        with pytest.raises(KestrelError, match="end-of-text"):
            Prompt(made, format, 100)
