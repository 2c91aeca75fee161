"""The conversation in a terminal, or over a pipe: one line of input is one message or command."""

from __future__ import annotations

import contextlib
import difflib
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from kestrel.chat.conversation import Conversation, Exchange, load, save
from kestrel.chat.persona import persona_named, save_persona, saved_personas
from kestrel.chat.sampling import change_setting, decoding_of, settings_in_effect
from kestrel.chat.streaming import EMPTY_ANSWER, ChatModel
from kestrel.chat.view import Columns, Line, typed_path, unquoted
from kestrel.config.settings import Generation
from kestrel.data.persona_file import Persona, sentences_of
from kestrel.dialogue import Turn
from kestrel.errors import Interrupted, KestrelError
from kestrel.runtime.output import visible

HELP = """\
/retry                      another answer to your last message
/continue                   go on with an answer that was cut
/edit [N] TEXT              change turn N of /history, or your last message; what came after it is dropped
/undo                       take back your last message and its answer
/history                    the turns so far, with their numbers
/compare [MESSAGE]          adapter and base both answer your next message, or this one, side by side; the
                            conversation continues from the answer of the current system
/system adapter|base        choose who answers
/adapter NAME               answer by another adapter of this base: a folder, or an id on the Hub
/set [NAME VALUE]           show the generation settings, or change one: /set temperature 0.7
/tokens                     tokens of the last prompt and answer
/persona                    show the persona, and type in another one
/persona NAME               take a saved persona, a text file with a sentence a line, or a character card
/persona ONE. | TWO.        take these sentences, separated by |
/keep NAME                  save the persona under a name
/dialogue [ID]              take the persona of this dialogue of generation.split, or of any
/reset                      start a new conversation with the same persona
/save FILE                  add the conversation to a file of JSON lines, which preprocess.py reads
/load FILE [ID]             go on with the last conversation of such a file, or with one of them
/help                       this list
/quit                       leave, as Ctrl-D does; Ctrl-C stops an answer, a second one leaves
To begin a message with a slash, type two."""

FindPersona = Callable[[str | None], Persona]  # by the id of a dialogue


@contextlib.contextmanager
def _unexpected_errors_told() -> Iterator[None]:
    """Turns an error of any type, such as of a GPU without memory, into one that does not end the conversation."""
    try:
        yield
    except (KestrelError, EOFError):
        raise
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise KestrelError(f"unexpected {type(error).__name__}: {visible(reason)}; the conversation goes on") from error


