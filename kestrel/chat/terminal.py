"""The conversation in a terminal, or over a pipe: lines in, answers out as they are made."""

from __future__ import annotations

import difflib
import shutil
import sys
import textwrap
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from kestrel.chat.conversation import Conversation, Exchange, System, read_persona, save, sentences
from kestrel.chat.speaker import Speaker
from kestrel.errors import Interrupted, KestrelError
from kestrel.settings import Generation

HELP = """\
/persona                    show the person, and type in another one
/persona FILE               be the person of a text file with one sentence a line; the conversation begins anew
/persona ONE. | TWO.        be the person of these sentences, parted by |
/reset                      begin anew as the same person
/undo                       take back your last message and its answer
/compare [MESSAGE]          adapter and base side by side on your next message, or on this one; the conversation
                            goes on from the one that talks
/system adapter|base        who talks
/save FILE                  add the conversation to a file of JSON lines, which preprocess.py reads
/help                       this list
/quit                       leave, as Ctrl-D does; Ctrl-C stops an answer, a second one leaves
A message that begins with a slash: write two."""


class Leaving(Exception):
    """The user is done."""


class Terminal:
    """One conversation, line by line.

    Args:
        speaker: the model.
        conversation: its persona, and nothing said yet.
        system: who talks at first.
        chosen: sampling, lengths and stop strings.
    """

    def __init__(self, speaker: Speaker, conversation: Conversation, system: System, chosen: Generation):
        self.speaker, self.conversation, self.system, self.chosen = speaker, conversation, system, chosen
        self._compare_next = False
        self._told_of_cut = False
        self._commands: dict[str, Callable[[str], None]] = {
            "/persona": self._persona,
            "/reset": self._reset,
            "/undo": self._undo,
            "/compare": self._compare,
            "/system": self._system,
            "/save": self._save,
            "/help": lambda rest: print(HELP),
            "/quit": self._quit,
        }

    def run(self) -> None:
        """Talks until the input ends or the user leaves.

        Raises:
            Interrupted: Ctrl-C a second time.
        """
        if sys.stdin.isatty():
            import readline  # noqa: F401  arrow keys and earlier lines in input()
        self._show_persona()
        print("/help lists the commands.\n")
        warned = False  # whether the next Ctrl-C leaves
        while True:
            try:
                line = self._read("you> ").strip()
                warned = False
                self._handle(line)
            except KeyboardInterrupt:
                if warned:
                    raise Interrupted(2, "left; what was not saved is gone") from None
                warned = True
                print("\n(Ctrl-C again leaves)", flush=True)
            except (Leaving, EOFError):
                break
            except KestrelError as error:
                print(f"({error})", flush=True)

    def _read(self, label: str) -> str:
        """A line of input; one that comes over a pipe is shown, so that what is printed can be read as a dialogue."""
        line = input(label)
        if not sys.stdin.isatty():
            print(line, flush=True)
        return line

    def _handle(self, line: str) -> None:
        if line.startswith("/") and not line.startswith("//"):
            name, _, rest = line.partition(" ")
            if name not in self._commands:
                close = difflib.get_close_matches(name, self._commands, n=1)
                raise KestrelError(f"{name} is no command; {f'did you mean {close[0]}?' if close else 'see /help'}")
            self._commands[name](rest.strip())
        elif line:
            self._say(line.removeprefix("/") if line.startswith("//") else line)

    # -- talking -------------------------------------------------------------------------------------------------

    def _say(self, message: str) -> None:
        compare, self._compare_next = self._compare_next, False
        context, cut = self.speaker.context(self.conversation.dialogue(message))
        if cut and not self._told_of_cut:
            print(f"(the first {cut} turns no longer fit into prompt.max_length; from here on the oldest are left out)")
            self._told_of_cut = True
        exchange = Exchange(message, self.system, "")
        try:
            if compare:
                answers = {system: self._whole(context, system) for system in self.speaker.systems}
                print(side_by_side(answers), flush=True)
                exchange = replace(exchange, reply=answers.pop(self.system), beside=answers)
            else:
                print(f"{self.system}> ", end="", flush=True)
                for text in self.speaker.answer(context, self.system, self.chosen):
                    more, exchange = text[len(exchange.reply) :], replace(exchange, reply=text)
                    print(readable(more), end="", flush=True)  # last: what can be seen is known, whenever Ctrl-C comes
                print(flush=True)
        except KeyboardInterrupt:
            if exchange.reply:
                self.conversation.exchanges.append(exchange)
                print(" …", end="")
            raise
        if not exchange.reply:
            raise KestrelError("the answer is empty: it ended before it began; your message is taken back")
        self.conversation.exchanges.append(exchange)

    def _whole(self, context: list[int], system: System) -> str:
        text = ""
        for text in self.speaker.answer(context, system, self.chosen):
            pass
        return text

    # -- commands ------------------------------------------------------------------------------------------------

    def _persona(self, rest: str) -> None:
        if not rest:
            self._show_persona()
            print("Type another, one sentence a line; an empty line ends it, or keeps this one.")
            lines: list[str] = []
            while line := self._read("  ").strip():
                lines.append(line)
            if not lines:
                return
            persona = sentences(lines, "/persona")
        elif "|" in rest or (" " in rest and not Path(rest).is_file()):
            persona = sentences(rest.split("|"), "/persona")
        else:
            persona = read_persona(Path(rest))
        self._reset("", persona)
        self._show_persona()

    def _reset(self, rest: str, persona: tuple[str, ...] | None = None) -> None:
        self.conversation.reset(persona)
        self._told_of_cut = False
        print("(a new conversation)")

    def _undo(self, rest: str) -> None:
        if not self.conversation.exchanges:
            raise KestrelError("there is nothing to take back")
        print(f"(taken back: {readable(self.conversation.exchanges.pop().message)})")

    def _compare(self, rest: str) -> None:
        if len(self.speaker.systems) < 2:
            raise KestrelError("no adapter is loaded, so there is only the base; see generation.systems")
        self._compare_next = True
        if rest:
            self._say(rest)
        else:
            print("(adapter and base both answer your next message)")

    def _system(self, rest: str) -> None:
        match = [system for system in self.speaker.systems if system == rest]
        if not match:
            raise KestrelError(f"who can talk here: {', '.join(self.speaker.systems)}; {self.system} does")
        self.system = match[0]
        print(f"({self.system} talks)")

    def _save(self, rest: str) -> None:
        if not rest:
            raise KestrelError("/save needs the name of a file")
        count = save(self.conversation, Path(rest).expanduser())
        print(f"(saved; {rest} holds {count:,} conversation{'s' if count > 1 else ''})")

    def _quit(self, rest: str) -> None:
        raise Leaving

    def _show_persona(self) -> None:
        print("The model is this person:")
        for sentence in self.conversation.persona:
            print(f"  {readable(sentence)}")


def readable(text: str) -> str:
    """Text that a terminal cannot mistake for its own control sequences."""
    return "".join(char if char.isprintable() or char == "\n" else "\N{REPLACEMENT CHARACTER}" for char in text)


def side_by_side(answers: dict[System, str]) -> str:
    """Answers in columns as wide as the terminal allows, each below who gave it."""
    width = max(20, (shutil.get_terminal_size().columns - 3 * (len(answers) - 1)) // len(answers))
    columns = [
        [f"{system}>", *textwrap.wrap(readable(text) or "(empty)", width, drop_whitespace=True)]
        for system, text in answers.items()
    ]
    height = max(map(len, columns))
    rows = zip(*(column + [""] * (height - len(column)) for column in columns), strict=True)
    return "\n".join(" │ ".join(cell.ljust(width) for cell in row).rstrip() for row in rows)
