"""Files of version 3 for tests: patches that need it, their files, and the same files with one thing changed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from runtime_tests.bad_patches import packed, unpacked
from runtime_tests.patches import random_config, random_patch
from runtime_tests.runtime.patch.test_kv_prefix import arrays
from tp_runtime.patch import KVPrefix, Patch

SLOT = (0, "mlp_out")
A, A_SCALE, BIAS, MEAN = (f"layers.0.mlp_out.{part}" for part in ("a", "a_scale", "bias", "mean"))
KEY, KEY_SCALE, VALUE_SCALE = "prefix.0.key", "prefix.0.key_scale", "prefix.0.value_scale"


def whole(**config: Any) -> Patch:
    """Return a patch with weights and entries."""
    return Patch(random_patch().deltas, random_config(**config), KVPrefix(arrays(), (1, 2), 5))


def ragged(**config: Any) -> Patch:
    """Return a patch of entries with another number of them in each layer."""
    entries = {key: values[: 1 + key[0]] for key, values in arrays(layers=3).items()}
    return Patch({}, random_config(method="prefix", **config), KVPrefix(entries, (1, 2), 5))


def saved(path: Path, patch: Patch | None = None, dtype: str | None = "i8") -> bytes:
    (patch or whole()).save(path / "p.safetensors", dtype)
    return (path / "p.safetensors").read_bytes()


def version(content: bytes) -> str:
    return str(unpacked(content)[0]["version"])


def with_config(content: bytes, number: str | None = None, **changes: Any) -> bytes:
    """Return the file with another version, and with these values in its config; None removes a key."""
    metadata, parts = unpacked(content)
    metadata["version"] = number or metadata["version"]
    config = {**metadata["config"], **changes}
    metadata["config"] = {key: value for key, value in config.items() if value is not None}
    return packed(metadata, parts)
