"""Rows of a generations file: every reply of a split, answered, with the likelihoods that the settings ask for."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from kestrel.dataset import dialogue_of
from kestrel.dialogue import Dialogue
from kestrel.errors import ProofError
from kestrel.generation import in_batches
from kestrel.likelihood import Scored, span_nll
from kestrel.prompt import Prompt
from kestrel.settings import Generation

if TYPE_CHECKING:
    from datasets import Dataset

SHARD = 32  # dialogues that are answered together and then written; what an interruption can cost


@dataclass(frozen=True)
class Question:
    """One reply to be made: the prompt's tokens, the reference's, and what the row says besides."""

    dialogue: Dialogue
    turn: int
    context: list[int]
    reference: list[int]
    candidates: tuple[str, ...]

    def as_row(self) -> dict[str, Any]:
        return {
            "dialogue_id": self.dialogue.dialogue_id,
            "turn": self.turn,
            "persona": list(self.dialogue.persona),
            "history": [{"speaker": t.speaker, "text": t.text} for t in self.dialogue.turns[: self.turn]],
            "reference": self.dialogue.turns[self.turn].text,
        }


def questions_of(rows: Sequence[dict[str, Any]], prompt: Prompt) -> list[Question]:
    """Every reply of the given dataset rows, in order.

    A prompt is the training sequence up to the reply. Replies that truncation cut from the sequence are rendered anew.

    Raises:
        ProofError: the prompt renders a dialogue otherwise than the dataset holds it.
    """
    questions = []
    for row, again in zip(rows, prompt.render_all([dialogue_of(row) for row in rows]), strict=True):
        dialogue = dialogue_of(row)
        if isinstance(again, Exception) or again.input_ids != row["input_ids"]:
            raise ProofError(
                f"dialogue {dialogue.dialogue_id}: the prompt that would generate is not the one that trained; "
                "make the dataset again with preprocess.py"
            )
        replies = list(dialogue.replies())
        cut = len(replies) - len(row["reply_spans"])
        for number, (turn, text) in enumerate(replies):
            if number < cut:
                context, reference = prompt.context(dialogue, turn), prompt.reply_ids(text)
            else:
                start, end = row["reply_spans"][number - cut]
                context, reference = row["input_ids"][:start], row["input_ids"][start:end]
            candidates = dialogue.candidates[number] if dialogue.candidates else ()
            questions.append(Question(dialogue, turn, context, reference, candidates))
    return questions


def answer(
    model: torch.nn.Module, prompt: Prompt, rows: Sequence[dict[str, Any]], settings: Generation
) -> list[dict[str, Any]]:
    """Answers every reply of the given dataset rows. Returns generation rows in the dataset's order."""
    questions = questions_of(rows, prompt)
    answers = [question.as_row() for question in questions]
    for positions, responses in in_batches(model, prompt, [question.context for question in questions], settings):
        for position, response in zip(positions, responses, strict=True):
            answers[position] |= {
                "response": response.text,
                "stopped_by": response.stopped_by,
                "response_tokens": response.tokens,
            }
    if settings.references:
        _score_references(model, rows, questions, answers, settings.tokens_per_step)
    if settings.candidates:
        _score_candidates(model, prompt, questions, answers, settings.tokens_per_step)
    return answers


def _score_references(
    model: torch.nn.Module,
    rows: Sequence[dict[str, Any]],
    questions: list[Question],
    answers: list[dict[str, Any]],
    tokens_per_step: int,
) -> None:
    """Adds reference_nll and reference_tokens. References that share a training sequence cost one pass together."""
    sequences, targets = [], []
    first = 0
    for row in rows:
        replies = sum(turn["speaker"] == "self" for turn in row["turns"])
        own = list(range(first, first + replies))
        cut = replies - len(row["reply_spans"])
        for index in own[:cut]:
            question = questions[index]
            whole = [*question.context, *question.reference]
            sequences.append(Scored(whole, [(len(question.context), len(whole))]))
            targets.append([index])
        sequences.append(Scored(row["input_ids"], [(start, end) for start, end in row["reply_spans"]]))
        targets.append(own[cut:])
        first += replies
    for indices, scores in zip(targets, span_nll(model, sequences, tokens_per_step), strict=True):
        for index, (nll, tokens) in zip(indices, scores, strict=True):
            answers[index] |= {"reference_nll": nll, "reference_tokens": tokens}


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
    model: torch.nn.Module, prompt: Prompt, dataset: Dataset, settings: Generation, path: Path, identity: str
) -> Iterator[int]:
    """Answers a split into a JSONL file, which appears when it is complete.

    Until then the rows stand in a partial file beside it, shard after shard; the same call goes on after the last
    complete shard, if `identity` is the same.

    Args:
        dataset: rows of the split, in the order of the file.
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
        lines = [json.dumps(row, ensure_ascii=False, allow_nan=False) for row in answer(model, prompt, rows, settings)]
        done += len(rows)
        with open(partial, "a", encoding="utf-8") as file:
            file.write("\n".join([*lines, json.dumps({"dialogues_done": done})]) + "\n")
            file.flush()
            os.fsync(file.fileno())
        yield done
    with open(partial, encoding="utf-8") as file, open(f"{partial}.whole", "w", encoding="utf-8") as whole:
        next(file)
        whole.writelines(line for line in file if not line.startswith('{"dialogues_done"'))
        whole.flush()
        os.fsync(whole.fileno())
    os.replace(f"{partial}.whole", path)
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
