"""What each prompt format is, and what makes two prompts the same."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import make_tokenizers as make
import pytest
from hypothesis import given
from prompts import ROOT, SLOW_START, dialogues, prompt_of, tokenizer
from transformers import AutoTokenizer

from kestrel.dialogue import Dialogue, Turn
from kestrel.errors import KestrelError
from kestrel.prompt.chat_template import ChatTemplate
from kestrel.prompt.prompt import Prompt
from kestrel.prompt.tokenizer import tokenizer_fingerprint


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
        (None, "no chat template"),
        ("{{ nonsense(", "template fails"),
        ("{% for m in messages | reverse %}{{ m['content'] }}<|im_end|>{% endfor %}", "reorders messages|differently"),
        ("{{ raise_exception('not today') }}", "not today"),
    ],
)
def test_unusable_templates_are_refused(template: str | None, message: str) -> None:
    with pytest.raises(KestrelError, match=message) as caught:
        Prompt(make.byte_level(chat_template=template), "chat", 100)
    assert "prompt.format: plain" in str(caught.value) and "prompt.chat_template: FILE" in str(caught.value)


def test_a_refused_template_shows_what_it_does() -> None:
    with pytest.raises(KestrelError) as caught:
        Prompt(make.byte_level(chat_template=make.REWRITING), "chat", 100)
    said = str(caught.value)
    assert "+<|im_start|>assistant of 5" in said and "[user 1]" in said and "\ue000" not in said


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
        "import sys; from pathlib import Path; from transformers import AutoTokenizer; from kestrel.prompt.prompt import Prompt\n"
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
