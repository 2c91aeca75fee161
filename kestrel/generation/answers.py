"""Rows of a generations file: every reply of a split, answered, with the likelihoods that the settings ask for."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from kestrel.config.settings import Generation
from kestrel.data.dataset import dialogue_of, lengths_of
from kestrel.dialogue import Dialogue, reordered
from kestrel.errors import ProofError
from kestrel.generation.files import GenerationsFile
from kestrel.generation.other_personas import Persona, nll_under_others, personas_of_others
from kestrel.generation.prefix_cache import Continuation, Prefixes, compute_prefixes, continuation_nll
from kestrel.generation.respond import (
    Request,
    budget_of,
    decodes_from_prefixes,
    respond_from_prefixes,
    respond_with_library,
)
from kestrel.model.budget import Budget
from kestrel.model.dense_weights import dense_weights
from kestrel.model.likelihood import SpanRequest, span_nll
from kestrel.prompt.prompt import Prompt, Rendered, Unrenderable
from kestrel.runtime import distributed
from kestrel.runtime.atomic import write_atomically
from kestrel.runtime.manifest import sha256_of_json

if TYPE_CHECKING:
    from datasets import Dataset

_MARK = re.compile(r'\{"dialogues_done": (\d{1,12}), ')
# Dialogues are answered together and then written, which is what an interruption can cost: as many as fill some passes,
# so that thousands of answers grow side by side, and a few dozen at least.
_PASSES_A_SHARD = 4
_DIALOGUES_A_SHARD = 32


@dataclass(frozen=True)
class Question:
    """One reply to be made.

    Attributes:
        turn: the reply's index in the dialogue's turns.
        context: the prompt's tokens.
        reference: the reference's tokens, end included.
        candidates: other replies that the source offers here.
        span: of the reference in the dialogue's sequence; None where truncation cut it off.
    """

    dialogue: Dialogue
    turn: int
    context: list[int]
    reference: list[int]
    candidates: tuple[str, ...]
    span: tuple[int, int] | None


def question_row(dialogue: Dialogue, turn: int) -> dict[str, Any]:
    """What a row says about a reply before it is answered."""
    return {
        "dialogue_id": dialogue.dialogue_id,
        "turn": turn,
        "persona": list(dialogue.persona),
        "history": [{"speaker": t.speaker, "text": t.text} for t in dialogue.turns[:turn]],
        "reference": dialogue.turns[turn].text,
    }


def questions_of(rows: Sequence[dict[str, Any]], prompt: Prompt, seed: int = 0, order: int = 0) -> list[list[Question]]:
    """The replies of each of the given dataset rows, in order.

    A prompt is the dialogue's training sequence up to the reply, as it would be with the persona in the given order.
    Replies that truncation cut from it are rendered again; those whose exchange alone is longer than prompt.max_length
    are left out.

    Raises:
        ProofError: the prompt renders a dialogue, as given, otherwise than the dataset holds it.
    """
    dialogues = [dialogue_of(row) for row in rows]
    renderings = prompt.render_all(dialogues)
    for row, again in zip(rows, renderings, strict=True):
        if isinstance(again, Unrenderable) or again.input_ids != row["input_ids"]:
            raise ProofError(
                f"dialogue {row['dialogue_id']}: the prompt that would generate is not the one that trained; "
                "make the dataset again with preprocess.py"
            )
    if order:
        dialogues = [reordered(dialogue, seed, order) for dialogue in dialogues]
        renderings = prompt.render_all(dialogues)
    return [_questions(*pair, prompt) for pair in zip(dialogues, renderings, strict=True)]


def _questions(dialogue: Dialogue, rendered: Rendered | Unrenderable, prompt: Prompt) -> list[Question]:
    """One dialogue's replies. A shuffled persona may need a token more and cut other turns, or all of them."""
    sequence, in_sequence = (
        ([], []) if isinstance(rendered, Unrenderable) else (rendered.input_ids, rendered.reply_spans)
    )
    replies = list(dialogue.replies())
    spans = [*[None] * (len(replies) - len(in_sequence)), *in_sequence]
    candidates = dialogue.candidates or [()] * len(replies)
    questions = []
    for (turn, text), span, others in zip(replies, spans, candidates, strict=True):
        if span is not None:
            context, reference = sequence[: span[0]], sequence[span[0] : span[1]]
        else:
            try:
                context, reference = prompt.context(dialogue, turn), prompt.reply_ids(text)
            except Unrenderable:
                continue
        questions.append(Question(dialogue, turn, context, reference, others, span))
    return questions


