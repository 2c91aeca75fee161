"""Make the toy dialogues: persona conversations in the invented world of world.py, from a seed.

    python quickstart/make_dialogues.py
    python quickstart/make_dialogues.py --output /tmp/dialogues --seed 7

Writes train.jsonl, validation.jsonl and test.jsonl in Kestrel's own format. The same seed gives the same bytes. The
splits share no persona, but their personas are made of the same sentences.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from random import Random
from typing import Any

from topic import Value
from topics import TOPICS
from world import (
    FAREWELL_REPLY,
    FAREWELLS,
    GREETING_REPLY,
    GREETING_REPLY_NAMED,
    GREETINGS,
    NAMES,
    RETURNS,
    SMALL_TALK,
    draw_value,
)

SPLITS = {"train": 1000, "validation": 60, "test": 100}
DISTRACTORS = 9  # wrong candidates for each reply of the test split


def draw_persona(rng: Random) -> dict[str, Value]:
    """Three to five topics in random order, each with a value."""
    return {topic: draw_value(topic, rng) for topic in rng.sample(sorted(TOPICS), rng.randint(3, 5))}


def exchange_about(topic: str, persona: dict[str, Value], rng: Random) -> list[tuple[str, str]]:
    """The partner's lines on a topic and the owner's answers: one exchange, or two with a follow-up."""
    forms = TOPICS[topic]
    if topic not in persona:
        return [(rng.choice(forms.asks[0][0]), forms.none)]
    value = persona[topic]
    if rng.random() < 0.2:
        theirs = {f"their_{field}": text for field, text in draw_value(topic, rng).items()}
        return [(forms.tell[0].format(**theirs), forms.tell[1].format(**value, **theirs))]
    questions, answer = rng.choice(forms.asks)
    asked = [(rng.choice(questions), answer.format(**value))]
    if rng.random() < 0.25:
        asked.append((forms.follow[0], forms.follow[1].format(**value)))
    elif rng.random() < 0.2:
        asked[0] = (asked[0][0], f"{asked[0][1]} {rng.choice(RETURNS)}")
    return asked


def converse(persona: dict[str, Value], rng: Random) -> list[tuple[str, str]]:
    """Four to seven exchanges (partner's line, owner's reply): a greeting, topics and small talk, often a farewell."""
    first, last = next(iter(persona)), next(reversed(persona))
    greeting, name = rng.choice(GREETINGS), rng.choice(NAMES)
    reply = GREETING_REPLY_NAMED if "{name}" in greeting else GREETING_REPLY
    opening = (greeting.format(name=name), reply.format(name=name, more=TOPICS[first].greet.format(**persona[first])))
    closing = (rng.choice(FAREWELLS), FAREWELL_REPLY.format(more=TOPICS[last].bye.format(**persona[last])))
    blocks = [exchange_about(topic, persona, rng) for topic in persona]
    if rng.random() < 0.3:
        blocks.append(exchange_about(rng.choice(sorted(set(TOPICS) - set(persona))), persona, rng))
    if rng.random() < 0.3:
        blocks.append([rng.choice(SMALL_TALK)])
    rng.shuffle(blocks)
    target = rng.randint(4, 7)
    ends = rng.random() < 0.6
    exchanges = [opening]
    for block in blocks:
        if len(exchanges) + len(block) + ends <= target:
            exchanges += block
    return exchanges + [closing] * ends


def make_split(name: str, size: int, seen: set[frozenset[str]], rng: Random) -> list[dict[str, Any]]:
    """`size` dialogues with personas that are not in `seen`; adds theirs to it."""
    rows: list[dict[str, Any]] = []
    while len(rows) < size:
        persona = draw_persona(rng)
        # Two personas are the same if they state the same facts, in whatever words and order.
        key = frozenset(" ".join(value.values()) for value in persona.values())
        exchanges = converse(persona, rng)
        if key in seen or len(exchanges) < 4:
            continue
        seen.add(key)
        sentences = [rng.choice(TOPICS[topic].facts).format(**value) for topic, value in persona.items()]
        turns = [
            {"speaker": speaker, "text": text}
            for exchange in exchanges
            for speaker, text in zip(("partner", "self"), exchange, strict=True)
        ]
        identity = f"{name}-{len(rows):04d}"
        rows.append({"dialogue_id": identity, "conversation_id": identity, "persona": sentences, "turns": turns})
    return rows


def add_candidates(rows: list[dict[str, Any]], rng: Random) -> None:
    """Give every reply wrong candidates: replies from other dialogues of the split, none equal to the reference."""
    replies = [[turn["text"] for turn in row["turns"] if turn["speaker"] == "self"] for row in rows]
    for index, row in enumerate(rows):
        others = sorted({text for other, texts in enumerate(replies) if other != index for text in texts})
        row["candidates"] = [
            rng.sample([text for text in others if text != reference], DISTRACTORS) for reference in replies[index]
        ]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "dialogues")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args(argv)
    options.output.mkdir(parents=True, exist_ok=True)
    rng = Random(options.seed)
    seen: set[frozenset[str]] = set()
    # Test first: its bytes do not change when the size of train does.
    for name in ("test", "validation", "train"):
        rows = make_split(name, SPLITS[name], seen, rng)
        if name == "test":
            add_candidates(rows, rng)
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (options.output / f"{name}.jsonl").write_text(text, encoding="utf-8", newline="\n")
        print(
            f"{name}: {len(rows)} dialogues, {sum(len(row['turns']) for row in rows) // 2} replies, {len(text)} bytes"
        )


if __name__ == "__main__":
    main()
