"""Dialogues: prompts that the model cannot run are refused before anything runs, and answers end at a stop string."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from runtime_tests.export.tiny import tiny_model
from tp_export import cli
from tp_export.rollout import Ending, Prompting, dialogues_for
from tp_export.source import Source, load_model, open_source
from tp_runtime.errors import CalibrationError, RequestError


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
        dialogues_for(load_model(source), Prompting(source.codec, context), [query], max_new_tokens=tokens)


def test_the_commands_refuse_an_id_that_the_model_has_no_row_for(
    source: Source, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["verify", str(source.path), "--prompt", "[PAD] hello", "--device", "cpu"]) == 2
    assert "a token id is outside the vocabulary of the model" in capsys.readouterr().err


# -- stop strings --------------------------------------------------------------------------------------------


def test_a_completion_ends_with_the_token_that_completes_the_first_stop_string(tiny_llama: Path) -> None:
    codec = open_source(tiny_llama).codec
    ending = Ending.of(codec, ["->", "\n"])
    texts = {"six\nseven\n": "six\n", "six -> sev": "six ->", "six ->": "six ->", "six": "six"}
    for text, cut in texts.items():  # the tokenizer has one token for each byte
        ids = codec.render(text, raw=True)
        assert codec.decode(ending.cut(ids)) == cut
        assert ending.cut([*ids, 2, 5]) == (*ending.cut(ids), *((2,) if text == "six" else ()))  # 2 ends a text
    assert ending.cut([]) == ()


def test_the_answers_of_dialogues_end_at_the_stop(tiny_llama: Path) -> None:
    source = open_source(tiny_llama)
    model = load_model(source)
    whole = dialogues_for(model, Prompting(source.codec, "Count."), ["a?", "b?"], 8)[0].completion
    stop = source.codec.decode(whole)[3]
    cut = dialogues_for(model, Prompting(source.codec, "Count."), ["a?", "b?"], 8, stop=[stop])[0].completion
    assert cut == Ending.of(source.codec, [stop]).cut(whole) and len(cut) < len(whole)
    with pytest.raises(
        CalibrationError, match=r"^--stop: no answer of the prompted model holds.*got '##'; wanted .* 8"
    ):
        dialogues_for(model, Prompting(source.codec, "Count."), ["a?", "b?"], 8, stop=["##"])