def answer(
    model: torch.nn.Module,
    prompt: Prompt,
    by_dialogue: Sequence[Sequence[Question]],
    settings: Generation,
    seed: int,
    others: Sequence[Sequence[Persona]] = (),
    budget: Budget | None = None,
    on_end: Callable[[int], object] = int,
) -> list[dict[str, Any]]:
    """Answers every question of some dialogues; returns generation rows in the same order.

    Args:
        model: prepared by `loss.attach_token_nll`.
        by_dialogue: from `questions_of`.
        others: for each dialogue, the personas of other dialogues under which its references are scored too.
        budget: of earlier dialogues; None: made for these.
        on_end: called with how many more answers have ended.
    """
    questions = [question for dialogue in by_dialogue for question in dialogue]
    answers = [question_row(question.dialogue, question.turn) for question in questions]
    sequences, sequence_of = _sequences(by_dialogue, settings.references)
    requests = [
        Request(question.context, sequence, _seed_of(question, seed) if settings.do_sample else 0)
        for question, sequence in zip(questions, sequence_of, strict=True)
    ]
    candidates = _tokenized_candidates(prompt, questions) if settings.candidates else []
    scores: dict[int, list[tuple[float, int]]] = {}
    budget = budget_of(model, settings, budget)
    groups: Iterable[tuple[Prefixes | None, dict[int, list[tuple[float, int]]]]]
    longest = max((len(sequence.input_ids) for sequence in sequences), default=0)
    longest += max((len(ids) for _, ids in candidates), default=0)
    if decodes_from_prefixes(model, settings, longest):
        groups = compute_prefixes(model, sequences, budget)
    else:
        groups = [(None, dict(enumerate(span_nll(model, sequences, budget))))]
    for prefixes, in_group in groups:
        scores |= in_group
        if prefixes is None:
            responses, mine = respond_with_library(model, prompt, requests, settings, budget), candidates
        else:
            responses = respond_from_prefixes(model, prompt, prefixes, requests, settings, budget, on_end)
            mine = [(index, ids) for index, ids in candidates if prefixes.holds(requests[index].sequence)]
        for index, response in responses:
            answers[index] |= response.as_row()
            on_end(prefixes is None)
        continuations = [Continuation(requests[index].sequence, requests[index].ids, ids) for index, ids in mine]
        nll = continuation_nll(model, prefixes, continuations, budget)
        for (index, _), pair in zip(mine, nll, strict=True):
            answers[index].setdefault("candidate_nll", []).append(list(pair))
    if settings.references:
        in_order = [pair for index in range(len(sequences)) for pair in scores[index]]
        for row, (reference_nll, tokens) in zip(answers, in_order, strict=True):
            row |= {"reference_nll": reference_nll, "reference_tokens": tokens}
    if others:
        under_others = nll_under_others(model, prompt, by_dialogue, others, budget)
        for row, values in zip(answers, under_others, strict=True):
            row |= {"other_persona_nll": values} if values else {}
    return answers


def _seed_of(question: Question, seed: int) -> int:
    """The same wherever and with whatever the question is answered."""
    name = json.dumps([seed, question.dialogue.dialogue_id, question.turn])
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") >> 1


def _sequences(by_dialogue: Sequence[Sequence[Question]], references: bool) -> tuple[list[SpanRequest], list[int]]:
    """What has to be computed: token sequences with the references in them, in order; and the sequence of each question.

    Prompts that begin their dialogue's sequence share it; each of the others has one of its own.
    """
    sequences: list[SpanRequest] = []
    sequence_of: list[int] = []
    for questions in by_dialogue:
        for question in questions:
            if question.span is None:
                whole = [*question.context, *question.reference]
                sequence_of.append(len(sequences))
                sequences.append(SpanRequest(whole, [(len(question.context), len(whole))]))
        # What truncation cut stands first, so the last question's sequence holds all of the others.
        spans = [question.span for question in questions if question.span is not None]
        if spans:
            sequence_of += [len(sequences)] * len(spans)
            sequences.append(SpanRequest([*questions[-1].context, *questions[-1].reference], spans))
    if not references:
        sequences = [SpanRequest(whole.input_ids[: whole.spans[-1][0]], []) for whole in sequences]
    return sequences, sequence_of


def _tokenized_candidates(prompt: Prompt, questions: Sequence[Question]) -> list[tuple[int, list[int]]]:
    """Each candidate: the index of its question, and token ids.

    A reply of whose candidates one cannot be tokenized as text has none: a rank among fewer would be another score.
    """
    found = []
    for index, question in enumerate(questions):
        with contextlib.suppress(Unrenderable):
            found += [(index, ids) for ids in [prompt.reply_ids(text) for text in question.candidates]]
    return found


