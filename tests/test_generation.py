"""Answers are those of the model alone, whatever else shares their batch, and end where and why they say."""

from __future__ import annotations

import functools
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from make_models import make_model, make_tokenizer, words, write_base, write_config, write_corpus
from make_tokenizers import sentencepiece_like, unigram, wordpiece

from kestrel.answers import questions_of
from kestrel.dataset import load_split
from kestrel.errors import KestrelError
from kestrel.generation import Prompted, _StopStrings, by_the_library, respond
from kestrel.loss import install
from kestrel.model import add_lora
from kestrel.prompt import Prompt
from kestrel.settings import Generation, Lora

END = 11
ROOT = Path(__file__).resolve().parent.parent
ARCHITECTURES = ["falcon", "falcon-alibi", "falcon-new", "gpt2", "gpt_neox", "llama", "qwen2"]
CONTEXTS = st.lists(st.lists(st.integers(12, 380), min_size=1, max_size=30), min_size=1, max_size=6)


@pytest.fixture(scope="module")
def prompt() -> Prompt:
    return Prompt(make_tokenizer(), "plain", 256)


def adapted(architecture: str) -> torch.nn.Module:
    """A model as generate.py has it: with an adapter that does something, and prepared for likelihoods."""
    target = ["c_attn"] if architecture == "gpt2" else "all-linear"
    model = add_lora(make_model(architecture), Lora(r=4, target_modules=target), seed=0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    install(model)
    return model.eval()


@pytest.fixture(scope="module")
def models() -> dict[str, torch.nn.Module]:
    return {name: adapted(name) for name in ARCHITECTURES}


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
        [(_, alone)] = by_the_library(models[architecture], prompt, [Prompted(context, 0)], chosen)
        assert response == alone


class Parrot(torch.nn.Module):
    """Makes a model say a given token sequence after any prompt, by adding to its logits."""

    def __init__(self, model, script):
        super().__init__()
        self.model, self.script = model, script

    def __enter__(self):
        self.said = {}

        def push(module, inputs, output):
            step = self.said.setdefault("n", 0)
            output[:, -1, self.script[min(step, len(self.script) - 1)]] += 1e4
            self.said["n"] += 1

        self.hook = self.model.get_output_embeddings().register_forward_hook(push)
        return self.model

    def __exit__(self, *error):
        self.hook.remove()


def said(prompt: Prompt, script: list[int], context: str = "You:", **chosen):
    with Parrot(make_model(), script) as model:
        contexts = [prompt.tokenizer(context)["input_ids"], prompt.tokenizer("hi " + context)["input_ids"]]
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


def test_empty_answer(prompt):
    assert said(prompt, [END]).__dict__ == {"text": "", "tokens": 1, "stopped_by": "eos"}


def test_stop_string_over_several_tokens_and_the_first_of_several(prompt):
    script = [*prompt.tokenizer(" yes , i have a dog . STOP and more")["input_ids"]]
    answer = said(prompt, script, stop_strings=["more", "STOP"], context="a")
    assert answer.text == "yes , i have a dog ."[: len(answer.text)] and answer.stopped_by in ("stop_string", "length")
    answer = said(prompt, prompt.tokenizer("noSTOPmore")["input_ids"], stop_strings=["more", "STOP"])
    assert (answer.text, answer.stopped_by) == ("no", "stop_string")


def test_prompt_may_hold_the_stop_string_and_the_reply(prompt):
    tokens = prompt.tokenizer(" a dog .")["input_ids"]
    answer = said(prompt, [*tokens, END], context="a dog .\nPartner: a dog .\nYou: a dog .\nYou:")
    assert (answer.text, answer.stopped_by, answer.tokens) == ("a dog .", "eos", len(tokens) + 1)


def test_a_stop_string_that_begins_in_the_prompt_does_not_stop(prompt):
    """The library's own criterion looks at the prompt too, and would end this answer after its first token."""
    tokens = prompt.tokenizer(" i have a cat .")["input_ids"]
    answer = said(prompt, [*tokens, END], context="\nYou:", stop_strings=[": i"])
    assert (answer.text, answer.stopped_by) == ("i have a cat .", "eos")


def test_beams_are_the_same_alone_and_together(models, prompt):
    contexts = [[20, 30, 40], [50] * 17, [60, 70]]
    chosen = Generation(max_new_tokens=8, num_beams=3, length_penalty=0.5)
    together = respond(models["falcon"], prompt, contexts, chosen)
    assert together == [respond(models["falcon"], prompt, [context], chosen)[0] for context in contexts]
    assert together != respond(models["falcon"], prompt, contexts, Generation(max_new_tokens=8))


def test_a_sample_hangs_on_its_own_seed_alone(models, prompt):
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


def test_a_models_own_defaults_change_nothing(models, prompt):
    model, contexts = models["falcon"], [[20, 30, 40], [50, 60]]
    expected = respond(model, prompt, contexts, Generation(max_new_tokens=8))
    own = model.get_base_model().generation_config
    foreign = {"repetition_penalty": 5.0, "suppress_tokens": list(range(12, 300)), "min_new_tokens": 8, "num_beams": 2}
    for key, value in {**foreign, "forced_eos_token_id": 20, "bad_words_ids": [[310], [320]]}.items():
        setattr(own, key, value)
    try:
        assert respond(model, prompt, contexts, Generation(max_new_tokens=8)) == expected
        assert model.get_base_model().generation_config is own
    finally:
        for key in (*foreign, "forced_eos_token_id", "bad_words_ids"):
            setattr(own, key, None)


def test_model_without_max_position_embeddings(prompt):
    model = make_model()
    delattr(model.config, "max_position_embeddings")
    assert respond(model, prompt, [[20, 30]], Generation(max_new_tokens=3))[0].tokens <= 3


def test_an_answer_that_does_not_fit_is_refused(prompt):
    model = make_model("gpt2")
    with pytest.raises(KestrelError, match="a prompt of 510 tokens and generation.max_new_tokens 3 exceed .* 512"):
        respond(model, prompt, [[20] * 510], Generation(max_new_tokens=3))
    assert respond(model, prompt, [[20] * 509], Generation(max_new_tokens=3, stop_strings=[]))[0].tokens <= 3


@given(
    ids=st.lists(st.integers(0, 383), max_size=12),
    stops=st.lists(st.text("ab .:\nYé", min_size=1, max_size=3), min_size=1, max_size=3),
)
@settings(max_examples=300, deadline=None)
def test_no_stop_string_is_overlooked(prompt, ids, stops):
    """Byte by byte tokens among them, so that a character may be spread over several."""
    text = prompt.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert _StopStrings(prompt, stops)(ids) == any(stop in text for stop in stops)


@pytest.mark.parametrize("make", [sentencepiece_like, unigram, wordpiece])
@given(data=st.data())
@settings(max_examples=100, deadline=None)
def test_no_stop_string_is_overlooked_by_other_decoders(make, data):
    """They take the blank from a token that stands alone, or put one between two tokens."""
    spelled = _prompt_of(make)
    ids = data.draw(st.lists(st.integers(0, len(spelled.tokenizer) - 1), max_size=8))
    text = spelled.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    places = st.integers(0, max(0, len(text) - 1))
    stops = [text[start : start + 2] or "a" for start in data.draw(st.lists(places, min_size=1, max_size=2))]
    assert _StopStrings(spelled, stops)(ids) == any(stop in text for stop in stops)


@functools.cache
def _prompt_of(make: Callable[[], Any]) -> Prompt:
    return Prompt(make(), "plain", 64)


# -- generate.py -------------------------------------------------------------------------------------------------------


def rows_in(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_rows_are_in_the_datasets_order_and_recorded(trained, tmp_path):
    import generate

    arguments = trained.copy_to(tmp_path / "run")
    assert generate.main([*arguments, "--generation.candidates", "true"]) == 0
    made = tmp_path / "run" / "generations"
    adapter, base = rows_in(made / "test.adapter.jsonl"), rows_in(made / "test.base.jsonl")
    dataset = load_split(trained.run / "dataset", "test", "")
    turns = [(row["dialogue_id"], i) for row in dataset for i, t in enumerate(row["turns"]) if t["speaker"] == "self"]
    for rows in (adapter, base):
        assert [(row["dialogue_id"], row["turn"]) for row in rows] == turns
        assert {"persona", "history", "reference", "response", "stopped_by", "response_tokens"} < rows[0].keys()
        assert all(len(row["candidate_nll"]) == 2 for row in rows)
    assert [row["reference"] for row in adapter] == [row["reference"] for row in base]
    assert all(a["reference_nll"] < b["reference_nll"] for a, b in zip(adapter, base, strict=True))
    manifest = json.loads((made / "manifest.json").read_text())
    assert manifest["generations"].keys() == {"test.adapter.jsonl", "test.base.jsonl"}
    assert manifest["generations"]["test.adapter.jsonl"]["made_from"]["adapter"]
    assert sorted(path.name for path in made.iterdir()) == ["manifest.json", "test.adapter.jsonl", "test.base.jsonl"]


def test_same_command_again_does_nothing_and_another_does(trained, tmp_path, capsys):
    import generate

    arguments = [*trained.copy_to(tmp_path / "run"), "--generation.systems", "adapter"]
    assert generate.main([*arguments, "--generation.max_dialogues", "1"]) == 0
    path = tmp_path / "run" / "generations" / "test.adapter.jsonl"
    first, stamp = path.read_bytes(), path.stat().st_mtime_ns
    assert {row["dialogue_id"] for row in rows_in(path)} == {
        load_split(trained.run / "dataset", "test", "")[0]["dialogue_id"]
    }
    capsys.readouterr()
    assert generate.main([*arguments, "--generation.max_dialogues", "1"]) == 0
    assert "up to date" in capsys.readouterr().out and path.stat().st_mtime_ns == stamp
    assert generate.main(arguments) == 0
    assert path.read_bytes().startswith(first) and len(path.read_bytes()) > len(first)
    path.write_bytes(first[:-20])  # edited by somebody
    assert generate.main(arguments) == 0
    assert rows_in(path)[0] == json.loads(first.splitlines()[0])


def test_batching_changes_nothing_and_sampling_seed_does(trained, tmp_path):
    import generate

    arguments = [*trained.copy_to(tmp_path / "run"), "--generation.systems", "adapter"]
    path = tmp_path / "run" / "generations" / "test.adapter.jsonl"

    def made(*more: str) -> list[dict]:
        path.unlink(missing_ok=True)
        assert generate.main([*arguments, *more]) == 0
        return rows_in(path)

    one, many = made("--generation.tokens_per_step", "1"), made()
    for a, b in zip(one, many, strict=True):
        assert a["response"] == b["response"] and a["reference_nll"] == pytest.approx(b["reference_nll"], rel=1e-4)
    sampling = ["--generation.do_sample", "true", "--generation.temperature", "1.5"]
    drawn = [row["response"] for row in made(*sampling)]
    assert drawn == [row["response"] for row in made(*sampling)]
    assert drawn != [row["response"] for row in many]


def test_replies_that_truncation_cut_are_answered_too(trained, tmp_path, capsys):
    """The dataset holds only the last exchanges; the file holds every reply but the one that fits into no prompt."""
    import generate
    import preprocess
    import train

    write_corpus(tmp_path / "corpus", 8)
    persona = ["i have a cat .", "my favorite food is rice .", "i live in lima ."]
    huge = [{"speaker": "partner", "text": "hi " * 200}, {"speaker": "self", "text": "hi ."}]
    with open(tmp_path / "corpus" / "test.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps({"dialogue_id": "long", "persona": persona, "turns": words(persona) * 2}) + "\n")
        file.write(json.dumps({"dialogue_id": "huge", "persona": persona, "turns": huge + words(persona)}) + "\n")
    config = write_config(tmp_path / "c.yaml", trained.base, tmp_path / "corpus", tmp_path / "run")
    arguments = ["--config", str(config), "--prompt.max_length", "90", "--training.max_steps", "1"]
    assert preprocess.main(arguments) == 0 and train.main(arguments) == 0 and generate.main(arguments) == 0
    dataset = load_split(tmp_path / "run" / "dataset", "test", "")
    in_sequence = sum(len(row["reply_spans"]) for row in dataset)
    in_dialogue = sum(turn["speaker"] == "self" for row in dataset for turn in row["turns"])
    rows = rows_in(tmp_path / "run" / "generations" / "test.adapter.jsonl")
    assert in_sequence < len(rows) == in_dialogue - 1
    assert f"1 of {in_dialogue} replies are left out" in capsys.readouterr().out
    assert [row["turn"] for row in rows if row["dialogue_id"] == "long"] == [1, 3, 5, 7, 9, 11]
    assert [row["turn"] for row in rows if row["dialogue_id"] == "huge"] == [3, 5, 7]
    assert all(np.isfinite(row["reference_nll"]) and row["reference_tokens"] > 1 for row in rows)


def test_questions_hold_the_datasets_own_prompts(trained, prompt):
    dataset = load_split(trained.run / "dataset", "test", "")
    own = Prompt(prompt.tokenizer, "plain", 160)
    for row, questions in zip(dataset, questions_of(list(dataset), own), strict=True):
        for question in questions:
            assert (
                row["input_ids"][: len(question.context)]
                == question.context
                == own.context(question.dialogue, question.turn)
            )
            assert question.reference[-1] == own.end_id


def test_killed_in_the_middle_and_again_is_the_same_file(trained, tmp_path):
    """40 dialogues are two shards; the first call is killed while it works on the second."""
    import generate
    import preprocess

    write_corpus(tmp_path / "corpus", 8, test=40)
    config = write_config(tmp_path / "c.yaml", trained.base, tmp_path / "corpus", tmp_path / "run")
    sampling = ["--generation.do_sample", "true", "--generation.top_k", "20", "--generation.max_new_tokens", "60"]
    sampling += ["--generation.tokens_per_step", "64"]
    arguments = ["--config", str(config), "--generation.systems", "base", *sampling]
    assert preprocess.main(arguments) == 0
    assert generate.main(arguments) == 0
    made = tmp_path / "run" / "generations"
    expected = (made / "test.base.jsonl").read_bytes()
    (made / "test.base.jsonl").unlink()

    partial = made / ".test.base.jsonl.partial"
    process = subprocess.Popen([sys.executable, "generate.py", *arguments], cwd=ROOT, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 90
    while not (partial.exists() and b"dialogues_done" in partial.read_bytes()):
        assert process.poll() is None and time.monotonic() < deadline, "it ended before it could be killed"
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (made / "test.base.jsonl").exists()
    with open(partial, "ab") as file:
        file.write(b'{"dialogue_id": "half a li')
    assert generate.main(arguments) == 0
    assert (made / "test.base.jsonl").read_bytes() == expected and not partial.exists()


def test_gpt2_runs_the_chain_with_absolute_positions(trained, tmp_path):
    import generate
    import preprocess
    import train

    config = write_config(tmp_path / "c.yaml", write_base(tmp_path / "base", "gpt2"), trained.source, tmp_path / "run")
    arguments = ["--config", str(config), "--lora.target_modules", "all-linear", "--training.max_steps", "2"]
    assert preprocess.main(arguments) == 0 and train.main(arguments) == 0 and generate.main(arguments) == 0
