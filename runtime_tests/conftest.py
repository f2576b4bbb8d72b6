"""What every test may use. Nothing here needs torch: the edge tests run where it is not installed."""

from __future__ import annotations

import os

import pytest

from runtime_tests.cli import Cli

# The tests never ask a hub; what they need is committed, made here, or fetched through pip and npm. Set before any
# conftest below this one imports transformers.
os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    """The command line of the runtime, in this process."""
    return Cli(monkeypatch, capsys)
