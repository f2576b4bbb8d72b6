"""The file of a prefix cache: the entries of one graph, the least recently used first, in a safetensors container.

The metadata hold `format`, `version` and `config`, a JSON object: `graph`, the digest of the graph, and `entries`, a
list of {"terms": [[identity, strength], ...], "tokens": [ids]}. The tensor `<n>.<graph input>` holds keys or values
[heads, filled, head dim] of entry n, in the dtype of the graph's cache.

A file may come from anywhere, so the reader checks everything in it against the folder before it returns an entry, and
reads no more tensors than the caller's budget holds. What it cannot check is whether keys and values are those that the
patches give: as with a patch file, whoever writes the file decides what the model answers.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from ..errors import CacheFormatError, StaleCacheError, shown
from ..patch import KV_PARTS
from ..session import ModelFolder, past_name
from ..storage import (
    MAX_FILE_BYTES,
    MAX_HEADER_BYTES,
    NO_FILE,
    SHA256,
    Kind,
    SafetensorsError,
    StoredRange,
    StrictJSONError,
    UnreadableFileError,
    open_regular,
    parse_json_object,
    parse_safetensors,
    safetensors_header,
    safetensors_metadata,
    write_safetensors,
)
from .prefix_entry import PrefixEntry

FORMAT, VERSION = "tp-prefix-cache", "1"
DTYPES = {"f32": "F32", "f16": "F16"}  # by the dtype of a folder's keys and values
# The dtypes of patch files are among them, so that these are told apart.
_ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2, "I8": 1, "U8": 1}
_MAKE_AGAIN = "make the file again with this model and this version"


def _other(file: Path) -> str | None:
    metadata = safetensors_metadata(file)
    known = isinstance(metadata, dict) and metadata.get("format") == FORMAT
    return None if known else "a safetensors file that is not a prefix cache"


CACHE_FILE = Kind("a file of a prefix cache", _other)


# -- writing -------------------------------------------------------------------------------------------------


def write_prefix_cache(path: str | os.PathLike[str], folder: ModelFolder, entries: Sequence[PrefixEntry]) -> None:
    """Write the entries of a folder's graph, whole or not at all. An existing file of a prefix cache is replaced.

    Args:
        path: the file to write, which ends in .safetensors.
        folder: the folder.
        entries: its entries, the least recently used first.

    Raises:
        CacheFormatError: `path` has another suffix, or the file would be larger than the reader accepts.
        OutputError: `path` holds something that is not a file of a prefix cache.
        OSError: the operating system refuses the write. No file is left behind.
    """
    file = _path(path)
    if file.suffix != ".safetensors":
        _refuse(file, "the file's name does not end in .safetensors", repr(file.suffix), ".safetensors", "rename it")
    dtype = DTYPES[folder.kv.dtype]
    described = [{"terms": entry.key[1], "tokens": entry.tokens.tolist()} for entry in entries]
    config = json.dumps({"graph": folder.graph_digest, "entries": described}, allow_nan=False)
    arrays = {f"{n}.{past}": array for n, entry in enumerate(entries) for past, array in entry.content.items()}
    shapes = {name: (dtype, array.shape, _ITEM_BYTES[dtype]) for name, array in arrays.items()}
    metadata = {"format": FORMAT, "version": VERSION, "config": config}
    header, order, size = safetensors_header(metadata, shapes)
    if len(header) > MAX_HEADER_BYTES or 8 + len(header) + size > MAX_FILE_BYTES:
        got = f"{len(header)} bytes of header, {size} of tensors"
        wanted = f"<= {MAX_HEADER_BYTES} of header, <= {MAX_FILE_BYTES} in all"
        _refuse(file, "the prefix cache is too large for one file", got, wanted, "use a smaller prefix_cache_bytes")
    little = np.dtype(folder.kv.numpy_dtype).newbyteorder("<")
    write_safetensors(file, header, (np.ascontiguousarray(arrays[name], little).data for name in order), CACHE_FILE)


# -- reading -------------------------------------------------------------------------------------------------


def read_prefix_cache(path: str | os.PathLike[str], folder: ModelFolder, budget: int) -> list[PrefixEntry]:
    """Read the entries of a file that a budget holds: the most recently used ones.

    Args:
        path: a regular file, or a symlink to one.
        folder: the folder that the entries have to belong to.
        budget: the largest number of bytes of keys and values to read.

    Returns:
        The entries, the least recently used first.

    Raises:
        CacheFormatError: the file is missing or damaged, is no file of a prefix cache, or does not fit the folder.
        StaleCacheError: the entries belong to another graph.
        OSError: the operating system refuses to read an existing file.
    """
    file = _path(path)
    try:
        with open_regular(file) as handle:
            size = os.fstat(handle.fileno()).st_size
            if size > MAX_FILE_BYTES:
                _refuse(file, "the file is too large", f"{size} bytes", f"<= {MAX_FILE_BYTES} bytes")
            start = handle.read(8)
            start += handle.read(min(int.from_bytes(start, "little"), MAX_HEADER_BYTES))
            metadata, ranges = parse_safetensors(start, _ITEM_BYTES, size)
            keys = _checked_keys(file, metadata, folder)
            places = _checked_ranges(file, keys, ranges, folder)
            entries: list[PrefixEntry] = []
            left = budget
            for (terms, tokens), own in zip(reversed(keys), reversed(places), strict=True):
                needed = sum(place.end - place.begin for place in own.values())
                if needed > budget:
                    continue  # no cache of this budget would have kept it
                if needed > left:
                    break
                left -= needed
                content = {}
                for past, place in own.items():
                    handle.seek(place.begin)
                    content[past] = _array(file, past, place, handle.read(place.end - place.begin))
                entries.append(PrefixEntry((folder.graph_digest, terms), np.array(tokens, np.int64), content))
    except UnreadableFileError as error:
        _refuse(file, error.problem, error.got, error.wanted, "check the path")
    except OSError as error:
        if error.errno not in NO_FILE:
            raise
        _refuse(file, "there is no such file", error.strerror, "a file that save wrote", "check the path")
    except SafetensorsError as error:
        _refuse(file, error.problem, error.got, error.wanted)
    return entries[::-1]


Key = tuple[tuple[tuple[str, float], ...], list[int]]
"""The terms and the ids of an entry."""


def _checked_keys(file: Path, metadata: Any, folder: ModelFolder) -> list[Key]:
    """Return the terms and the ids of every entry."""
    if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
        got = metadata.get("format") if isinstance(metadata, dict) else metadata
        _refuse(file, "the file is not one of a prefix cache", f"format {shown(got)}", f"format {FORMAT!r}")
    if metadata.get("version") != VERSION or set(metadata) != {"format", "version", "config"}:
        got = f"version {shown(metadata.get('version'))}, keys {', '.join(sorted(metadata))}"
        _refuse(file, "the file has an unknown version", got, f"version {VERSION!r}, keys format, version and config")
    if not isinstance(metadata["config"], str):
        _refuse(file, "the file has no config", shown(metadata["config"]), "a JSON text")
    try:
        config = parse_json_object(metadata["config"])
    except StrictJSONError as error:
        _refuse(file, f"the config {error.problem}", error.got, error.wanted)
    if set(config) != {"graph", "entries"} or not isinstance(config["entries"], list):
        _refuse(file, "the config is not complete", ", ".join(sorted(config)) or "no keys", "graph, entries (a list)")
    if config["graph"] != folder.graph_digest:
        raise StaleCacheError(
            "the file holds keys and values of another graph",
            field=f"{file}: graph",
            got=shown(config["graph"]),
            wanted=f"{folder.graph_digest!r}, the digest of this model's graph",
            fix="prefill the prompts again with this model, and save the cache",
        )
    return [_checked_key(file, f"entries[{n}]", entry, folder) for n, entry in enumerate(config["entries"])]


def _checked_key(file: Path, where: str, entry: Any, folder: ModelFolder) -> Key:
    if not isinstance(entry, dict) or set(entry) != {"terms", "tokens"}:
        _refuse(file, f"{where} is not an entry", shown(entry), '{"terms": [...], "tokens": [...]}')
    terms, tokens = entry["terms"], entry["tokens"]
    if not isinstance(terms, list) or not all(map(_is_term, terms)):
        _refuse(file, f"{where}.terms is not a list of patches", shown(terms), "[[identity, strength], ...]")
    if not isinstance(tokens, list) or not tokens or not all(type(token) is int for token in tokens):
        _refuse(file, f"{where}.tokens is not a list of ids", shown(tokens), "at least one whole number")
    if min(tokens) < 0 or max(tokens) >= folder.vocab_size:
        found = min(tokens) if min(tokens) < 0 else max(tokens)
        _refuse(file, f"{where}.tokens holds an id outside the vocabulary", shown(found), f"0..{folder.vocab_size - 1}")
    if len(tokens) > folder.context_window:
        wanted = f"at most {folder.context_window}, the context window"
        _refuse(file, f"{where}.tokens is too long", f"{len(tokens)} ids", wanted)
    return tuple((identity, float(strength)) for identity, strength in terms), tokens


def _is_term(term: Any) -> bool:
    if not isinstance(term, list) or len(term) != 2 or not isinstance(term[0], str) or not SHA256.fullmatch(term[0]):
        return False
    return type(term[1]) is float or (type(term[1]) is int and abs(term[1]) < 2**53)


def _checked_ranges(
    file: Path, keys: Sequence[Key], ranges: Mapping[str, StoredRange], folder: ModelFolder
) -> list[dict[str, StoredRange]]:
    """Return the places of every entry's tensors, by graph input name.

    All layers of a kind hold one number of positions. Without a patch it is that of the ids, or less in windowed layers
    that dropped positions. Under a patch with entries it is another one, which the cache compares with the patch when
    it uses the entry.
    """
    pasts = {past_name(layer, part): layer for layer in range(folder.layers) for part in KV_PARTS}
    wanted = {f"{n}.{past}" for n in range(len(keys)) for past in pasts}
    if set(ranges) != wanted:
        names = sorted(wanted ^ set(ranges))
        _refuse(
            file,
            "the file does not hold the keys and values of every layer of its entries, and nothing else",
            f"{len(ranges)} tensors, {shown(names[0])} is missing or unknown",
            f"{len(wanted)} tensors, <entry>.past_key_values.<layer>.key|value",
        )
    heads, head_dim = folder.kv.heads, folder.kv.head_dim
    windowed, dtype = () if folder.windowed is None else folder.windowed.layers, DTYPES[folder.kv.dtype]
    hidden = 0 if folder.windowed is None else folder.windowed.window - 1
    places = []
    for n, (terms, tokens) in enumerate(keys):
        own = {past: ranges[f"{n}.{past}"] for past in pasts}
        lengths: dict[bool, int] = {} if terms else {False: len(tokens)}
        for past, place in own.items():
            if place.dtype != dtype:
                _refuse(file, f"the tensor {n}.{past} has another dtype than the folder", place.dtype, dtype)
            length = place.shape[1] if len(place.shape) == 3 else 0
            is_windowed = pasts[past] in windowed
            one = lengths.setdefault(is_windowed, length)
            least = min(len(tokens), hidden) if is_windowed and not terms else 0
            most = len(tokens) if is_windowed and not terms else folder.context_window
            if place.shape != (heads, one, head_dim) or not max(least, 1) <= length <= most:
                _refuse(
                    file,
                    f"the tensor {n}.{past} has a wrong shape",
                    list(place.shape),
                    f"[{heads}, {one or 'positions'}, {head_dim}], {max(least, 1)} to {most} positions",
                )
        places.append(own)
    return places


def _array(file: Path, past: str, place: StoredRange, raw: bytes) -> np.ndarray:
    """Return the array of a tensor's bytes, which nobody can change."""
    if len(raw) != place.end - place.begin:
        _refuse(file, "the file was truncated while it was read", f"{len(raw)} bytes", f"{place.end - place.begin}")
    array = np.frombuffer(raw, "<f4" if place.dtype == "F32" else "<f2").reshape(place.shape)
    if not np.isfinite(array).all():
        _refuse(file, f"{past} of an entry holds NaN or infinity", "a value that is not finite", "finite numbers")
    return array


def _path(path: Any) -> Path:
    if not isinstance(path, str | os.PathLike):
        raise CacheFormatError("the value is not a path", field="path", got=shown(path), wanted="the path of a file")
    return Path(path)


def _refuse(file: Path, problem: str, got: object, wanted: object, fix: str = _MAKE_AGAIN) -> NoReturn:
    raise CacheFormatError(problem, field=str(file), got=got, wanted=wanted, fix=fix)
