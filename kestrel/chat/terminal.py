"""The conversation in a terminal, or over a pipe: one line of input is one message or command."""

from __future__ import annotations

import contextlib
import difflib
import os
import shutil
import signal
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path

from kestrel.chat.conversation import Conversation, Exchange, System, save
from kestrel.chat.persona import read_persona, split_sentences
from kestrel.chat.sampling import change_setting, settings_in_effect
from kestrel.chat.streaming import EMPTY_ANSWER, ChatModel
from kestrel.config.settings import Generation
from kestrel.errors import Interrupted, KestrelError
from kestrel.runtime.output import steer, visible

HELP = """\
/persona                    show the persona, and type in another one
/persona FILE               take the persona from a text file, one sentence a line; starts a new conversation
/persona ONE. | TWO.        take these sentences, separated by |
/reset                      start a new conversation with the same persona
/undo                       take back your last message and its answer
/compare [MESSAGE]          adapter and base both answer your next message, or this one, side by side; the
                            conversation continues from the answer of the current system
/system adapter|base        choose who answers
/set [NAME VALUE]           show the generation settings, or change one: /set temperature 0.7
/save FILE                  add the conversation to a file of JSON lines, which preprocess.py reads
/help                       this list
/quit                       leave, as Ctrl-D does; Ctrl-C stops an answer, and a second Ctrl-C leaves
To begin a message with a slash, type two."""


class Terminal:
    """One conversation, line by line."""

    def __init__(self, model: ChatModel, persona: tuple[str, ...], settings: Generation):
        self.model, self.conversation, self.settings = model, Conversation(persona), settings
        self.system = model.systems[0]  # the adapter where one is loaded
        self._compare_next = self._warned_of_cut = False
        self._commands: dict[str, Callable[[str], None]] = {
            "/persona": self._persona,
            "/reset": lambda _: self._reset(self.conversation.persona),
            "/undo": self._undo,
            "/compare": self._compare,
            "/system": self._system,
            "/set": self._set,
            "/save": self._save,
            "/help": lambda _: print(HELP),
            "/quit": self._quit,
        }

    def run(self) -> None:
        """Talks until the input ends or the user leaves.

        Raises:
            Interrupted: a second Ctrl-C, or another signal that ends the process.
        """
        if sys.stdin.isatty():
            import readline  # noqa: F401  gives input() arrow keys and a history
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
                if warned or number != signal.SIGINT:  # only Ctrl-C gets a second chance
                    print(flush=True)
                    raise Interrupted(number, "left; what was not saved is lost") from None
                warned = True
                print("\n(Ctrl-C again leaves)", flush=True)
            except EOFError:
                break
            except KestrelError as error:
                print(f"({error})", flush=True)

    def _read(self, label: str) -> str:
        """A line of input; one from a pipe is printed, so that the output reads as a dialogue."""
        line = input(label)
        if not sys.stdin.isatty():
            print(line, flush=True)
        return line

    def _handle(self, line: str) -> None:
        if line.startswith("/") and not line.startswith("//"):
            name, _, rest = line.partition(" ")
            if name not in self._commands:
                close = difflib.get_close_matches(name, self._commands, n=1)
                raise KestrelError(f"unknown command {name}; {f'did you mean {close[0]}?' if close else 'see /help'}")
            self._commands[name](rest.strip())
        elif line:
            self._say(line.removeprefix("/") if line.startswith("//") else line)

    def _say(self, message: str) -> None:
        compare, self._compare_next = self._compare_next, False
        context, cut = self.model.context(self.conversation.dialogue(message))
        if cut and not self._warned_of_cut:
            print(f"(the first {cut} turns no longer fit into prompt.max_length; from here on the oldest are left out)")
            self._warned_of_cut = True
        exchange = Exchange(message, self.system, "")
        view: _Columns | _Line = _Columns(self.model.systems) if compare else _Line(self.system)
        answers = self.model.stream_exchange(exchange, context, compare, self.settings)
        try:
            with contextlib.closing(answers):
                for exchange in answers:
                    view.show(exchange)  # after the assignment: an interrupted exchange keeps all that was shown
            view.show(exchange, is_whole=True)
        except KeyboardInterrupt:
            if exchange.reply:
                self.conversation.exchanges.append(exchange)
                print(" …", end="")
            raise
        if not exchange.reply:
            raise KestrelError(f"{EMPTY_ANSWER}{'' if self.settings.do_sample else ': /set do_sample true'}")
        self.conversation.exchanges.append(exchange)

    # -- commands ------------------------------------------------------------------------------------------------

    def _persona(self, rest: str) -> None:
        if not rest:
            self._show_persona()
            print("Type another persona, one sentence a line. An empty line ends it; alone, it keeps this one.")
            lines: list[str] = []
            while line := self._read("  ").strip():
                lines.append(line)
            if not lines:
                return
            persona = split_sentences(lines, "/persona")
        elif "|" in rest or (" " in rest and not typed_path(rest).is_file()):
            persona = split_sentences(rest.split("|"), "/persona")
        else:
            persona = read_persona(typed_path(rest))
        self._reset(persona)
        self._show_persona()

    def _reset(self, persona: tuple[str, ...]) -> None:
        self.conversation, self._warned_of_cut = Conversation(persona), False
        print("(a new conversation)")

    def _undo(self, rest: str) -> None:
        if not self.conversation.exchanges:
            raise KestrelError("nothing to take back")
        print(f"(taken back: {visible(self.conversation.exchanges.pop().message)})")

    def _compare(self, rest: str) -> None:
        if len(self.model.systems) < 2:
            raise KestrelError("no adapter is loaded, only the base; see generation.systems")
        self._compare_next = True
        if rest:
            self._say(rest)
        else:
            print("(adapter and base both answer your next message)")

    def _system(self, rest: str) -> None:
        systems = {str(system): system for system in self.model.systems}
        if rest.lower() not in systems:
            raise KestrelError(f"/system takes {' or '.join(systems)}; now {self.system} answers")
        self.system = systems[rest.lower()]
        print(f"({self.system} answers)")

    def _set(self, rest: str) -> None:
        name, _, value = rest.replace("=", " ").replace(": ", " ").partition(" ")
        if value:
            self.settings = change_setting(self.settings, name, value.strip(), self.model.most_new_tokens)
        elif name:
            raise KestrelError(f"/set {name} needs a value; /set alone shows the current ones")
        print(settings_in_effect(self.settings))

    def _save(self, rest: str) -> None:
        if not rest:
            raise KestrelError("/save needs the name of a file")
        path = typed_path(rest)
        count = save(self.conversation, path)
        print(f"(saved; {path} holds {count:,} conversation{'s' if count > 1 else ''})")

    def _quit(self, rest: str) -> None:
        raise EOFError

    def _show_persona(self) -> None:
        print("The model speaks as this persona:")
        for sentence in self.conversation.persona:
            print(f"  {visible(sentence)}")


