"""The files of a source that an export contains beside the graph: configs, the tokenizer's files, and licences."""

from __future__ import annotations

import json
import shutil
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from runtime_tests.codecs import codec_of
from tp_export.graph import export_model
from tp_export.graph.companions import companion_files
from tp_export.source import compare_ids, licence_files, open_source
from tp_export.source.licences import licence_patterns
from tp_runtime.errors import UnsafePathError
from tp_runtime.session import ModelFolder
from tp_runtime.text import TABLES, build_tables


@pytest.fixture
def copy(tiny_llama: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_llama, tmp_path / "source"))


LICENCES = [
    *("LICENSE", "LICENSE.txt", "LICENCE.md", "License-2.0", "NOTICE", "NOTICE.txt", "THIRD_PARTY_NOTICES.md"),
    *("COPYING", "COPYRIGHT", "GEMMA_TERMS.html", "Llama-3-LICENSE.txt", "USE_POLICY.md", "UNLICENSE", "PATENTS"),
    *("license.txt", "ATTRIBUTIONS"),
]
OTHERS = ["README.md", "model.safetensors", "noticeable.txt", "determs.txt", "vocab.json", "merges.txt", "source.json"]


def test_licences_and_notices_are_found_by_their_names_and_nothing_else_is(tmp_path: Path) -> None:
    for name in (*LICENCES, *OTHERS):
        (tmp_path / name).write_text(name)
    (tmp_path / "LICENSES").mkdir()  # a folder cannot be listed in patch_slots.json
    assert licence_files(tmp_path) == sorted(LICENCES)
    patterns = licence_patterns()  # a hub model is downloaded with them
    assert all(any(fnmatchcase(name, pattern) for pattern in patterns) for name in LICENCES)


def test_an_export_contains_the_licences_and_lists_them(copy: Path, tmp_path: Path) -> None:
    for name in ("LICENSE.txt", "NOTICE", "USE_POLICY.md"):
        (copy / name).write_text(f"the {name}")
    out = export_model(open_source(copy), tmp_path / "out")
    files = ModelFolder.open(out, verify=True).files
    for name in ("LICENSE.txt", "NOTICE", "USE_POLICY.md"):
        assert (out / name).read_text() == f"the {name}"
        assert name in files


def test_a_licence_whose_name_cannot_be_listed_is_refused_before_the_trace(copy: Path, tmp_path: Path) -> None:
    (copy / "LICENSE\n.txt").write_text("x")
    with pytest.raises(UnsafePathError, match="not a plain name"):
        export_model(open_source(copy), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_export_has_the_ids_of_transformers_where_the_source_s_tokenizer_json_has_others(
    copy: Path, tmp_path: Path
) -> None:
    """The class of the tokenizer puts a BOS before a text, and tokenizer.json does not."""
    config = json.loads((copy / "tokenizer_config.json").read_text())
    del config["chat_template"]
    config |= {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "unk_token": "<|endoftext|>"}
    (copy / "tokenizer_config.json").write_text(json.dumps(config))
    source = open_source(copy)
    out = export_model(source, tmp_path / "out")
    wanted = AutoTokenizer.from_pretrained(copy)("Hi")["input_ids"]
    assert wanted[0] == 1
    assert codec_of(copy).render("Hi") == wanted[1:]
    codec = codec_of(out)
    assert codec.render("Hi") == source.codec.render("Hi") == wanted
    assert AutoTokenizer.from_pretrained(out)("Hi")["input_ids"] == wanted
    assert compare_ids(codec, out) is None
    assert ModelFolder.open(out, verify=True).base_digest == source.digest


def test_a_healthy_source_s_files_are_copied_byte_for_byte(copy: Path) -> None:
    found = companion_files(open_source(copy))
    tables = found.pop(TABLES)
    assert tables == build_tables(found["tokenizer.json"])
    assert found == {name: (copy / name).read_bytes() for name in found}
    assert set(found) == {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
