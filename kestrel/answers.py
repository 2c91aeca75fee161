"""Rows of a generations file: every reply of a split, answered, with the likelihoods that the settings ask for."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from kestrel.artifacts import write_atomically
from kestrel.dataset import dialogue_of
from kestrel.dialogue import Dialogue
from kestrel.errors import ProofError
from kestrel.generation import in_batches
from kestrel.likelihood import Scored, span_nll
from kestrel.prompt import Prompt, Unrenderable
from kestrel.settings import Generation

if TYPE_CHECKING:
    from datasets import Dataset

SHARD = 32  # dialogues that are answered together and then written; what an interruption can cost


@dataclass(frozen=True)
class Question:
    """One reply to be made.

    Attributes:
        dialogue: that the reply stands in.
        turn: the reply's index in the dialogue's turns.
        context: the prompt's tokens.
        reference: the reference's tokens, end included.
        candidates: other replies that the source offers here.
        span: where the reference stands in the dialogue's training sequence; None where truncation cut it off.
    """

    dialogue: Dialogue
    turn: int
    context: list[int]
    reference: list[int]
    candidates: tuple[str, ...]
    span: tuple[int, int] | None

    def as_row(self) -> dict[str, Any]:
        return {
            "dialogue_id": self.dialogue.dialogue_id,
            "turn": self.turn,
            "persona": list(self.dialogue.persona),
            "history": [{"speaker": t.speaker, "text": t.text} for t in self.dialogue.turns[: self.turn]],
            "reference": self.dialogue.turns[self.turn].text,
        }


def questions_of(rows: Sequence[dict[str, Any]], prompt: Prompt) -> list[list[Question]]:
    """The replies of each of the given dataset rows, in order.

    A prompt is the training sequence up to the reply. Replies that truncation cut from the sequence are rendered anew;
    those whose exchange alone is longer than prompt.max_length are left out.

    Raises:
        ProofError: the prompt renders a dialogue otherwise than the dataset holds it.
    """
    questions: list[list[Question]] = []
    for row, again in zip(rows, prompt.render_all([dialogue_of(row) for row in rows]), strict=True):
        dialogue = dialogue_of(row)
        if isinstance(again, Exception) or again.input_ids != row["input_ids"]:
            raise ProofError(
                f"dialogue {dialogue.dialogue_id}: the prompt that would generate is not the one that trained; "
                "make the dataset again with preprocess.py"
            )
        replies = list(dialogue.replies())
        cut = len(replies) - len(row["reply_spans"])
        spans = [*[None] * cut, *((start, end) for start, end in row["reply_spans"])]
        questions.append([])
        for number, ((turn, text), span) in enumerate(zip(replies, spans, strict=True)):
            if span is None:
                try:
                    context, reference = prompt.context(dialogue, turn), prompt.reply_ids(text)
                except Unrenderable:
                    continue
            else:
                context, reference = row["input_ids"][: span[0]], row["input_ids"][span[0] : span[1]]
            candidates = dialogue.candidates[number] if dialogue.candidates else ()
            questions[-1].append(Question(dialogue, turn, context, reference, candidates, span))
    return questions


def answer(
    model: torch.nn.Module, prompt: Prompt, rows: Sequence[dict[str, Any]], settings: Generation, seed: Sequence[int]
) -> list[dict[str, Any]]:
    """Answers every reply of the given dataset rows.

    Args:
        model: prepared by `loss.install`.
        seed: of sampling.

    Returns:
        Generation rows in the dataset's order.
    """
    by_row = questions_of(rows, prompt)
    questions = [question for row in by_row for question in row]
    answers = [question.as_row() for question in questions]
    contexts = [question.context for question in questions]
    for positions, responses in in_batches(model, prompt, contexts, settings, seed):
        for position, response in zip(positions, responses, strict=True):
            answers[position] |= {
                "response": response.text,
                "stopped_by": response.stopped_by,
                "response_tokens": response.tokens,
            }
    if settings.references:
        scores = _reference_scores(model, rows, by_row, settings.tokens_per_step)
        for row, (nll, tokens) in zip(answers, scores, strict=True):
            row |= {"reference_nll": nll, "reference_tokens": tokens}
    if settings.candidates:
        _score_candidates(model, prompt, questions, answers, settings.tokens_per_step)
    return answers


def _reference_scores(
    model: torch.nn.Module, rows: Sequence[dict[str, Any]], by_row: list[list[Question]], tokens_per_step: int
) -> list[tuple[float, int]]:
    """(nats, tokens) of each reference, in order. Those that share a training sequence cost one pass together."""
    sequences = []
    for row, questions in zip(rows, by_row, strict=True):
        for question in questions:
            if question.span is None:
                whole = [*question.context, *question.reference]
                sequences.append(Scored(whole, [(len(question.context), len(whole))]))
        sequences.append(Scored(row["input_ids"], [(start, end) for start, end in row["reply_spans"]]))
    return [score for scores in span_nll(model, sequences, tokens_per_step) for score in scores]


def _score_candidates(
    model: torch.nn.Module,
    prompt: Prompt,
    questions: list[Question],
    answers: list[dict[str, Any]],
    tokens_per_step: int,
) -> None:
    """Adds candidate_nll, [nll, tokens] of each candidate, where the data offers candidates."""
    sequences, owners = [], []
    for index, question in enumerate(questions):
        for text in question.candidates:
            reply = prompt.reply_ids(text)
            start = len(question.context)
            sequences.append(Scored([*question.context, *reply], [(start, start + len(reply))]))
            owners.append(index)
    for index, scores in zip(owners, span_nll(model, sequences, tokens_per_step), strict=True):
        answers[index].setdefault("candidate_nll", []).append(list(scores[0]))


def write_answers(
    model: torch.nn.Module,
    prompt: Prompt,
    dataset: Dataset,
    settings: Generation,
    seed: int,
    path: Path,
    identity: str,
) -> Iterator[int]:
    """Answers a split into a JSONL file, which appears when it is complete.

    Until then the rows stand in a partial file beside it, shard after shard; the same call goes on after the last
    complete shard, if `identity` is the same.

    Args:
        dataset: rows of the split, in the order of the file.
        seed: of sampling.
        path: SPLIT.SYSTEM.jsonl.
        identity: hash of all that decides the answers.

    Yields:
        Dialogues done, after each shard; those of an earlier call first.
    """
    partial = path.with_name(f".{path.name}.partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    done = _keep_complete_shards(partial, identity, dataset)
    yield done
    while done < len(dataset):
        rows = [dataset[i] for i in range(done, min(done + SHARD, len(dataset)))]
        answers = answer(model, prompt, rows, settings, [seed, done])
        lines = [json.dumps(row, ensure_ascii=False, allow_nan=False) for row in answers]
        done += len(rows)
        with open(partial, "a", encoding="utf-8") as file:
            file.write("\n".join([*lines, json.dumps({"dialogues_done": done})]) + "\n")
            file.flush()
            os.fsync(file.fileno())
        yield done
    with open(partial, encoding="utf-8") as file, write_atomically(path) as whole:
        next(file)
        whole.writelines(line for line in file if not line.startswith('{"dialogues_done"'))
    partial.unlink()


def _keep_complete_shards(partial: Path, identity: str, dataset: Dataset) -> int:
    """Cuts a partial file behind its last complete shard, or begins it anew. Returns the dialogues that are done."""
    header = json.dumps({"identity": identity, "dialogues": len(dataset)}) + "\n"
    kept, done, end = header.encode(), 0, len(header.encode())
    content = partial.read_bytes() if partial.exists() else b""
    if content.startswith(kept):
        position = end
        for line in content[end:].splitlines(keepends=True):
            position += len(line)
            if line.startswith(b'{"dialogues_done"') and line.endswith(b"\n"):
                done, end = int(json.loads(line)["dialogues_done"]), position
        kept = content[:end]
    if kept != content:
        partial.write_bytes(kept)
    return done
