"""What a library raises ends a command with one line; a defect of this project keeps its traceback."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import jinja2
import pytest
from tokenizers import Tokenizer

from runtime_tests.cli import Cli
from tp_runtime.cli import generate


def command_that(monkeypatch: pytest.MonkeyPatch, raises: Any) -> None:
    """Make the command `generate` call a function."""

    def run(_: object) -> int:
        raises()
        return 0

    monkeypatch.setattr(generate, "run", run)


def fails_in_jinja2() -> None:
    """Raise an exception of Python within a library's own code."""
    jinja2.Environment().from_string("{{ 1 // 0 }}").render()


def panics() -> None:
    """Raise the panic of a library that is written in Rust."""
    model = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}
    normalizer = {"type": "Precompiled", "precompiled_charsmap": "AAAA"}
    Tokenizer.from_str(json.dumps({"version": "1.0", "added_tokens": [], "normalizer": normalizer, "model": model}))


def raises_a_librarys_class() -> None:
    raise jinja2.TemplateError("no\x1b[2J\nerror: \ud800")


@pytest.mark.parametrize(
    ("raises", "message"),
    [
        (fails_in_jinja2, "error: jinja2 failed: ZeroDivisionError: "),
        (panics, "error: a library written in Rust failed: PanicException: "),
        (raises_a_librarys_class, r"error: jinja2 failed: TemplateError: no\x1b[2J error: \ud800. Fix: "),
    ],
)
def test_an_exception_of_a_library_is_one_line_and_names_the_library(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, raises: Any, message: str
) -> None:
    command_that(monkeypatch, raises)
    result = cli("generate", "x", "hi")
    assert result.code == 1 and result.out == ""
    assert result.err.startswith(message) and result.err.endswith("Fix: set TP_TRACEBACK=1 to see where\n")
    assert result.err.count("\n") == 1 and result.err.strip().isprintable()


def test_the_traceback_of_a_library_is_kept_on_request(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    command_that(monkeypatch, fails_in_jinja2)
    monkeypatch.setenv("TP_TRACEBACK", "1")
    with pytest.raises(ZeroDivisionError):
        cli("generate", "x", "hi")


def test_a_defect_in_a_call_of_pythons_own_library_keeps_its_traceback(
    cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    command_that(monkeypatch, lambda: json.loads("{"))
    with pytest.raises(json.JSONDecodeError):
        cli("generate", "x", "hi")


def test_too_little_memory_is_one_line(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise MemoryError("Unable to allocate 9 TiB")

    command_that(monkeypatch, fail)
    result = cli("generate", "x", "hi")
    message = "error: there is not enough memory: MemoryError: Unable to allocate 9 TiB\n"
    assert (result.code, result.err) == (1, message)


def test_a_log_message_cannot_steer_the_terminal(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    command_that(monkeypatch, lambda: logging.getLogger("tp_runtime").warning("a %s", "\x1b[2J\nerror: é"))
    assert cli("generate", "x", "hi").err == "warning: a \\x1b[2J\\nerror: é\n"


def test_an_argument_that_is_not_utf_8_is_an_error_of_the_request(cli: Cli, tiny_llama_export: Path) -> None:
    result = cli("generate", tiny_llama_export, "hi \udcff")
    assert result.code == 2
    assert "error: messages: the text is not valid Unicode" in result.err
