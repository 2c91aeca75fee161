"""The conversation in a terminal, or over a pipe: lines in, answers out as they are made."""

from __future__ import annotations

import contextlib
import difflib
import shutil
import signal
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path

from kestrel.chat.conversation import Conversation, Exchange, System, read_persona, save, sentences
from kestrel.chat.sampling import changed, described
from kestrel.chat.streaming import EMPTY, Speaker
from kestrel.config.settings import Generation
from kestrel.errors import Interrupted, KestrelError

HELP = """\
/persona                    show the person, and type in another one
/persona FILE               be the person of a text file with one sentence a line; the conversation begins anew
/persona ONE. | TWO.        be the person of these sentences, parted by |
/reset                      begin anew as the same person
/undo                       take back your last message and its answer
/compare [MESSAGE]          adapter and base side by side on your next message, or on this one; the conversation
                            goes on from the one that talks
/system adapter|base        who talks
/set [NAME VALUE]           how answers are made: show it, or change it, as in /set temperature 0.7
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
            "/set": self._set,
            "/save": self._save,
            "/help": lambda rest: print(HELP),
            "/quit": self._quit,
        }

    def run(self) -> None:
        """Talks until the input ends or the user leaves.

        Raises:
            Interrupted: Ctrl-C a second time, or told to end.
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
            except KeyboardInterrupt as error:
                number = error.exit_status - 128 if isinstance(error, Interrupted) else signal.SIGINT
                if warned or number != signal.SIGINT:  # who is told to end by anything but Ctrl-C is not asked again
                    print(flush=True)
                    raise Interrupted(number, "left; what was not saved is gone") from None
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
        began = exchange = Exchange(message, self.system, "")
        shown: _Columns | _Line = _Columns(self.speaker.systems) if compare else _Line(self.system)
        try:
            with contextlib.closing(self.speaker.exchange(began, context, compare, self.chosen)) as growing:
                for exchange in growing:
                    shown.grow(exchange)  # last: what can be seen is known, whenever Ctrl-C comes
            shown.end(exchange)
        except KeyboardInterrupt:
            if exchange.reply:
                self.conversation.exchanges.append(exchange)
                print(" …", end="")
            raise
        if not exchange.reply:
            raise KestrelError(f"{EMPTY}{'' if self.chosen.do_sample else ': /set do_sample true'}")
        self.conversation.exchanges.append(exchange)

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
        elif "|" in rest or (" " in rest and not path_of(rest).is_file()):
            persona = sentences(rest.split("|"), "/persona")
        else:
            persona = read_persona(path_of(rest))
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
        match = [system for system in self.speaker.systems if system == rest.lower()]
        if not match:
            raise KestrelError(f"who can talk here: {', '.join(self.speaker.systems)}; {self.system} does")
        self.system = match[0]
        print(f"({self.system} talks)")

    def _set(self, rest: str) -> None:
        name, _, value = rest.replace("=", " ").replace(": ", " ").partition(" ")
        if value:
            self.chosen = changed(self.chosen, name, value.strip(), self.speaker.most_new_tokens)
        elif name:
            raise KestrelError(f"/set {name} needs a value; /set alone shows what holds")
        print(described(self.chosen))

    def _save(self, rest: str) -> None:
        if not rest:
            raise KestrelError("/save needs the name of a file")
        path = path_of(rest)
        count = save(self.conversation, path)
        print(f"(saved; {path} holds {count:,} conversation{'s' if count > 1 else ''})")

    def _quit(self, rest: str) -> None:
        raise Leaving

    def _show_persona(self) -> None:
        print("The model is this person:")
        for sentence in self.conversation.persona:
            print(f"  {readable(sentence)}")


class _Line:
    """An answer that grows behind the name of who gives it."""

    def __init__(self, system: System):
        self._length = 0
        print(f"{system}> ", end="", flush=True)

    def grow(self, exchange: Exchange) -> None:
        more, self._length = exchange.reply[self._length :], len(exchange.reply)
        print(readable(more), end="", flush=True)

    def end(self, exchange: Exchange) -> None:
        print(flush=True)


class _Columns:
    """Answers that grow side by side, drawn anew each time; without a terminal they are shown when they are done."""

    def __init__(self, systems: Sequence[System]):
        self._nothing = dict.fromkeys(systems, "")
        self._rows = 0

    def grow(self, exchange: Exchange) -> None:
        block = self._block(exchange, "…")
        # What has scrolled out of sight cannot be drawn over.
        if sys.stdout.isatty() and block.count("\n") + 1 < shutil.get_terminal_size().lines:
            self._draw(block)

    def end(self, exchange: Exchange) -> None:
        self._draw(self._block(exchange, "(empty)"))

    def _block(self, exchange: Exchange, nothing: str) -> str:
        return side_by_side({**self._nothing, exchange.system: exchange.reply, **exchange.beside}, nothing)

    def _draw(self, block: str) -> None:
        over = f"\x1b[{self._rows}F\x1b[J" if self._rows else ""
        self._rows = block.count("\n") + 1
        print(f"{over}{block}", flush=True)


def path_of(given: str) -> Path:
    """A path as people type it: in quotation marks perhaps, and with ~ for their home."""
    if len(given) > 1 and given[0] == given[-1] and given[0] in "'\"":
        given = given[1:-1]
    try:
        return Path(given).expanduser()
    except RuntimeError:  # ~ of a user that is not known
        return Path(given)


def readable(text: str) -> str:
    """Text that a terminal cannot mistake for its own control sequences."""
    return "".join(char if char.isprintable() or char == "\n" else "\N{REPLACEMENT CHARACTER}" for char in text)


def side_by_side(answers: dict[System, str], nothing: str = "(empty)") -> str:
    """Answers in columns as wide as the terminal allows, each below who gave it."""
    width = max(20, (shutil.get_terminal_size().columns - 3 * (len(answers) - 1)) // len(answers))
    columns = [
        [f"{system}>", *textwrap.wrap(readable(text) or nothing, width, drop_whitespace=True)]
        for system, text in answers.items()
    ]
    height = max(map(len, columns))
    rows = zip(*(column + [""] * (height - len(column)) for column in columns), strict=True)
    return "\n".join(" │ ".join(cell.ljust(width) for cell in row).rstrip() for row in rows)
