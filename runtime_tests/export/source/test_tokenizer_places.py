"""A source's tokenizer is read from its own folder, although its config could make transformers read it anywhere."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from runtime_tests.runtime.text.test_codec import edit
from tp_export.source import open_source
from tp_runtime.errors import ModelFormatError, UnsafePathError

CONFIG = "tokenizer_config.json"


@pytest.fixture
def other(tiny_gemma: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tokenizer outside the source, in the folder that the test works in."""
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copy(tiny_gemma / "tokenizer.json", tmp_path / "tokenizer.json"))


@pytest.fixture
def source(tiny_llama: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_llama, tmp_path / "source"))


@pytest.mark.parametrize("relative", [False, True])
def test_a_config_that_names_a_tokenizer_elsewhere_is_refused(relative: bool, other: Path, source: Path) -> None:
    """With a relative path one source would have other ids, and another digest, in every working folder."""
    edit(source, CONFIG, tokenizer_file=other.name if relative else str(other))
    with pytest.raises(ModelFormatError, match="names a tokenizer in another place") as error:
        open_source(source)
    assert error.value.field == f"{source / CONFIG} tokenizer_file" and error.value.fix


def test_a_path_of_the_machine_that_saved_the_tokenizer_is_refused_with_the_mend(source: Path) -> None:
    edit(source, CONFIG, tokenizer_file="/home/someone/checkpoint/tokenizer.json")
    with pytest.raises(ModelFormatError, match=r"remove tokenizer_file from tokenizer_config\.json"):
        open_source(source)


@pytest.mark.parametrize("name", ["../tokenizer.4.0.0.json", "/tokenizer.4.0.0.json"])
def test_a_file_for_a_version_of_transformers_outside_the_folder_is_refused(
    name: str, other: Path, source: Path
) -> None:
    other.rename(other.with_name("tokenizer.4.0.0.json"))
    edit(source, CONFIG, fast_tokenizer_files=[name])
    with pytest.raises(UnsafePathError, match="fast_tokenizer_files"):
        open_source(source)


def test_other_paths_in_the_config_are_not_read(source: Path, tiny_llama: Path) -> None:
    """transformers writes and ignores them, and hub models have them."""
    edit(source, CONFIG, special_tokens_map_file="/gone/map.json", name_or_path="/gone", vocab_file="/gone/vocab.json")
    assert open_source(source).digest == open_source(tiny_llama).digest
