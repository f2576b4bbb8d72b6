"""`tp-runtime chat`: a conversation in which patches are switched on and off."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from ..errors import PatchTargetError, RequestError, TPError
from ..model import PatchedModel
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
from .printing import emit, note, printable

_HELP = """\
/patch FILE[@STRENGTH]...  run under these patches, added up; alone, or with `none`: the base model
/strength S                scale them by S, counted from how /patch gave them; negative turns them round
/reset                     forget the conversation
/help                      this
/quit                      leave (Ctrl-D too)
Anything else is said to the model; //text says /text. Ctrl-C stops an answer."""

_USAGE = "/patch [FILE[@STRENGTH]...], /strength S, /reset, /help or /quit"


def add_parser(subparsers: Any) -> None:
    """Adds the subcommand to the parser."""
    parser = subparsers.add_parser(
        "chat",
        help="talk to a model and switch patches as you go",
        description="Talk to a model. Each line of stdin is a message, or a command:\n\n" + _HELP + "\n\n"
        "To a completion-style model each line is a text of its own to go on from.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model_options(parser)
    add_patch_option(parser)
    parser.add_argument(
        "--system", metavar="TEXT", help="a system message; for a completion-style model, text in front"
    )
    add_sampling_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Talks until stdin ends."""
    options = sampling_options(args)
    selection = read_patches(args.patch)
    chat = Chat(open_model(args), selection, args.system, options)
    note(f"{chat.describe()}. /help lists the commands.")
    lines = _lines()
    while (line := next(lines, None)) is not None:
        try:
            if not chat.take(line):
                break
        except KeyboardInterrupt:  # during a command; an answer sees to its own
            note("interrupted; nothing was changed")
        except BrokenPipeError:
            raise
        except (TPError, OSError) as error:
            note(f"error: {printable(str(error))}")
    return 0


class Chat:
    """A conversation: its messages, what it runs under, and the KV cache of both.

    Args:
        model: the open model.
        selection: what to start under.
        system: the system message.
        options: of every request; see SamplingOptions.

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
        """The model, the device and the patches, in a line."""
        graph = self._model.graph
        return f"{graph.folder.base_model} {graph.folder.precision} on {graph.device.kind}, {self._under()}"

    def take(self, line: str) -> bool:
        """Does what a line says; an error leaves everything as it was.

        Returns:
            False when the conversation is over.

        Raises:
            TPError: a command or a message that cannot be served.
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
                str(error), field="command", got=repr(text), fix='quote names with spaces: "a b"'
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
            raise RequestError("unknown command", field="command", got=got, wanted=_USAGE, fix="/help says more")
        return True

    def _scale(self, strength: float) -> None:
        if not isinstance(self.selection.choice, Patch):
            default = self.selection.applied(self._model.graph.folder)
            problem = "the folder's own patch cannot be scaled" if default else "there is no patch to scale"
            raise PatchTargetError(problem, field="strength", got=strength, fix="/patch FILE first")
        self._switch(self.selection, strength)

    def _switch(self, selection: Selection, strength: float) -> None:
        # Binds the patch, or raises; only then anything is changed. Keys and values made under one patch are wrong
        # under another, so the history is run again, with the next message.
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
        said: list[str] = []
        stopped = False
        try:
            for piece in stream:
                said.append(piece)
                emit(piece)
        except KeyboardInterrupt:
            stopped = True
        finally:
            stream.close()
            emit("\n")
        if stopped:
            note("stopped" if said else "stopped before the first word; the message is forgotten")
        else:
            note_if_cut(stream, self._options["max_new_tokens"])
        if self._remembers and (said or not stopped):
            self.messages = [*messages, {"role": "assistant", "content": "".join(said)}]


def _lines() -> Iterator[str]:
    """The lines of stdin; on a terminal with a prompt and, where there is one, a line editor."""
    if sys.stdin is None:
        return
    if not (sys.stdin.isatty() and sys.stdout is not None and sys.stdout.isatty()):
        if hasattr(sys.stdin, "reconfigure"):
            sys.stdin.reconfigure(errors="surrogateescape")  # bytes that are no UTF-8: the codec refuses them by name
        for line in sys.stdin:
            yield line.rstrip("\r\n")
        return
    with suppress(ImportError):  # Windows has its own editor
        import readline  # noqa: F401 - input() edits lines with it
    while True:
        try:
            yield input("> ")
        except EOFError:
            emit("\n")
            return
        except KeyboardInterrupt:
            note("\n(Ctrl-D or /quit leaves)")
        except UnicodeDecodeError:
            note("error: that line is not valid UTF-8")
