"""The model folder: which folders open, and the error of each bad folder."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import shutil
import socket
import stat

import pytest

from runtime_tests.folders import BASE_DIGEST, alter, describe, fill
from tp_runtime.errors import ModelFormatError, UnsafePathError
from tp_runtime.session import DefaultPatch, ModelFolder, Slot, write_slots_file
from tp_runtime.session import model_folder as folder_module
from tp_runtime.session.description import SLOTS_FILE

posix = pytest.mark.skipif(os.name != "posix", reason="needs POSIX files")


@pytest.fixture
def model(tmp_path):
    return fill(tmp_path / "model")


def test_a_written_folder_opens_as_it_was_described(model):
    terms = ((BASE_DIGEST, 0.5), ("f" * 64, -2.0))
    written = describe(model, default_patch=DefaultPatch("pirate", "a" * 64, terms))
    write_slots_file(written)
    opened = ModelFolder.open(model, verify=True)
    assert opened == dataclasses.replace(written, path=opened.path)
    assert opened.slots[1, "mlp_out"] == Slot(1, "mlp_out", 8, 4)
    assert opened.slots[1, "mlp_out"].name == "tp.1.mlp_out"
    assert opened.unlisted == ()


def test_a_folder_opened_by_a_relative_path_keeps_its_absolute_path(model, monkeypatch):
    monkeypatch.chdir(model.parent)
    opened = ModelFolder.open("model")
    monkeypatch.chdir("/")
    assert (opened.path / "model.onnx").read_bytes() == b"graph"


def test_the_graph_digest_depends_only_on_the_graph_and_its_data(model):
    before = ModelFolder.open(model).graph_digest
    (model / "config.json").write_text('{"a": 1}')
    write_slots_file(describe(model, base_model="tests/other"))
    assert ModelFolder.open(model).graph_digest == before
    (model / "model.onnx_data").write_bytes(b"other weights")
    write_slots_file(describe(model))
    assert ModelFolder.open(model).graph_digest != before


def test_unlisted_files_are_reported_and_ignored(model):
    (model / "other.onnx_data").write_bytes(b"x")
    (model / "notes").mkdir()
    assert ModelFolder.open(model).unlisted == ("notes", "other.onnx_data")


# -- missing, truncated and altered files --------------------------------------------------------------------


def test_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(ModelFormatError, match="no such model folder"):
        ModelFolder.open(tmp_path / "nothing")


def test_a_file_instead_of_a_folder_is_refused(model):
    with pytest.raises(ModelFormatError, match="is not a folder"):
        ModelFolder.open(model / "model.onnx")


@pytest.mark.parametrize("name", [SLOTS_FILE, "model.onnx", "model.onnx_data", "config.json"])
def test_a_missing_file_is_named(model, name):
    (model / name).unlink()
    with pytest.raises(ModelFormatError, match=f"{name}: the file is missing"):
        ModelFolder.open(model)


def test_a_truncated_data_file_is_refused(model):
    with (model / "model.onnx_data").open("rb+") as stream:
        stream.truncate(699)
    with pytest.raises(ModelFormatError, match=r"truncated.*got 699 bytes; wanted 700 bytes"):
        ModelFolder.open(model)


def test_a_data_file_with_trailing_bytes_is_refused(model):
    with (model / "model.onnx_data").open("ab") as stream:
        stream.write(b"!")
    with pytest.raises(ModelFormatError, match="wrong size; got 701"):
        ModelFolder.open(model)


def test_an_altered_small_file_is_refused(model):
    (model / "config.json").write_text("[]")
    with pytest.raises(ModelFormatError, match=r"config.json: .*SHA-256 differs"):
        ModelFolder.open(model)


def test_verify_finds_an_altered_large_file(model, monkeypatch):
    monkeypatch.setattr(folder_module, "ALWAYS_HASHED", 100)
    (model / "model.onnx_data").write_bytes(b"WEIGHTS" * 100)
    ModelFolder.open(model)
    with pytest.raises(ModelFormatError, match=r"model.onnx_data: .*SHA-256 differs"):
        ModelFolder.open(model, verify=True)


# -- the description -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (b"", "is not valid JSON"),
        (b"{", "is not valid JSON"),
        (b"\xff\xfe", "is not valid JSON"),
        (b"[" * 100_000, "is not valid JSON"),
        (b'{"format": NaN}', "holds a number that JSON does not have; got NaN"),
        (b"9" * 10_000, "is not valid JSON"),
        (b"[]", "is not a JSON object; got list"),
    ],
    ids=["empty", "cut", "not-utf8", "deep", "nan", "digits", "list"],
)
def test_an_unreadable_description_is_refused(model, text, problem):
    (model / SLOTS_FILE).write_bytes(text)
    with pytest.raises(ModelFormatError, match=f"the description {problem}"):
        ModelFolder.open(model)


def test_a_description_over_the_size_limit_is_refused(model):
    (model / SLOTS_FILE).write_bytes(b" " * (16 * 2**20 + 1))
    with pytest.raises(ModelFormatError, match="is too large"):
        ModelFolder.open(model)


def test_a_duplicate_key_is_refused(model):
    file = model / SLOTS_FILE
    file.write_text(file.read_text().replace('"in": 8', '"in": 8, "in": 9', 1))
    with pytest.raises(ModelFormatError, match="holds a duplicate key; got 'in'"):
        ModelFolder.open(model)


def test_an_unknown_version_is_refused(model):
    alter(model, lambda data: data.update(version=2))
    with pytest.raises(ModelFormatError, match=r"got 2; wanted 1\. Fix: update tp-runtime"):
        ModelFolder.open(model)


def _set(*path_and_value):
    *path, last, value = path_and_value

    def change(data):
        for key in path:
            data = data[key]
        data[last] = value

    return change


BAD = {
    "format": _set("format", "other"),
    "version-type": _set("version", "1"),
    "unknown-key": _set("extra", 1),
    "missing-key": lambda data: data.pop("style"),
    "architecture-type": _set("architecture", None),
    "base-model-escapes": _set("base_model", "\x1b[2J"),
    "base-digest": _set("base_digest", "A" * 64),
    "precision": _set("precision", "fp8"),
    "style": _set("style", "poem"),
    "route": _set("route", "scenic"),
    "layers-zero": _set("layers", 0),
    "layers-bool": _set("layers", True),
    "vocab-float": _set("vocab_size", 64.0),
    "context-huge": _set("context_window", 2**31),
    "kv-list": _set("kv", []),
    "kv-unknown-key": _set("kv", "groups", 1),
    "kv-dtype": _set("kv", "dtype", "bf16"),
    "slots-object": _set("slots", {}),
    "slot-unknown-key": _set("slots", 0, "rank", 4),
    "slot-layer": _set("slots", 0, "layer", 2),
    "slot-site": _set("slots", 0, "site", "attention"),
    "slot-negative": _set("slots", 0, "out", -4),
    "slot-twice": _set("slots", 0, "layer", 1),
    "default-patch-keys": _set("default_patch", {"name": "x"}),
    "default-patch-strength": _set(
        "default_patch", {"name": "x", "identity": "a" * 64, "terms": [["a" * 64, 10**400]], "repair": False}
    ),
    "default-patch-repair": _set("default_patch", {"name": "x", "identity": "a" * 64, "terms": [], "repair": 1}),
    "files-without-graph": lambda data: data["files"].pop("model.onnx"),
    "file-digest": _set("files", "model.onnx", "sha256", "a" * 63),
    "file-bytes-negative": _set("files", "model.onnx", "bytes", -1),
    "file-bytes-overflow": _set("files", "model.onnx", "bytes", 2**63),
    "file-unknown-key": _set("files", "model.onnx", "url", "x"),
}


@pytest.mark.parametrize("change", BAD.values(), ids=BAD.keys())
def test_a_bad_description_is_refused(model, change):
    alter(model, change)
    with pytest.raises(ModelFormatError, match=rf"^{SLOTS_FILE}.*; wanted .* Fix: ") as caught:
        ModelFolder.open(model)
    assert str(caught.value).isprintable()


def test_a_description_that_could_not_be_read_is_not_written(model):
    before = (model / SLOTS_FILE).read_text()
    with pytest.raises(ModelFormatError, match="precision"):
        write_slots_file(describe(model, precision="fp64"))
    assert (model / SLOTS_FILE).read_text() == before
    assert ModelFolder.open(model).unlisted == ()


# -- names and locations: nothing outside the folder is read -------------------------------------------------

UNSAFE_NAMES = {
    "absolute": "/etc/passwd",
    "parent": "../model.onnx_data",
    "parent-alone": "..",
    "subfolder": "sub/model.onnx_data",
    "drive": "C:weights",
    "stream": "model.onnx:hidden",
    "drive-absolute": "C:\\weights",
    "unc": "\\\\server\\share\\weights",
    "unc-slashes": "//server/share/weights",
    "nul": "model.onnx\x00_data",
    "newline": "model\nonnx",
    "escape": "\x1b[2J",
    "empty": "",
}


@pytest.mark.parametrize("name", UNSAFE_NAMES.values(), ids=UNSAFE_NAMES.keys())
def test_an_unsafe_file_name_is_refused(model, name):
    alter(model, lambda data: data["files"].update({name: data["files"]["model.onnx_data"]}))
    with pytest.raises(UnsafePathError, match="is not a plain name") as caught:
        ModelFolder.open(model)
    assert str(caught.value).isprintable()


def test_half_a_surrogate_pair_in_the_description_is_refused(model):
    alter(model, lambda data: data["files"].update({"\ud800": data["files"]["model.onnx_data"]}))
    with pytest.raises(ModelFormatError, match="holds half of a surrogate pair") as caught:
        ModelFolder.open(model)
    assert str(caught.value).isprintable()


def _outside(model, name):
    outside = model.parent / "outside"
    shutil.move(model / name, outside)
    return outside


@posix
@pytest.mark.parametrize("name", [SLOTS_FILE, "model.onnx", "model.onnx_data"])
def test_a_symlink_out_of_the_folder_is_refused(model, name):
    (model / name).symlink_to(_outside(model, name))
    with pytest.raises(UnsafePathError, match=f"{name}: the file resolves outside"):
        ModelFolder.open(model)


@posix
def test_a_symlink_to_a_folder_with_the_same_name_prefix_is_refused(model):
    sibling = fill(model.parent / "model2")
    (model / "model.onnx").unlink()
    (model / "model.onnx").symlink_to(sibling / "model.onnx")
    with pytest.raises(UnsafePathError, match="resolves outside"):
        ModelFolder.open(model)


@posix
def test_a_symlink_within_the_folder_is_followed(model):
    (model / "model.onnx_data").rename(model / "weights")
    (model / "model.onnx_data").symlink_to("weights")
    assert ModelFolder.open(model).unlisted == ("weights",)


@posix
def test_a_symlink_loop_is_refused(model):
    (model / "model.onnx").unlink()
    (model / "model.onnx").symlink_to("model.onnx")
    with pytest.raises(UnsafePathError, match="cannot be resolved"):
        ModelFolder.open(model)


@posix
@pytest.mark.parametrize("name", [SLOTS_FILE, "model.onnx_data"])
def test_a_hard_link_is_refused(model, name):
    os.link(model / name, model.parent / "second name")
    with pytest.raises(UnsafePathError, match=f"{name}: the file has more than one hard link"):
        ModelFolder.open(model)


@posix
@pytest.mark.parametrize("name", [SLOTS_FILE, "model.onnx_data"])
def test_a_fifo_is_refused_without_waiting(model, name):
    (model / name).unlink()
    os.mkfifo(model / name)
    with pytest.raises(UnsafePathError, match="got FIFO"):
        ModelFolder.open(model)


@posix
def test_a_socket_is_refused(model, monkeypatch):
    (model / "config.json").unlink()
    monkeypatch.chdir(model)  # a socket's address must be short, and a relative one always fits
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("config.json")
        with pytest.raises(UnsafePathError, match="got socket"):
            ModelFolder.open(model)


@posix
def test_a_device_is_refused(model):
    (model / "config.json").unlink()
    try:
        os.mknod(model / "config.json", stat.S_IFCHR | 0o600, os.makedev(1, 5))  # /dev/zero, which never ends
    except PermissionError:
        pytest.skip("only root makes device files")
    with pytest.raises(UnsafePathError, match="got device"):
        ModelFolder.open(model)


def test_a_folder_instead_of_a_file_is_refused(model):
    (model / "config.json").unlink()
    (model / "config.json").mkdir()
    with pytest.raises(UnsafePathError, match="got folder"):
        ModelFolder.open(model)


def _as_snapshot(model, inside=""):
    """Move a folder's files into a cache with the layout of the Hugging Face hub's, and returns the snapshot."""
    repository = model.parent / "models--tests--tiny"
    snapshot = repository / "snapshots" / "abc123" / inside
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for file in list(model.iterdir()):
        blob = repository / "blobs" / hashlib.sha256(file.read_bytes()).hexdigest()
        shutil.move(file, blob)
        (snapshot / file.name).symlink_to(os.path.relpath(blob, snapshot))
    return snapshot


@posix
@pytest.mark.parametrize("inside", ["", "int4"])
def test_a_hub_snapshot_opens(model, inside):
    snapshot = _as_snapshot(model, inside)
    assert ModelFolder.open(snapshot, verify=True).path == snapshot.resolve()


@posix
def test_the_blobs_of_a_hub_snapshot_may_have_hard_links(model):
    snapshot = _as_snapshot(model)
    os.link((snapshot / "model.onnx_data").resolve(), model / "shared with another cache")
    ModelFolder.open(snapshot)


@posix
def test_a_hub_snapshot_with_a_symlink_out_of_its_own_blobs_is_refused(model):
    snapshot = _as_snapshot(model)
    shutil.move((snapshot / "model.onnx").resolve(), model / "elsewhere")
    (snapshot / "model.onnx").unlink()
    (snapshot / "model.onnx").symlink_to(model / "elsewhere")
    with pytest.raises(UnsafePathError, match="resolves outside"):
        ModelFolder.open(snapshot)


@posix
def test_blobs_next_to_a_folder_that_is_not_a_snapshot_are_refused(model):
    blobs = model.parent / "blobs"
    blobs.mkdir()
    shutil.move(model / "model.onnx", blobs / "x")
    (model / "model.onnx").symlink_to("../blobs/x")
    with pytest.raises(UnsafePathError, match="resolves outside"):
        ModelFolder.open(model)
