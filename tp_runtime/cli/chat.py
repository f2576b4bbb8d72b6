"""`tp-runtime chat` runs a conversation in which patches can be switched on and off."""

from __future__ import annotations

import argparse
import os
import shlex
from typing import Any

from ..chat import ChatSession, ChatStream, Overflow
from ..errors import PatchTargetError, RequestError, TPError, printable
from ..model import ACTIVE, PatchedModel, TextStream
from ..patch import Patch
from ..text import SamplingOptions
from .continuations import Continuations
from .lines import read_lines
from .options import (
    NONE,
    Selection,
    add_model_options,
    add_patch_option,
    add_sampling_options,
    note_if_cut,
    open_model,
    parse_strength,
    read_patches,
    sampling_options,
)
from .printing import emit, note, plural

_HELP = """\
/patch FILE[@STRENGTH]...  run under the sum of these patches; without a FILE, or with `none`, run the base model
/strength S                scale the strengths given with /patch by S; a negative S inverts the effect
/system TEXT               set the system message; without TEXT, remove it
/retry                     answer the last message again
/undo                      take the last message back, and its answer
/save FILE                 save the conversation
/load FILE                 go on with a saved conversation, under the patches selected here
/reset                     forget the conversation
/help                      show this list
/quit                      leave the chat (Ctrl-D does the same)
Everything else is a message to the model; //text sends the message /text. Ctrl-C stops an answer and keeps what was
said. On a terminal, with the extra [chat], Alt-Enter begins a new line of a message, and the arrow keys find earlier
ones."""

_USAGE = (
    "/patch [FILE[@STRENGTH]...], /strength S, /system [TEXT], /retry, /undo, /save FILE, /load FILE, /reset, /help or "
    "/quit"
)


