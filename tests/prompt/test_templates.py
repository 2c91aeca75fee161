"""Each kind of tokenizer with each behaviour of chat templates: prefixes, replies, ends, and the joined text's ids."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from typing import Any

import make_tokenizers as make
import pytest
from make_models import make_model
from make_templates import LIKE
from transformers import PreTrainedTokenizerFast

from kestrel.config.settings import Generation
from kestrel.dialogue import Dialogue, Turn
from kestrel.generation.respond import respond
from kestrel.prompt.prompt import Prompt

TEXTS = ["hi ! how are you ?", "great , and you ?", "i have 2 dogs .", "nice", "bye", "see you"]
TURNS = tuple(Turn("self" if index % 2 else "partner", text) for index, text in enumerate(TEXTS))
DIALOGUES = [Dialogue("d", ("i am a bird .", "i fly ."), TURNS), Dialogue("e", ("i fly .",), TURNS[1:4])]
TOKENIZERS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "byte level": make.byte_level,
    "SentencePiece": make.sentencepiece_like,
    "dummy prefix": make.dummy_prefix,
    "WordPiece": make.wordpiece,
}


@cache
def prompt_like(model: str, kind: str, with_bos: bool) -> Prompt:
    made, template = TOKENIZERS[kind](), LIKE[model]
    made.add_tokens([token for token in template.specials if token not in made.get_vocab()], special_tokens=True)
    if with_bos:
        made.add_special_tokens({"bos_token": "<bos>"})
    return Prompt(made, "chat", 10**5, template.source if with_bos else template.source.replace("bos_token", "''"))


@pytest.mark.parametrize("model", LIKE)
@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("with_bos", [True, False], ids=["bos", "no bos"])
def test_templates_are_served(model: str, kind: str, with_bos: bool) -> None:
    prompt = prompt_like(model, kind, with_bos)
    assert [note for note in LIKE[model].notes if any(note in said for said in prompt.notes)] == [*LIKE[model].notes]
    assert len(prompt.notes) == len(LIKE[model].notes)
    for dialogue in DIALOGUES:
        rendered = prompt.render(dialogue)
        joined = "".join(segment.text for segment in prompt.segments(dialogue))
        assert rendered.input_ids == prompt.tokenizer(joined, add_special_tokens=False)["input_ids"]
        assert len(rendered.reply_spans) == len(list(dialogue.replies()))
        for (turn, text), (start, end) in zip(dialogue.replies(), rendered.reply_spans, strict=True):
            assert prompt.context(dialogue, turn) == rendered.input_ids[:start]
            assert prompt.reply_ids(text) == rendered.input_ids[start:end]
            assert rendered.input_ids[end - 1] == prompt.end_id
            # What is generated ends where training ended, and is the reply again.
            said = rendered.input_ids[start : end - 1]
            assert prompt.end_ids.isdisjoint(said)
            assert kind == "WordPiece" or prompt.reply_text(said) == text


@cache
def tiny_model(kind: str) -> Any:
    made = TOKENIZERS[kind]()
    made.add_tokens([str(number) for number in range(99990, 99999)])  # room for each template's special tokens
    return make_model("llama", hidden=16, layers=1, tokenizer=made).eval()


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("model", [*LIKE, "plain", "original"])
def test_generation_stops_where_training_ended(model: str, kind: str) -> None:
    """A model that says a reply as it was trained, and would go on, through the scripts' own generation."""
    format: Any = model if model in ("plain", "original") else "chat"
    prompt = prompt_like(model, kind, True) if format == "chat" else Prompt(TOKENIZERS[kind](), format, 10**5)
    rendered = prompt.render(DIALOGUES[0])
    start, end = rendered.reply_spans[-1]
    trained = rendered.input_ids[start:end]
    assert prompt.end_ids >= {rendered.input_ids[end - 1] for _, end in rendered.reply_spans}
    left = iter(trained)

    def say(module: Any, given: Any, options: dict[str, Any], output: Any) -> None:
        if options["input_ids"].shape[1] == 1 and (token := next(left, None)) is not None:
            output.logits[:, -1, token] = 1e9

    causal_lm = tiny_model(kind)
    hook = causal_lm.register_forward_hook(say, with_kwargs=True)
    try:
        settings = Generation(max_new_tokens=len(trained) + 3, stop_strings=[])
        (response,) = respond(causal_lm, prompt, [rendered.input_ids[:start]], settings)
    finally:
        hook.remove()
    assert (response.stopped_by, response.tokens) == ("eos", len(trained))
    assert kind == "WordPiece" or response.text == TEXTS[5]


@pytest.mark.parametrize("model", LIKE)
def test_the_last_reply_is_prompted_as_the_template_prompts(model: str) -> None:
    """Apart from thoughts, and from a system message that moves."""
    prompt = prompt_like(model, "byte level", True)
    turns = TURNS[:2]
    messages = [{"role": "system", "content": "You are the following person. Answer as this person would.\ni fly ."}]
    messages.append({"role": "user", "content": TEXTS[0]})
    if "no system message" in " ".join(prompt.notes):
        messages = [{"role": "user", "content": f"{messages[0]['content']}\n\n{TEXTS[0]}"}]
    own = prompt.tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True, enable_thinking=False
    )
    ours = "".join(segment.text for segment in prompt.segments(Dialogue("d", ("i fly .",), turns))[:-2])
    assert comparable(ours) == comparable(own)


def comparable(prompt: str) -> str:
    """Without today's date, an empty thought, and blanks at the end."""
    return re.sub(r"Today Date: .*|<think>\s*(</think>\s*)?", "", prompt).rstrip()


@pytest.mark.parametrize("format", ["plain", "original"])
@pytest.mark.parametrize("kind", ["SentencePiece", "dummy prefix"])
def test_tokenizers_that_add_a_blank_give_the_joined_texts_ids(kind: str, format: str) -> None:
    prompt = Prompt(TOKENIZERS[kind](), format, 10**5)  # type: ignore[arg-type]
    for dialogue in DIALOGUES:
        joined = "".join(segment.text for segment in prompt.segments(dialogue))
        assert prompt.render(dialogue).input_ids == prompt.tokenizer(joined)["input_ids"]


def test_the_users_own_template_system_and_labels(tmp_path) -> None:
    own = Prompt(
        make.byte_level(), "chat", 10**5, "{% for m in messages %}{{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}"
    )
    assert own.tokenizer.chat_template.startswith("{% for m in messages %}{{ m.role }}:"), (
        "it is saved with the adapter"
    )
    made = make.byte_level()
    prompts = [
        Prompt(made, "chat", 100),
        Prompt(made, "chat", 100, system="Sei diese Person."),
        Prompt(made, "plain", 100),
        Prompt(made, "plain", 100, labels=("Figur", "Gast", "Du")),
    ]
    assert len({prompt.identity()["sha256"] for prompt in prompts}) == 4
    assert prompts[1].identity()["system"] == "Sei diese Person." and "system" not in prompts[0].identity()
    assert prompts[3].identity()["labels"] == ["Figur", "Gast", "Du"] and "labels" not in prompts[2].identity()
    exchange = Dialogue("d", ("ich fliege.",), TURNS[:2])
    texts = ["".join(segment.text for segment in prompt.segments(exchange)[:-1]) for prompt in prompts[1::2]]
    assert texts[0].startswith("<|im_start|>system\nSei diese Person.\nich fliege.<|im_end|>\n")
    assert texts[1] == f"Figur: ich fliege.\nGast: {TEXTS[0]}\nDu: {TEXTS[1]}"
