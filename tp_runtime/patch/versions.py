"""The versions of the patch file: what each may hold, and which one the writer takes.

    1   deltas
    2   also a KV prefix
    3   also int8 tensors, stop strings, a number of entries that differs between layers, and entries that stand in
        front of a system message
    4   also entries of four bits

The writer takes the lowest version that holds the patch, so older readers still read what they can represent.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from ..errors import PatchFormatError
from .names import parse_entry_name

VERSIONS = ("1", "2", "3", "4")

_AGAIN = "export the patch again with this version of tp-export"


class Described(Protocol):
    """What a version depends on: a tensor's dtype in the file and its dimensions."""

    @property
    def dtype(self) -> str:
        """The dtype in the file, such as "I8"."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The dimensions."""


def check_version(where: str, version: str, config: Mapping[str, Any], tensors: Mapping[str, Described]) -> None:
    """Check that a file holds what its version allows, and the keys that its version requires.

    Args:
        where: the file, for errors.
        version: one of `VERSIONS`.
        config: the parsed config object; nothing of it needs to be checked yet.
        tensors: the tensors of the file.

    Raises:
        PatchFormatError: the version does not fit the tensors, or the config has a key of another version or lacks a
            key of this one.
    """
    prefix = config.get("prefix")
    counts = isinstance(prefix, Mapping) and "counts" in prefix
    packed = [name for name, tensor in sorted(tensors.items()) if tensor.dtype == "U8"]
    if packed and version != "4":
        problem = f"the version does not fit a file with four bits in {packed[0]!r}"
        raise _misfit(where, problem, repr(version), "'4'")
    if version in ("3", "4"):
        if "stop" not in config:
            problem = f"a file of version {version} lacks the key `stop`"
            raise _misfit("config", problem, "no `stop`", "a list of strings, which may be empty")
        if isinstance(prefix, Mapping) and not counts:
            problem = f"a file of version {version} lacks the key `counts`"
            raise _misfit("config.prefix", problem, ", ".join(prefix) or "no keys", "replaces, position, counts")
        return
    newer = [f"int8 values in {name!r}" for name, tensor in sorted(tensors.items()) if tensor.dtype == "I8"][:1]
    newer += ["a number of entries that differs between layers"] * (len(set(_counts(tensors))) > 1)
    newer += ["the key `stop`"] * ("stop" in config) + ["the key `counts` of `prefix`"] * counts
    newer += ["the key `before_system` of `prefix`"] * _before_system(config)
    if newer:
        problem = f"the version does not fit a file with {newer[0]}"
        raise _misfit(where, problem, repr(version), "'3'")
    has_prefix = "prefix" in config or any(parse_entry_name(name) for name in tensors)
    if version != (wanted := VERSIONS[has_prefix]):
        problem = f"the version does not fit a file with {'a' if has_prefix else 'no'} KV prefix"
        raise _misfit(where, problem, repr(version), repr(wanted))


def versioned(config: Mapping[str, Any], tensors: Mapping[str, Described]) -> tuple[str, dict[str, Any]]:
    """Return the lowest version that holds a patch, and the config with the keys that this version requires.

    Args:
        config: the config object, whose `prefix` has the keys of version 2.
        tensors: the tensors as they are stored.
    """
    counts = _counts(tensors)
    dtypes = {tensor.dtype for tensor in tensors.values()}
    newer = config.get("stop") or _before_system(config) or dtypes & {"I8", "U8"}
    if not newer and len(set(counts)) < 2:
        return VERSIONS["prefix" in config], dict(config)
    completed = {**config, "stop": list(config.get("stop", ()))}
    if "prefix" in config:
        completed["prefix"] = {**config["prefix"], "counts": counts}
    return "4" if "U8" in dtypes else "3", completed


def _before_system(config: Mapping[str, Any]) -> bool:
    prefix = config.get("prefix")
    return isinstance(prefix, Mapping) and "before_system" in prefix


def _counts(tensors: Mapping[str, Described]) -> list[int]:
    """Return the number of entries of each layer, from layer 0 on."""
    entries = {entry: tensor for name, tensor in tensors.items() if (entry := parse_entry_name(name))}
    # A damaged file may have a tensor without dimensions; KVPrefix refuses it.
    return [sum(entries[entry].shape[:1]) for entry in sorted(entries) if entry[1] == "key"]


def _misfit(field: str, problem: str, got: str, wanted: str) -> PatchFormatError:
    return PatchFormatError(problem, field=field, got=got, wanted=wanted, fix=_AGAIN)
