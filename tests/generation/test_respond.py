"""Answers are those of the model alone, whatever else shares their batch, and end where and why they say."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from make_models import make_model, make_tokenizer
from make_tokenizers import sentencepiece_like, unigram, wordpiece

from kestrel.config.settings import Generation
from kestrel.errors import KestrelError
from kestrel.generation.respond import Request, respond, respond_with_library
from kestrel.generation.stop_strings import StopStrings
from kestrel.prompt.prompt import Prompt

END = 11
ROOT = Path(__file__).resolve().parents[2]
ARCHITECTURES = ["falcon", "falcon-alibi", "falcon-new", "gpt2", "gpt_neox", "llama", "qwen2"]
CONTEXTS = st.lists(st.lists(st.integers(12, 380), min_size=1, max_size=30), min_size=1, max_size=6)


@pytest.fixture(scope="module")
def prompt() -> Prompt:
    return Prompt(make_tokenizer(), "plain", 256)


def own_greedy(model: torch.nn.Module, context: list[int], count: int) -> list[int]:
    """Argmax of whole forward passes: no cache, no padding, no library."""
    ids = list(context)
    with torch.no_grad():
        while len(ids) < len(context) + count and (len(ids) == len(context) or ids[-1] != END):
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(context) :]


# GPT-2's positions are absolute: there left padding without position_ids would show.
@pytest.mark.parametrize("architecture", ["falcon", "gpt2", "llama"])
@given(contexts=CONTEXTS, budget=st.integers(1, 400))
@settings(max_examples=8, deadline=None)
def test_batched_answers_are_argmax_of_single_forward_passes(models, prompt, architecture, contexts, budget):
    model = models[architecture]
    chosen = Generation(max_new_tokens=10, stop_strings=[], tokens_per_step=budget)
    for context, response in zip(contexts, respond(model, prompt, contexts, chosen), strict=True):
        ids = own_greedy(model, context, 10)
        ended = ids[-1] == END
        assert response.tokens == len(ids)
        assert response.text == prompt.reply_text(ids)
        assert response.stopped_by == ("eos" if ended else "length")


RULES = st.fixed_dictionaries(
    {
        "repetition_penalty": st.sampled_from([1.0, 1.2, 2.0]),
        "no_repeat_ngram_size": st.sampled_from([0, 1, 2, 3]),
        "stop_strings": st.sampled_from([[], ["\n"], ["a", "tt"]]),
        "max_new_tokens": st.integers(1, 20),
    }
)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@given(contexts=CONTEXTS, rules=RULES)
@settings(max_examples=8, deadline=None)
def test_answers_are_the_librarys_own(models, prompt, architecture, contexts, rules):
    """Each context alone, as the library decodes it; ours share passes, rows leave them, and the cache is our own."""
    chosen = Generation(**rules)
    ours = respond(models[architecture], prompt, contexts, chosen)
    for context, response in zip(contexts, ours, strict=True):
        [(_, alone)] = respond_with_library(models[architecture], prompt, [Request(context, 0)], chosen)
        assert response == alone


def said(prompt: Prompt, script: list[int], context: str = "You:", **chosen):
    """The answer of a model whose logits are pushed to say the given tokens, whatever the prompt."""
    model, steps = make_model(), iter([*script, *script[-1:] * 12])

    def push(module, inputs, output):
        output[:, -1, next(steps)] += 1e4

    model.get_output_embeddings().register_forward_hook(push)
    contexts = [prompt.tokenizer(text)["input_ids"] for text in (context, "hi " + context)]
    first, second = respond(model, prompt, contexts, Generation(max_new_tokens=12, **chosen))
    assert first == second
    return first


def test_three_ways_to_end(prompt):
    tokens = prompt.tokenizer(" i have a dog .")["input_ids"]
    by_end = said(prompt, [*tokens, END])
    assert (by_end.text, by_end.tokens, by_end.stopped_by) == ("i have a dog .", len(tokens) + 1, "eos")
    stop = prompt.tokenizer("\nPartner: hi")["input_ids"]
    by_stop = said(prompt, [*tokens, *stop])
    assert (by_stop.text, by_stop.stopped_by) == ("i have a dog .", "stop_string")
    assert len(tokens) < by_stop.tokens <= len(tokens) + 1
    by_length = said(prompt, prompt.tokenizer("dog" * 40)["input_ids"])
    assert (by_length.tokens, by_length.stopped_by) == (12, "length")


def test_each_of_several_end_tokens_ends_it():
    both = Prompt(make_tokenizer(), "plain", 256)
    both.ends_also_at([4, END])
    tokens = both.tokenizer(" i have a dog .")["input_ids"]
    for beams in (1, 2):
        answer = said(both, [*tokens, 4], num_beams=beams)
        assert (answer.text, answer.stopped_by, answer.tokens) == ("i have a dog .", "eos", len(tokens) + 1)


def test_the_first_of_several_stop_strings_ends_it(prompt):
    answer = said(prompt, prompt.tokenizer("noSTOPmore")["input_ids"], stop_strings=["more", "STOP"])
    assert (answer.text, answer.stopped_by) == ("no", "stop_string")


@pytest.mark.parametrize(
    ("context", "reply", "chosen"),
    [
        ("You:", "", {}),
        ("a dog .\nPartner: a dog .\nYou: a dog .\nYou:", "a dog .", {}),
        # The library's own criterion looks at the prompt too, and would end this answer after its first token.
        ("\nYou:", "i have a cat .", {"stop_strings": [": i"]}),
    ],
)
def test_what_the_prompt_holds_does_not_stop_it(prompt, context, reply, chosen):
    tokens = prompt.tokenizer(f" {reply}")["input_ids"] if reply else []
    answer = said(prompt, [*tokens, END], context=context, **chosen)
    assert (answer.text, answer.stopped_by, answer.tokens) == (reply, "eos", len(tokens) + 1)


def test_beams_are_the_same_alone_and_together(models, prompt):
    contexts = [[20, 30, 40], [50] * 17, [60, 70]]
    chosen = Generation(max_new_tokens=8, num_beams=3, length_penalty=0.5)
    together = respond(models["falcon"], prompt, contexts, chosen)
    assert together == [respond(models["falcon"], prompt, [context], chosen)[0] for context in contexts]
    assert together != respond(models["falcon"], prompt, contexts, Generation(max_new_tokens=8))


def test_a_sample_depends_on_its_own_seed_alone(models, prompt):
    contexts, seeds = [[20 + i, 30, 40] + [50] * i for i in range(6)], list(range(6))
    chosen = Generation(max_new_tokens=8, do_sample=True, top_k=50, top_p=0.9, temperature=1.3)

    def drawn(order, budget=8192):
        settings = chosen.model_copy(update={"tokens_per_step": budget})
        found = respond(models["falcon"], prompt, [contexts[i] for i in order], settings, [seeds[i] for i in order])
        return dict(zip(order, found, strict=True))

    together = drawn(range(6))
    assert drawn([4, 0, 5, 2, 1, 3], budget=20) == together
    assert {i: drawn([i])[i] for i in range(6)} == together
    others = respond(models["falcon"], prompt, [contexts[0]] * 6, chosen, seeds)
    assert len({response.text for response in others}) > 1


def test_samples_follow_the_models_probabilities(models, prompt):
    """3,000 first tokens after one context, against the softmax of its logits among the 20 likeliest."""
    context, count = [20, 30, 40], 3000
    chosen = Generation(max_new_tokens=1, do_sample=True, top_k=20, temperature=2.0, stop_strings=[])
    drawn = respond(models["falcon"], prompt, [context] * count, chosen, range(count))
    with torch.no_grad():
        logits = models["falcon"](input_ids=torch.tensor([context])).logits[0, -1] / 2
    likeliest = logits.topk(20)
    expected: dict[str, float] = {}
    for token, probability in zip(likeliest.indices.tolist(), likeliest.values.softmax(0).tolist(), strict=True):
        text = prompt.reply_text([token]) if token != END else ""
        expected[text] = expected.get(text, 0) + probability
    found = {text: sum(response.text == text for response in drawn) / count for text in expected}
    assert sum(found.values()) == pytest.approx(1)
    for text, probability in expected.items():
        assert abs(found[text] - probability) < 4.5 * (probability * (1 - probability) / count) ** 0.5


def test_a_models_own_defaults_change_nothing(models, prompt, monkeypatch):
    model, contexts = models["falcon"], [[20, 30, 40], [50, 60]]
    expected = respond(model, prompt, contexts, Generation(max_new_tokens=8))
    own = model.get_base_model().generation_config
    foreign = {"repetition_penalty": 5.0, "suppress_tokens": list(range(12, 300)), "min_new_tokens": 8, "num_beams": 2}
    for key, value in {**foreign, "forced_eos_token_id": 20, "bad_words_ids": [[310], [320]]}.items():
        monkeypatch.setattr(own, key, value)
    assert respond(model, prompt, contexts, Generation(max_new_tokens=8)) == expected
    assert model.get_base_model().generation_config is own


def test_model_without_max_position_embeddings(prompt):
    model = make_model()
    delattr(model.config, "max_position_embeddings")
    assert respond(model, prompt, [[20, 30]], Generation(max_new_tokens=3))[0].tokens <= 3


def test_an_answer_that_does_not_fit_is_refused(prompt):
    model = make_model("gpt2")
    with pytest.raises(KestrelError, match="a prompt of 510 tokens and generation.max_new_tokens 3 exceed .* 512"):
        respond(model, prompt, [[20] * 510], Generation(max_new_tokens=3))
    assert respond(model, prompt, [[20] * 509], Generation(max_new_tokens=3, stop_strings=[]))[0].tokens <= 3


@pytest.mark.parametrize("make", [make_tokenizer, sentencepiece_like, unigram, wordpiece])
@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_no_stop_string_is_overlooked(make, data):
    """A character may be spread over several tokens; some decoders drop or add a blank between two tokens."""
    spelled = _prompt_of(make)
    ids = data.draw(st.lists(st.integers(0, len(spelled.tokenizer) - 1), max_size=12))
    text = spelled.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    parts = st.integers(0, max(0, len(text) - 1)).map(lambda start: text[start : start + 2] or "a")
    anything = st.text("ab .:\nYé", min_size=1, max_size=3)
    stops = data.draw(st.lists(parts | anything, min_size=1, max_size=3))
    assert StopStrings(spelled, stops).are_in(ids) == any(stop in text for stop in stops)


@functools.cache
def _prompt_of(make: Callable[[], Any]) -> Prompt:
    return Prompt(make(), "plain", 64)