class Terminal:
    """One conversation, line by line."""

    def __init__(
        self,
        model: ChatModel,
        conversation: Conversation,
        settings: Generation,
        find_persona: FindPersona | None = None,
    ):
        self.model, self.conversation, self.settings = model, conversation, settings
        self.system = model.systems[0]  # the adapter where one is loaded
        self._find_persona = find_persona
        self._compare_next = self._warned_of_cut = False
        self._commands: dict[str, Callable[[str], None]] = {
            "/adapter": self._adapter,
            "/compare": self._compare,
            "/continue": self._continue,
            "/dialogue": self._dialogue,
            "/edit": self._edit,
            "/help": lambda _: print(HELP),
            "/history": self._history,
            "/keep": self._keep,
            "/load": self._load,
            "/persona": self._persona,
            "/quit": self._quit,
            "/reset": lambda _: self._start(Conversation(self.conversation.persona)),
            "/retry": self._retry,
            "/save": self._save,
            "/set": self._set,
            "/system": self._system,
            "/tokens": self._tokens,
            "/undo": self._undo,
        }

    def run(self) -> None:
        """Talks until the input ends or the user leaves.

        Raises:
            Interrupted: a second Ctrl-C, or another signal that ends the process.
        """
        if sys.stdin.isatty():
            import readline  # noqa: F401  gives input() arrow keys and a history
        self._show_persona()
        if self.conversation.exchanges:
            self._history("")
        print(f"Answers: {decoding_of(self.settings)}; /set changes it.\n/help lists the commands.\n")
        warned = False  # whether the next Ctrl-C leaves
        while True:
            try:
                line = self._read("you> ").strip()
                warned = False
                with _unexpected_errors_told():
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
        context, cut = self.model.context(self.conversation.dialogue(Turn("partner", message)))
        if cut and not self._warned_of_cut:
            print(f"(the first {cut} turns no longer fit into prompt.max_length; from here on the oldest are left out)")
            self._warned_of_cut = True
        self._answer(Exchange(message, self.system, ""), context, compare)

    def _answer(self, exchange: Exchange, context: Sequence[int], compare: bool, begun: Sequence[int] = ()) -> None:
        """Shows an exchange while it grows, and adds it to the conversation; also what there is of it after Ctrl-C."""
        view: Columns | Line = Columns(self.model.systems) if compare else Line(exchange.system)
        answers = self.model.stream_exchange(exchange, context, compare, self.settings, begun=begun)
        try:
            with contextlib.closing(answers):
                for grown in answers:
                    exchange = grown
                    view.show(exchange)
            view.show(exchange, is_whole=True)
        except KeyboardInterrupt:
            if exchange.reply:
                self.conversation.exchanges.append(replace(exchange, is_cut=True))
                print(" …", end="")
            raise
        if not exchange.reply:
            raise KestrelError(f"{EMPTY_ANSWER}{'' if self.settings.do_sample else ': /set do_sample true'}")
        self.conversation.exchanges.append(exchange)
        if exchange.is_cut:
            print("(cut at max_new_tokens; /continue goes on)")

    # -- commands ------------------------------------------------------------------------------------------------

    def _retry(self, rest: str) -> None:
        last = self._last()
        before = list(self.conversation.exchanges)
        self.conversation.exchanges.pop()
        self._replace(last.message, before)
        if not self.settings.do_sample and self.conversation.exchanges[-1].reply == last.reply:
            print("(the likeliest answer stays the same; /set do_sample true)")

    def _edit(self, rest: str) -> None:
        first, _, text = rest.partition(" ")
        latest = 2 * len(self.conversation.exchanges) - 1
        number, text = (int(first), text.strip()) if first.isdecimal() else (latest, rest)
        before = list(self.conversation.exchanges)
        message = self.conversation.edit(number, text)
        if message is None:
            print(f"(turn {number} is now: {visible(text)})")
        else:
            self._replace(message, before)

    def _replace(self, message: str, before: list[Exchange]) -> None:
        """Answers a message in place of later turns; without an answer, the conversation is again what it was before."""
        kept = len(self.conversation.exchanges)
        try:
            self._say(message)
        finally:
            if len(self.conversation.exchanges) == kept:
                self.conversation.exchanges[:] = before

    def _continue(self, rest: str) -> None:
        context, begun = self.model.continuation(self.conversation)
        before, last = list(self.conversation.exchanges), self.conversation.exchanges.pop()
        try:
            self._answer(last, context, False, begun)
            if self.conversation.exchanges[-1].reply == last.reply:
                print("(the answer had ended; nothing was added)")
        finally:
            if len(self.conversation.exchanges) < len(before):
                self.conversation.exchanges[:] = before

    def _last(self) -> Exchange:
        if not self.conversation.exchanges:
            raise KestrelError("nothing was said yet")
        return self.conversation.exchanges[-1]

    def _history(self, rest: str) -> None:
        for number, (speaker, text) in enumerate(self.conversation.turns(), start=1):
            print(f"{number:>3} {speaker}> {visible(text)}")

    def _tokens(self, rest: str) -> None:
        self._last()
        prompt, answer = self.model.tokens_of(self.conversation)
        print(f"(prompt {prompt:,} of at most {self.model.prompt.max_length:,} tokens, answer {answer:,})")

    def _persona(self, rest: str) -> None:
        if not rest:
            self._show_persona()
            names = ", ".join(saved_personas())
            print(
                f"{f'Saved: {names}. ' if names else ''}Type another persona, one sentence a line. An empty line ends it;"
            )
            print("alone, it keeps this one.")
            lines: list[str] = []
            while line := self._read("  ").strip():
                lines.append(line)
            if not lines:
                return
            persona = Persona(sentences_of(lines, "/persona"))
        elif "|" in rest or (" " in rest and not os.path.isfile(typed_path(rest))):
            persona = Persona(sentences_of(rest.split("|"), "/persona"))
        else:
            persona = persona_named(unquoted(rest))
        self._start(Conversation(persona))
        self._show_persona()

    def _keep(self, rest: str) -> None:
        print(f"(saved as {save_persona(rest, self.conversation.persona.sentences)}; /persona {rest} takes it)")

    def _dialogue(self, rest: str) -> None:
        if self._find_persona is None:
            raise KestrelError("there is no data set")
        self._start(Conversation(self._find_persona(rest or None)))
        self._show_persona()

    def _start(self, conversation: Conversation) -> None:
        self.conversation, self._warned_of_cut = conversation, False
        print("(a new conversation)" if not conversation.exchanges else "(the conversation goes on)")

    def _load(self, rest: str) -> None:
        if not rest:
            raise KestrelError("/load needs the name of a file")
        name, _, dialogue_id = (
            rest.rpartition(" ") if " " in rest and not os.path.isfile(typed_path(rest)) else (rest, "", "")
        )
        self._start(load(typed_path(name), dialogue_id or None))
        self._show_persona()
        self._history("")

    def _undo(self, rest: str) -> None:
        if not self.conversation.exchanges:
            raise KestrelError("nothing to take back")
        print(f"(taken back: {visible(self.conversation.exchanges.pop().message)})")

    def _adapter(self, rest: str) -> None:
        if not rest:
            raise KestrelError("/adapter needs a folder, or an id on the Hub")
        print(f"({self.model.use_adapter(os.path.expanduser(unquoted(rest)))})")
        self.system = "adapter"

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
        for sentence in self.conversation.persona.sentences:
            print(f"  {visible(sentence)}")
        if self.conversation.persona.first_message and not self.conversation.exchanges:
            print(f"{self.system}> {visible(self.conversation.persona.first_message)}")
