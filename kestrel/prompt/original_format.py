"""The original project's prompt, character for character, so that its adapter can be scored.

Its script (Falcon-7b-FineTuned, Scripts/Script1.py) put a row of Cynaptics/persona-chat into an indented f-string:

    Persona B: i have two dogs., i like cars.
    (an empty line)
        Conversation:
        ['Persona A: hi ! how are you ?', "Persona B: i'm fine .", 'Persona A: any pets ?']
        <AI>: two dogs .<eos>

The indentation was part of the string. The dialogue is a list of tagged lines and was written as Python writes a list,
with brackets, quotes and escapes. So the text before a reply is not a prefix of the text before the next one, and
only one reply of a dialogue can be supervised in a sequence: the last one, as in the script. There rows were padded with
the end token and padding was not masked, which is how that adapter learned to stop.

Assumed: each line of the dialogue is `Persona A: ` or `Persona B: ` and the text with single blanks, as in the data set.
"""

from __future__ import annotations

from collections.abc import Iterable

from kestrel.dialogue import Turn

_TAGS = {"partner": "Persona A: ", "self": "Persona B: "}


def introduction(persona: Iterable[str]) -> str:
    """The first line. No sentence may contain a line break."""
    return "Persona B: " + ", ".join(persona)


def prompt_text(persona: Iterable[str], history: Iterable[Turn]) -> str:
    """All text before a reply and the space that begins it."""
    lines = [_TAGS[turn.speaker] + turn.text for turn in history]
    return f"{introduction(persona)}\n\n    Conversation:\n    {lines}\n    <AI>:"
