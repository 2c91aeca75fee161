"""What a topic of the little world is made of."""

from __future__ import annotations

from dataclasses import dataclass

Value = dict[str, str]


@dataclass(frozen=True)
class Topic:
    """One thing that can be said about a person. Sentence forms are format strings over the fields of a value.

    Attributes:
        word: what the topic is called in a heading.
        values: all values; a value has the same fields as its siblings.
        facts: how a persona states it.
        asks: pairs (questions, reply): every question of a pair is answered by the same form.
        follow: (question, reply) that may come right after an answer about this topic.
        tell: (what the partner says, reply); fields of the partner's own value are `their_...`.
        none: reply when the persona says nothing about it.
        greet: what the owner adds to a greeting when this topic is the first of the persona.
        bye: what the owner adds to a farewell when this topic is the last of the persona.
        portrait: third-person statements about {name}, in the base's texts only.
        retold: third-person restatements about {name}, in the base's texts only.
        diary: first-person restatements, in the base's texts only.
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
    retold: tuple[str, ...]
    diary: tuple[str, ...]


def table(fields: str, rows: str) -> tuple[Value, ...]:
    """Values from rows `a | b | c`, separated by `;`, under the blank-separated field names."""
    names = fields.split()
    return tuple(dict(zip(names, (cell.strip() for cell in row.split("|")), strict=True)) for row in rows.split(";"))
