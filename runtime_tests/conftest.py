"""Fixtures for every test. Nothing here needs torch, because the edge tests run without it."""

from __future__ import annotations

import os

import pytest

from runtime_tests.cli import Cli

# The tests never ask a hub: their models are committed, made by a test, or fetched through pip. This is set
# before any conftest below this one imports transformers.
os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    """The command line of the runtime, run in the process of the test."""
    return Cli(monkeypatch, capsys)
