"""The name of a base: the hub's id, the folder's name, or what source.json says, and always printable."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tp_export.source import open_source
from tp_runtime.errors import ModelFormatError

SHA = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def snapshot(tiny_llama: Path, tmp_path: Path) -> Path:
    """Return a snapshot in a hub cache, whose files are links to blobs."""
    repository = tmp_path / "hub" / "models--acme--tiny-1.0"
    folder = repository / "snapshots" / SHA
    folder.mkdir(parents=True)
    (repository / "blobs").mkdir()
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(SHA)
    for file in tiny_llama.iterdir():
        if file.name != "source.json":
            shutil.copy(file, repository / "blobs" / file.name)
            (folder / file.name).symlink_to(f"../../blobs/{file.name}")
    return folder


def test_a_hub_id_names_the_model(snapshot: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    asked = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **_: asked.append(name) or str(snapshot))
    assert open_source("acme/tiny-1.0").name == "acme/tiny-1.0" and asked == ["acme/tiny-1.0"]


def test_a_path_into_the_cache_names_the_model(snapshot: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine").symlink_to(snapshot)
    monkeypatch.chdir(snapshot)
    for path in (snapshot, tmp_path / "mine", Path(".")):
        assert open_source(path).name == "acme/tiny-1.0"


def test_a_model_without_an_owner_and_other_folders_keep_their_names(snapshot: Path, tmp_path: Path) -> None:
    old = Path(shutil.copytree(snapshot, tmp_path / "hub" / "models--gpt2" / "snapshots" / SHA))
    assert open_source(old).name == "gpt2"
    for place in ("snapshots/mine", "models--a--b/other/mine", "mine"):
        assert open_source(Path(shutil.copytree(snapshot, tmp_path / place))).name == "mine"


def test_the_name_is_not_part_of_the_digest(snapshot: Path, tmp_path: Path) -> None:
    assert open_source(snapshot).digest == open_source(shutil.copytree(snapshot, tmp_path / "mine")).digest


@pytest.mark.parametrize("name", ["two\nlines", "bell\a", "\x1b[31mred", "right\u202eleft", "\u2028"])
def test_a_name_that_is_not_printable_is_refused_and_escaped(name: str, snapshot: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(snapshot, tmp_path / "named"))
    (folder / "source.json").write_text(json.dumps({"name": name}))
    with pytest.raises(ModelFormatError, match=r"source\.json name: the name of the model is not printable") as caught:
        open_source(folder)
    assert str(caught.value).isprintable()


def test_half_of_a_surrogate_pair_in_a_name_is_refused_with_the_file(snapshot: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(snapshot, tmp_path / "named"))
    (folder / "source.json").write_text(json.dumps({"name": "half\ud800"}))
    with pytest.raises(ModelFormatError, match=r"source\.json: the file holds half of a surrogate pair"):
        open_source(folder)


@pytest.mark.parametrize(
    "name", ["two\nlines", "\x1b[31mred", "tab\there", b"not \xff UTF-8".decode(errors="surrogateescape")]
)
def test_a_folder_whose_name_is_not_printable_is_refused_and_escaped(name: str, snapshot: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelFormatError, match="SRC: the name of the model is not printable") as caught:
        open_source(Path(shutil.copytree(snapshot, tmp_path / name)))
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("record", [{"name": 5}, {"name": ["a"]}, {"name": {"a": 1}}])
def test_a_name_that_is_no_text_is_refused(record: dict[str, object], snapshot: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(snapshot, tmp_path / "named"))
    (folder / "source.json").write_text(json.dumps(record))
    with pytest.raises(ModelFormatError, match=r"source\.json name"):
        open_source(folder)


@pytest.mark.parametrize("licence", ["MIT", 5, ["MIT"], {"name": 5}, {}, None])
def test_a_licence_record_of_another_form_counts_as_unknown(licence: object, snapshot: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(snapshot, tmp_path / "named"))
    (folder / "source.json").write_text(json.dumps({"name": "x", "licence": licence}))
    assert open_source(folder).licence is None


@pytest.mark.parametrize("style", ["weird", "", 5, [], ["chat"], {}])
def test_a_style_of_another_form_is_refused_with_the_file(style: object, snapshot: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(snapshot, tmp_path / "named"))
    (folder / "source.json").write_text(json.dumps({"name": "x", "style": style}))
    with pytest.raises(ModelFormatError, match=r"source\.json style: the style of the model is unknown"):
        open_source(folder)