def add_parser(subparsers: Any) -> None:
    """Add the subcommand to the parser."""
    parser = subparsers.add_parser(
        "chat",
        help="talk to a model, and switch patches during the conversation",
        description="Talk to a model. Each line of stdin is a message, or a command:\n\n" + _HELP + "\n\n"
        "A completion-style model does not remember the conversation: it continues each line separately.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model_options(parser)
    add_patch_option(parser)
    parser.add_argument(
        "--system", metavar="TEXT", help="a system message; for a completion-style model, text in front of each line"
    )
    parser.add_argument(
        "--drop-oldest",
        action="store_true",
        help="when the conversation has filled the context window, answer without its oldest turns instead of refusing "
        "the message",
    )
    add_sampling_options(parser, "model")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Talk until stdin ends."""
    options = sampling_options(args)
    selection = read_patches(args.patch)
    chat = Chat(open_model(args), selection, args.system, options, args.drop_oldest)
    note(f"{chat.describe()}. /help lists the commands.")
    lines = read_lines()
    while (line := next(lines, None)) is not None:
        try:
            if not chat.take(line):
                break
        except KeyboardInterrupt:  # Ctrl-C during a command; `_answer` handles Ctrl-C during an answer
            note("interrupted; nothing was changed")
        except BrokenPipeError:
            raise
        except (TPError, OSError) as error:
            note(f"error: {printable(str(error))}")
    return 0


class Chat:
    """A conversation as the command line sees it: entries go in, and answers and notes are printed.

    Args:
        model: the open model.
        selection: the patches to start under.
        system: the system message.
        options: the sampling options of every answer; see SamplingOptions.
        drop_oldest: whether to answer without the oldest turns when the context window is full.

    Attributes:
        session: the chat itself; with a completion-style model, what continues each line.

    Raises:
        RequestError: the system message does not go with the patches or the model.
        PatchError: the selection does not fit the model.
    """

    def __init__(
        self,
        model: PatchedModel,
        selection: Selection,
        system: str | None,
        options: SamplingOptions,
        drop_oldest: bool = False,
    ) -> None:
        self._model, self._options = model, options
        self._overflow: Overflow = "drop_oldest" if drop_oldest else "error"
        self.selection, self.strength = selection, 1.0
        self.session: ChatSession | Continuations
        if model.codec.style == "chat":
            self.session = model.chat(system, selection.choice, overflow=self._overflow, **options)
        else:
            self.session = Continuations(model, system, selection.choice, **options)

    def describe(self) -> str:
        """Return the model, the device and the patches, in one line."""
        graph = self._model.graph
        return f"{graph.folder.base_model} {graph.folder.precision} on {graph.device.kind}, {self._under()}"

    def take(self, entry: str) -> bool:
        """Run a command or answer a message. An error leaves everything unchanged.

        Args:
            entry: one or several lines of input.

        Returns:
            False if the entry ends the conversation; otherwise True.

        Raises:
            TPError: the command or the message is not valid.
            OSError: a file cannot be read or written.
        """
        if not entry.strip():
            return True
        if entry.startswith("//"):
            self._answer(entry[1:])
        elif entry.startswith("/"):
            return self._command(entry[1:])
        else:
            self._answer(entry)
        return True

    # -- commands ----------------------------------------------------------------------------------------------

    def _command(self, text: str) -> bool:
        command, _space, rest = text.partition(" ")
        if command == "system":  # its text is taken as it is, quotes and line breaks included
            self._set_system(rest.strip() or None)
            return True
        try:
            name, *words = shlex.split(text) or [""]
        except ValueError as error:
            raise RequestError(
                str(error), field="command", got=repr(text), fix='put names with spaces in quotes: "a b"'
            ) from None
        match name, words:
            case "patch", files:
                self._switch(read_patches([os.path.expanduser(file) for file in files] or [NONE]), 1.0)
            case "strength", [factor]:
                self._scale(parse_strength(factor))
            case "retry", []:
                self._print(self.session.stream_retry(), "the old answer stays")
            case "undo", []:
                self.session.undo()
                note("the last message and its answer are taken back")
            case "save", [file]:
                self.session.save(os.path.expanduser(file))
                note(f"saved to {printable(file)}")
            case "load", [file]:
                self._load(os.path.expanduser(file))
            case "reset", []:
                self.session.clear()
                note("the conversation is forgotten")
            case "help", []:
                note(_HELP)
            case "quit", []:
                return False
            case _:
                got = repr(f"/{text}")
                raise RequestError("the command is unknown", field="command", got=got, wanted=_USAGE, fix="type /help")
        return True

    def _set_system(self, text: str | None) -> None:
        self.session.set_system(text)
        note("there is no system message now" if text is None else "the system message is changed")

    def _scale(self, strength: float) -> None:
        own = self.selection.choice is ACTIVE and self._model.graph.default_patch is not None
        if not isinstance(self.selection.choice, Patch) and not own:
            fix = "select a patch with /patch FILE first"
            raise PatchTargetError("there is no patch to scale", field="strength", got=strength, fix=fix)
        self._switch(self.selection, strength)

    def _switch(self, selection: Selection, strength: float) -> None:
        self.session.switch(selection.choice, strength)
        self.selection, self.strength = selection, strength
        again = "; the next answer first runs the conversation again under it" if self.session.runs_again else ""
        note(self._under() + again)

    def _load(self, file: str) -> None:
        if isinstance(self.session, Continuations):
            self.session.load(file)
        session = self._model.load_chat(file, self.selection.choice, self.strength, self._overflow, **self._options)
        self.session = session
        turns = sum(message["role"] == "user" for message in session.messages)
        note(f"loaded {plural(turns, 'turn')}" + ("" if session.system is None else " and a system message"))
        folder, saved = self._model.graph.folder, session.loaded_from
        terms = tuple((part.identity, part.strength) for part in self.selection.applied(folder, self.strength))
        if saved is not None and saved.terms != terms:
            note(f"the conversation was saved under {printable(saved.describe_patch())}, and goes on {self._under()}")

    def _under(self) -> str:
        return "under " + self.selection.describe(self._model.graph.folder, self.strength)

    # -- answers -----------------------------------------------------------------------------------------------

    def _answer(self, text: str) -> None:
        try:
            stream = self.session.stream(text)
        except RequestError as error:
            if error.field == "prompt" and isinstance(self.session, ChatSession) and self.session.messages:
                note("the conversation has filled the context window: /reset forgets it")
            raise
        self._print(stream, "the message is forgotten")

    def _print(self, stream: ChatStream | TextStream, if_nothing: str) -> None:
        """Print an answer while it is given.

        Args:
            stream: the answer.
            if_nothing: what becomes of the conversation if Ctrl-C comes before the first word.
        """
        kept: bool | None = None  # whether Ctrl-C left a part of the answer; None if it did not come
        try:
            for chunk in stream:
                emit(chunk)
        except KeyboardInterrupt:
            kept = stream.stop() if isinstance(stream, ChatStream) else bool(stream.token_ids)
        finally:
            stream.close()
            emit("\n")
        if kept is None:
            figures = stream.text_stream if isinstance(stream, ChatStream) else stream
            note_if_cut(figures, self._options["max_new_tokens"])
        else:
            note("stopped" if kept else f"stopped before the first word; {if_nothing}")
