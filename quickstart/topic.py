"""What a topic of the invented world consists of."""

from __future__ import annotations

from dataclasses import dataclass

Value = dict[str, str]


@dataclass(frozen=True)
class Topic:
    """One thing that can be said about a person. Sentence forms are format strings over the fields of a value.

    Attributes:
        word: what the topic is called in a heading.
        values: all values; all have the same fields.
        facts: how a persona states it.
        asks: pairs (questions, reply); the reply answers every question of its pair.
        follow: (question, reply) that may follow an answer on this topic.
        tell: (what the partner says, reply); fields of the partner's own value are `their_...`.
        none: reply when the persona says nothing about the topic.
        greet: what the owner adds to a greeting when this is the persona's first topic.
        bye: what the owner adds to a farewell when this is the persona's last topic.
        portrait: third-person statements about {name}, only in the base's texts.
        restated: the same in other words, only in the base's texts.
        diary: first-person restatements, only in the base's texts.
    """

    word: str
    values: tuple[Value, ...]
    facts: tuple[str, ...]
    asks: tuple[tuple[tuple[str, ...], str], ...]
    follow: tuple[str, str]
    tell: tuple[str, str]
    none: str
    greet: str
    bye: str
    portrait: tuple[str, ...]
    restated: tuple[str, ...]
    diary: tuple[str, ...]


def table(fields: str, rows: str) -> tuple[Value, ...]:
    """Values from rows `a | b | c`, separated by `;`, under the blank-separated field names."""
    names = fields.split()
    return tuple(dict(zip(names, (cell.strip() for cell in row.split("|")), strict=True)) for row in rows.split(";"))