def write_answers(
    model: torch.nn.Module,
    prompt: Prompt,
    dataset: Dataset,
    settings: Generation,
    seed: int,
    file: GenerationsFile,
    on_end: Callable[[int], object] = int,
) -> Iterator[int]:
    """Answers a split into a JSONL file, which appears when it is complete.

    Until then the rows are in a partial file beside it, shard after shard; the same call resumes after the last complete
    shard, if what decides the answers is the same. Of several processes each answers a shard, cut as one process would
    cut them, and the first writes them in order: the file does not depend on the number of processes.

    Args:
        seed: of sampling and of the persona's order.
        on_end: called with how many more answers of this process have ended.

    Yields:
        Dialogues done: first those of an earlier call, then the count after each shard, or after one shard per process.
    """
    path, identity = file.path, sha256_of_json(file.made_from)
    partial = path.with_name(f".{path.name}.partial")
    lengths = lengths_of(dataset)
    path.parent.mkdir(parents=True, exist_ok=True)
    others = personas_of_others(dataset, settings.other_personas, seed) if settings.other_personas else []
    done = distributed.broadcast_from_first(lambda: _keep_complete_shards(partial, identity, dataset))
    yield done
    with dense_weights(model):
        budget = budget_of(model, settings)
        tokens = budget.tokens = distributed.all_reduce_min(budget.tokens)  # all processes cut the same shards
        while done < len(dataset):
            ends = [done]
            while len(ends) <= distributed.world_size() and ends[-1] < len(dataset):
                ends.append(ends[-1] + dialogues_of_shard(lengths[ends[-1] :], tokens))
            shard, mine = "", distributed.rank()
            if mine < len(ends) - 1:
                rows = [dataset[i] for i in range(ends[mine], ends[mine + 1])]
                questions, swapped = questions_of(rows, prompt, seed, file.order), others[ends[mine] : ends[mine + 1]]
                answers = answer(model, prompt, questions, settings, seed, swapped, budget, on_end)
                shard = "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in answers)
            for end, lines in zip(ends[1:], distributed.gather_to_first(shard), strict=False):
                with open(partial, "a", encoding="utf-8") as growing:
                    growing.write(lines + _mark(end, lines.encode()))
                    growing.flush()
                    os.fsync(growing.fileno())
            done = ends[-1]
            yield done
    if not distributed.is_first():
        return
    with open(partial, encoding="utf-8") as lines_and_marks, write_atomically(path) as whole:
        next(lines_and_marks)
        whole.writelines(line for line in lines_and_marks if not _MARK.match(line))
    partial.unlink()


def dialogues_of_shard(lengths: np.ndarray, tokens_per_step: int) -> int:
    """How many of the next dialogues, of these lengths, make a shard."""
    fitting = int(np.searchsorted(lengths.cumsum(), _PASSES_A_SHARD * tokens_per_step, side="right"))
    return min(len(lengths), max(fitting, _DIALOGUES_A_SHARD))


def _mark(done: int, shard: bytes) -> str:
    """The line that closes a shard. Its hash, of the count and the rows, finds damage before a run continues after it."""
    return json.dumps({"dialogues_done": done, "sha256": hashlib.sha256(b"%d\n" % done + shard).hexdigest()}) + "\n"


def _keep_complete_shards(partial: Path, identity: str, dataset: Dataset) -> int:
    """Cuts a partial file after its last undamaged shard, or starts it again. Returns the dialogues that are done."""
    header = json.dumps({"identity": identity, "dialogues": len(dataset)}) + "\n"
    kept, done, end = header.encode(), 0, len(header.encode())
    content = partial.read_bytes() if partial.exists() else b""
    if content.startswith(kept):
        position = end
        for line in content[end:].splitlines(keepends=True):
            if mark := _MARK.match(line.decode("utf-8", "replace")):
                claimed = int(mark[1])
                if line != _mark(claimed, content[end:position]).encode() or not done < claimed <= len(dataset):
                    break
                done, end = claimed, position + len(line)
            position += len(line)
        kept = content[:end]
    if kept != content:
        partial.write_bytes(kept)
    return done


def left_out(dataset: Dataset, path: Path) -> tuple[int, int]:
    """What a finished file lacks of its split: replies, and replies' candidates that the data offers."""
    with open(path, encoding="utf-8") as file:
        scored = {(row["dialogue_id"], row["turn"]): "candidate_nll" in row for row in map(json.loads, file)}
    replies = unscored = 0
    for dialogue in map(dialogue_of, dataset):
        for number, (turn, _) in enumerate(dialogue.replies()):
            is_scored = scored.get((dialogue.dialogue_id, turn))
            replies += is_scored is None
            unscored += is_scored is False and bool(dialogue.candidates and dialogue.candidates[number])
    return replies, unscored


def print_left_out(dataset: Dataset, path: Path, candidates: bool) -> None:
    """Prints how many replies a finished file does not answer or rank, and why."""
    unanswered, unscored = left_out(dataset, path)
    of_all = f"of {sum(turn['speaker'] == 'self' for turns in dataset['turns'] for turn in turns):,} replies"
    if unanswered:
        print(f"  {unanswered:,} {of_all} are left out: the exchange alone is longer than prompt.max_length")
    if candidates and unscored:
        print(f"  {unscored:,} {of_all} do not count in hits@1: a candidate spells a control token (no candidate_nll)")