class _Line:
    """An answer that grows after the name of its system."""

    def __init__(self, system: System):
        self._length = 0
        print(f"{system}> ", end="", flush=True)

    def show(self, exchange: Exchange, is_whole: bool = False) -> None:
        more, self._length = exchange.reply[self._length :], len(exchange.reply)
        print(visible(more), end="\n" if is_whole else "", flush=True)


class _Columns:
    """Answers that grow side by side, drawn over each time; without a terminal they are printed once, at the end."""

    def __init__(self, systems: Sequence[System]):
        self._systems, self._rows = systems, 0

    def show(self, exchange: Exchange, is_whole: bool = False) -> None:
        placeholder = "(empty)" if is_whole else "…"
        block = side_by_side({system: exchange.replies.get(system) or placeholder for system in self._systems})
        rows = block.count("\n") + 1
        # What has scrolled out of sight cannot be drawn over.
        if is_whole or (sys.stdout.isatty() and rows < shutil.get_terminal_size().lines):
            if self._rows:
                steer(f"\x1b[{self._rows}F\x1b[J")
            print(block, flush=True)
            self._rows = rows


def typed_path(text: str) -> Path:
    """A path as people type it: perhaps in quotation marks, or with ~ for their home."""
    if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
        text = text[1:-1]
    return Path(os.path.expanduser(text))  # Path.expanduser raises if the user is unknown


def side_by_side(answers: dict[System, str]) -> str:
    """Answers in columns as wide as the terminal allows, each below its system's name."""
    width = max(20, (shutil.get_terminal_size().columns - 3 * (len(answers) - 1)) // len(answers))
    columns = [[f"{system}>", *textwrap.wrap(visible(text), width)] for system, text in answers.items()]
    height = max(map(len, columns))
    rows = zip(*(column + [""] * (height - len(column)) for column in columns), strict=True)
    return "\n".join(" │ ".join(cell.ljust(width) for cell in row).rstrip() for row in rows)
