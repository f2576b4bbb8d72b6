"""Dialogues: prompts that the model cannot run are refused before anything runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from runtime_tests.export.tiny import tiny_model
from tp_export import cli
from tp_export.rollout import dialogues_for
from tp_export.source import Source, load_model, open_source
from tp_runtime.errors import RequestError


@pytest.fixture
def source(tmp_path: Path) -> Source:
    """A source whose tokenizer has a padding token for which the model has no row: trainers often leave it so."""
    folder = tiny_model(tmp_path / "source", "llama", vocab_size=259, num_hidden_layers=1, max_position_embeddings=128)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "pad_token": "[PAD]"}))
    return open_source(folder)


@pytest.mark.parametrize(
    ("query", "context", "tokens", "message"),
    [
        ("[PAD] hello", "Be kind.", 4, "outside the vocabulary of the model; got 259; wanted an id below 259"),
        ("hello", "Be kind to [PAD].", 4, "outside the vocabulary of the model; got 259"),
        ("hello", "Be kind." * 40, 4, "do not fit the context window; got .* wanted at most 128"),
        ("hello", "Be kind.", 100, "do not fit the context window"),
    ],
)
def test_a_prompt_that_the_model_cannot_run_is_refused(
    source: Source, query: str, context: str, tokens: int, message: str
) -> None:
    with pytest.raises(RequestError, match=message):
        dialogues_for(source, load_model(source), context, [query], max_new_tokens=tokens)


def test_the_commands_refuse_an_id_that_the_model_has_no_row_for(
    source: Source, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["verify", str(source.path), "--prompt", "[PAD] hello", "--device", "cpu"]) == 2
    assert "a token id is outside the vocabulary of the model" in capsys.readouterr().err
