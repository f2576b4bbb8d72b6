"""Random damage to a valid patch file: the file still loads as a valid patch, or loading it raises a PatchError."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime_tests.patches import random_config, random_patch
from runtime_tests.runtime.patch.test_kv_prefix import arrays
from tp_runtime.errors import PatchError, PatchFormatError
from tp_runtime.patch import KVPrefix, Patch

FUZZ = settings(max_examples=250, deadline=None)


@pytest.fixture(scope="module", params=["weights in f16", "weights and entries in i8", "weights and entries in i4"])
def valid(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("fuzz") / "p.safetensors"
    patch = random_patch(layers=1, ranks=2, inputs=4, outputs=3, sites=("gate", "mlp_out"))
    dtype = request.param.rpartition(" ")[2]
    if dtype != "f16":
        patch = Patch(patch.deltas, random_config(stop=("\n",)), KVPrefix(arrays(layers=1), (1, 2), 5))
    patch.save(path, dtype)
    return path.read_bytes()


def load_or_refuse(folder: Path, content: bytes) -> None:
    """Assert that a damaged file raises a PatchError or loads as a patch that can be added and saved."""
    path = folder / "damaged.safetensors"
    path.write_bytes(content)
    try:
        patch = Patch.load(path)
    except PatchError:
        return
    other = patch if patch.prefix is not None else patch + 0.5 * patch
    other.save(folder / "again.safetensors", dtype="f32")
    patch.save(folder / "again.safetensors")
    assert Patch.load(folder / "again.safetensors").nbytes == patch.rounded(patch.dtype).nbytes


@FUZZ
@given(st.data())
def test_flipped_bytes_load_or_raise_a_patch_error(tmp_path_factory, valid, data):
    content = bytearray(valid)
    header = 8 + int.from_bytes(valid[:8], "little")
    for _ in range(data.draw(st.integers(1, 4))):
        # Half of the flips are in the header, where most of them break the file.
        end = data.draw(st.sampled_from([8, header, header, len(content)]))
        content[data.draw(st.integers(0, end - 1))] = data.draw(st.integers(0, 255))
    load_or_refuse(tmp_path_factory.getbasetemp(), bytes(content))


@FUZZ
@given(st.data())
def test_cuts_and_insertions_load_or_raise_a_patch_error(tmp_path_factory, valid, data):
    at = data.draw(st.integers(0, len(valid)))
    cut = data.draw(st.integers(0, 64))
    content = valid[:at] + data.draw(st.binary(max_size=16)) + valid[at + cut :]
    if data.draw(st.booleans()):  # the length is corrected, so that the damage reaches the JSON parser
        end = content.rfind(b"}") + 1
        content = max(end - 8, 0).to_bytes(8, "little") + content[8:]
    load_or_refuse(tmp_path_factory.getbasetemp(), content)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@FUZZ
@given(st.data())
def test_any_json_value_in_any_place_loads_or_raises_a_patch_error(tmp_path_factory, valid, data):
    """One value anywhere in the header or the config is replaced by a value of any JSON type."""
    length = int.from_bytes(valid[:8], "little")
    header = json.loads(valid[8 : 8 + length])
    config = json.loads(header["__metadata__"]["config"])
    objects = (header, config, *header.values(), config["probe"], config.get("prefix", {}))
    places = [(part, key) for part in objects for key in part]
    part, key = random.Random(data.draw(st.integers(0, 10**6))).choice(places)
    part[key] = data.draw(JSON)
    if isinstance(header.get("__metadata__"), dict) and (part, key) != (header["__metadata__"], "config"):
        header["__metadata__"]["config"] = json.dumps(config)
    text = json.dumps(header).encode()
    load_or_refuse(tmp_path_factory.getbasetemp(), len(text).to_bytes(8, "little") + text + valid[8 + length :])


def test_every_truncation_is_refused(tmp_path, valid):
    for size in range(len(valid)):
        with pytest.raises(PatchFormatError):
            (tmp_path / "p.safetensors").write_bytes(valid[:size])
            Patch.load(tmp_path / "p.safetensors")
