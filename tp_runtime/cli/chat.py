"""`tp-runtime chat` runs a conversation in which patches can be switched on and off."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from ..errors import PatchTargetError, RequestError, TPError, printable
from ..model import ACTIVE, PatchedModel
from ..patch import Patch
from ..text import SamplingOptions
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
from .printing import emit, note

_HELP = """\
/patch FILE[@STRENGTH]...  run under the sum of these patches; without a FILE, or with `none`, run the base model
/strength S                scale the strengths given with /patch by S; a negative S inverts the effect
/reset                     forget the conversation
/help                      show this list
/quit                      leave the chat (Ctrl-D does the same)
Every other line is a message to the model; //text sends the message /text. Ctrl-C stops an answer."""

_USAGE = "/patch [FILE[@STRENGTH]...], /strength S, /reset, /help or /quit"


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
    add_sampling_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Talk until stdin ends."""
    options = sampling_options(args)
    selection = read_patches(args.patch)
    chat = Chat(open_model(args), selection, args.system, options)
    note(f"{chat.describe()}. /help lists the commands.")
    lines = _lines()
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
    """A conversation: its messages, the patches that it runs under, and its KV cache.

    Args:
        model: the open model.
        selection: the patches to start under.
        system: the system message.
        options: the sampling options of every request; see SamplingOptions.

    Raises:
        PatchError: the selection does not fit the model.
    """

    def __init__(self, model: PatchedModel, selection: Selection, system: str | None, options: SamplingOptions) -> None:
        self._model, self._system, self._options = model, system, options
        self._remembers = model.codec.style == "chat"
        self.messages: list[dict[str, str]] = []
        self.selection, self.strength = selection, 1.0
        self.cache = model.new_cache(selection.choice)

    def describe(self) -> str:
        """Return the model, the device and the patches, in one line."""
        graph = self._model.graph
        return f"{graph.folder.base_model} {graph.folder.precision} on {graph.device.kind}, {self._under()}"

    def take(self, line: str) -> bool:
        """Run a command or answer a message. An error leaves everything unchanged.

        Args:
            line: a line of input.

        Returns:
            False if the line ends the conversation; otherwise True.

        Raises:
            TPError: the command or the message is not valid.
        """
        if not line.strip():
            return True
        if line.startswith("//"):
            self._answer(line[1:])
        elif line.startswith("/"):
            return self._command(line[1:])
        else:
            self._answer(line)
        return True

    # -- commands ----------------------------------------------------------------------------------------------

    def _command(self, text: str) -> bool:
        try:
            name, *words = shlex.split(text) or [""]
        except ValueError as error:
            raise RequestError(
                str(error), field="command", got=repr(text), fix='put names with spaces in quotes: "a b"'
            ) from None
        if name == "patch":
            self._switch(read_patches([os.path.expanduser(word) for word in words] or [NONE]), 1.0)
        elif name == "strength" and len(words) == 1:
            self._scale(parse_strength(words[0]))
        elif name == "reset" and not words:
            self.cache = self._model.new_cache(self.selection.choice, self.strength)
            self.messages = []
            note("the conversation is forgotten")
        elif name == "help" and not words:
            note(_HELP)
        elif name == "quit" and not words:
            return False
        else:
            got = repr(f"/{text}")
            raise RequestError("the command is unknown", field="command", got=got, wanted=_USAGE, fix="type /help")
        return True

    def _scale(self, strength: float) -> None:
        own = self.selection.choice is ACTIVE and self._model.graph.default_patch is not None
        if not isinstance(self.selection.choice, Patch) and not own:
            fix = "select a patch with /patch FILE first"
            raise PatchTargetError("there is no patch to scale", field="strength", got=strength, fix=fix)
        self._switch(self.selection, strength)

    def _switch(self, selection: Selection, strength: float) -> None:
        # new_cache binds the patch or raises, before anything changes. Keys and values made under one patch are wrong
        # under another, so the history is run again together with the next message.
        cache = self._model.new_cache(selection.choice, strength)
        again = bool(self.messages) and cache.key != self.cache.key
        self.selection, self.strength, self.cache = selection, strength, cache
        note(self._under() + ("; the next answer first runs the conversation again under it" if again else ""))

    def _under(self) -> str:
        return "under " + self.selection.describe(self._model.graph.folder, self.strength)

    # -- answers -----------------------------------------------------------------------------------------------

    def _answer(self, text: str) -> None:
        messages = [*self.messages, {"role": "user", "content": text}]
        try:
            stream = self._model.stream(
                messages if self._remembers else text,
                system=self._system,
                patch=self.selection.choice,
                strength=self.strength,
                cache=self.cache,
                **self._options,
            )
        except RequestError as error:
            if error.field == "prompt" and self.messages:
                note("the conversation has filled the context window: /reset forgets it")
            raise
        answer: list[str] = []
        stopped = False
        try:
            for chunk in stream:
                answer.append(chunk)
                emit(chunk)
        except KeyboardInterrupt:
            stopped = True
        finally:
            stream.close()
            emit("\n")
        if stopped:
            note("stopped" if answer else "stopped before the first word; the message is forgotten")
        else:
            note_if_cut(stream, self._options["max_new_tokens"])
        if self._remembers and (answer or not stopped):
            self.messages = [*messages, {"role": "assistant", "content": "".join(answer)}]


def _lines() -> Iterator[str]:
    """Yield the lines of stdin. On a terminal there is a prompt and, if available, a line editor."""
    if sys.stdin is None:
        return
    if not (sys.stdin.isatty() and sys.stdout is not None and sys.stdout.isatty()):
        if hasattr(sys.stdin, "reconfigure"):
            # Bytes that are not UTF-8 reach the codec, which refuses them with a clear message.
            sys.stdin.reconfigure(errors="surrogateescape")
        for line in sys.stdin:
            yield line.rstrip("\r\n")
        return
    with suppress(ImportError):  # Windows has its own line editor
        import readline  # noqa: F401 - input() uses it to edit lines
    while True:
        try:
            yield input("> ")
        except EOFError:
            emit("\n")
            return
        except KeyboardInterrupt:
            note("\n(type Ctrl-D or /quit to leave the chat)")
        except UnicodeDecodeError:
            note("error: the line is not valid UTF-8")
