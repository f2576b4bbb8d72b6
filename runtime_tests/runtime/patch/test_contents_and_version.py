"""A file whose version or method contradicts what it holds is refused, and is never written."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from runtime_tests.patches import random_config, random_patch
from runtime_tests.runtime.patch.test_kv_prefix import arrays
from tp_runtime.errors import PatchError, PatchFormatError
from tp_runtime.patch import KVPrefix, Patch
from tp_runtime.patch.config import METHODS, WITHOUT_DELTAS, WITHOUT_PREFIX

PREFIX = KVPrefix(arrays(), (1, 2), 5)


def rewritten(file: Path, version: str | None = None, **config: object) -> Path:
    """Replace the version of a patch file, or values of its config, in the file's header."""
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    metadata = header["__metadata__"]
    metadata["version"] = version or metadata["version"]
    changed = {**json.loads(metadata["config"]), **config}
    metadata["config"] = json.dumps({key: value for key, value in changed.items() if value is not None})
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])
    return file


def saved(path: Path, deltas: bool, prefix: bool) -> Path:
    patch = Patch(
        random_patch().deltas if deltas else {},
        random_config(method="output" if deltas else "prefix"),
        PREFIX if prefix else None,
    )
    patch.save(path / "p.safetensors")
    return path / "p.safetensors"


@pytest.mark.parametrize(("deltas", "prefix", "version"), [(True, True, "1"), (False, True, "1"), (True, False, "2")])
def test_a_version_that_does_not_fit_the_contents_is_refused(tmp_path, deltas, prefix, version):
    file = saved(tmp_path, deltas, prefix)
    Patch.load(file)
    with pytest.raises(PatchFormatError, match=rf"the version does not fit.*got '{version}'"):
        Patch.load(rewritten(file, version))


@pytest.mark.parametrize("prefix", [False, True])
def test_version_1_with_half_of_a_kv_prefix_is_refused(tmp_path, prefix):
    """The description without the tensors, and the tensors without the description."""
    description = None if prefix else {"replaces": [1], "position": 5}
    with pytest.raises(PatchFormatError, match="the version does not fit"):
        Patch.load(rewritten(saved(tmp_path, True, prefix), "1", prefix=description))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("deltas", "prefix"), [(True, False), (False, True), (True, True)])
def test_a_method_loads_only_with_what_it_makes(tmp_path, method, deltas, prefix):
    file = rewritten(saved(tmp_path, deltas, prefix), method=method)
    possible = deltas != (method in WITHOUT_DELTAS) and not (prefix and method in WITHOUT_PREFIX)
    if possible:
        assert Patch.load(file).config.method == method
        return
    with pytest.raises(PatchFormatError, match=rf"config\.method.*got '{method}' with"):
        Patch.load(file)


def test_a_contradiction_is_not_written(tmp_path):
    patch = random_patch()
    for wrong in (
        Patch(patch.deltas, replace(patch.config, method="prefix")),
        Patch({}, patch.config, PREFIX),
        Patch(patch.deltas, replace(patch.config, method="imported"), PREFIX),
    ):
        with pytest.raises(PatchFormatError, match=r"config\.method"):
            wrong.save(tmp_path / "p.safetensors")
    assert not list(tmp_path.iterdir())


def test_what_the_algebra_makes_can_be_saved_and_loaded(tmp_path):
    patch, entries = random_patch(1), Patch({}, random_config(method="prefix"), PREFIX)
    for made in (patch + entries, entries + patch, 0.5 * patch, patch - patch, patch.truncate(1), entries + 0 * patch):
        made.save(tmp_path / "p.safetensors", "f32")
        assert Patch.load(tmp_path / "p.safetensors").identity == made.identity
    with pytest.raises(PatchError):
        (0 * entries).save(tmp_path / "p.safetensors")
