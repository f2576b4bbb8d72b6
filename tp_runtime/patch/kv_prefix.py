"""A KV prefix carried by a patch: a few key/value entries of the context, put at the front of every cache under it.

Between the pure patch (no entries, the model's own weights changed) and the cached prompt (all entries, exact) lies a
frontier: the entries that completions attend to most are kept, and the weight updates make up for the rest (PatchKV).

The entries stand in for the beginning of the prompt: `replaces` are the ids that every prompt without the context
starts with (for most chat templates the opening of the system and user turns). They are not run; the text after them
continues at `position`, where it stood after the full context, so the kept keys' rotary angles stay right.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from ..errors import PatchFormatError, PatchShapeError, PatchValueError, RequestError

Array = NDArray[np.float32]
Entry = tuple[int, str]
KV_PARTS = ("key", "value")


@dataclass(frozen=True, eq=False)
class KVPrefix:
    """Kept entries of every layer.

    Attributes:
        entries: (layer, "key" | "value") to [n, kv heads, head dim], for layers 0 to the last; arrays become float32.
            Keys are rotated as they stood in the context; each head may hold entries of positions of its own.
        replaces: ids at the start of a prompt that the entries stand in for.
        position: of the first token after them, at least n.

    Raises:
        PatchShapeError: a layer or part is missing, or shapes differ.
        PatchValueError: NaN or infinity, or a position before the end of the entries.
    """

    entries: Mapping[Entry, Array]
    replaces: tuple[int, ...]
    position: int

    def __post_init__(self) -> None:
        wanted = [(layer, part) for layer in range(len(self.entries) // 2) for part in KV_PARTS]
        if not self.entries or sorted(self.entries) != wanted:
            raise PatchShapeError(
                "the KV prefix lacks a layer",
                field="prefix",
                got=f"{len(self.entries)} tensors",
                wanted="a key and a value for every layer, from 0 on",
            )
        shape = self.entries[0, "key"].shape
        frozen = {}
        for (layer, part), values in sorted(self.entries.items()):
            field = f"prefix.{layer}.{part}"
            if values.ndim != 3 or values.shape != shape or 0 in shape:
                raise PatchShapeError(
                    "a tensor of the KV prefix has another shape",
                    field=field,
                    got=list(values.shape),
                    wanted=f"[entries, kv heads, head dim], all {list(shape)}",
                )
            frozen[layer, part] = np.array(values, np.float32)
            frozen[layer, part].setflags(write=False)
            if not np.isfinite(frozen[layer, part]).all():
                raise PatchValueError("NaN or infinity", field=field, got="a value not finite", wanted="numbers")
        if self.position < len(self):
            raise PatchValueError(
                "the text would stand before entries it follows",
                field="config.prefix.position",
                got=self.position,
                wanted=f"at least {len(self)}, the number of entries",
            )
        object.__setattr__(self, "entries", frozen)

    def __len__(self) -> int:
        """Entries a head keeps."""
        return int(self.entries[0, "key"].shape[0])

    @property
    def layers(self) -> int:
        """Layers it has entries for."""
        return len(self.entries) // 2

    @property
    def skipped(self) -> int:
        """Positions between the prompt's own count and where its text stands: position - len(replaces)."""
        return self.position - len(self.replaces)

    def require_start(self, tokens: Sequence[int]) -> None:
        """Raise RequestError unless `tokens` starts with `replaces` and goes on after it."""
        lead = len(self.replaces)
        if tuple(tokens[:lead]) != self.replaces or len(tokens) <= lead:
            raise RequestError(
                "the prompt does not start as the patch's KV prefix needs it",
                field="messages",
                got=f"ids {list(tokens[:lead])[:12]}",
                wanted=f"the {lead} ids it stands in for, {list(self.replaces)[:12]}, and at least one more",
                fix="send user messages without a system prompt of your own, rendered by the model's chat template",
            )

    def check(self, layers: int, heads: int, head_dim: int, vocab_size: int, context_window: int) -> None:
        """Check the entries against a model's KV cache, its vocabulary and its context window.

        Raises:
            PatchShapeError: another number of layers or heads, another head size, or no room for text.
            PatchValueError: an id it stands in for is none of the model's.
        """
        got = (self.layers, *self.entries[0, "key"].shape[1:])
        if got != (layers, heads, head_dim):
            raise PatchShapeError(
                "the KV prefix does not fit the model's cache",
                field="prefix",
                got=f"{got[0]} layers of {got[1]} heads of {got[2]}",
                wanted=f"{layers} layers of {heads} heads of {head_dim}",
                fix="use the base model that the patch was fitted on",
            )
        if max(self.replaces, default=0) >= vocab_size:
            raise PatchValueError(
                "the KV prefix stands in for ids that the model does not have",
                field="config.prefix.replaces",
                got=max(self.replaces),
                wanted=f"0..{vocab_size - 1}",
                fix="use the base model that the patch was fitted on",
            )
        if self.position >= context_window:
            raise PatchShapeError(
                "the KV prefix leaves no room for text",
                field="config.prefix.position",
                got=self.position,
                wanted=f"below the context window, {context_window}",
                fix="use the base model that the patch was fitted on",
            )

    def check_dtype(self, dtype: DTypeLike) -> None:
        """Raise PatchValueError if an entry does not fit the cache's dtype."""
        largest = float(np.finfo(dtype).max)
        for (layer, part), values in self.entries.items():
            if (found := float(np.abs(values).max())) > largest:
                raise PatchValueError(
                    "a value does not fit the cache's precision",
                    field=f"prefix.{layer}.{part}",
                    got=found,
                    wanted=f"at most {largest:g}",
                    fix="use an fp32 export",
                )


def prefix_from(entries: Mapping[Entry, Array], description: Any) -> KVPrefix | None:
    """The prefix of a patch file: its tensors and the `prefix` object of its config; None if there is neither.

    Raises:
        PatchFormatError: one without the other, or a description that is no {"replaces": [ids], "position": n}.
        PatchShapeError, PatchValueError: see `KVPrefix`.
    """
    if not entries and description is None:
        return None
    whole = (
        isinstance(description, Mapping)
        and set(description) == {"replaces", "position"}
        and isinstance(description["replaces"], list)
        and all(type(number) is int and number >= 0 for number in [*description["replaces"], description["position"]])
    )
    if not whole or not entries:
        raise PatchFormatError(
            "the patch's KV prefix is not whole",
            field="config.prefix",
            got=f"{len(entries)} tensors, {str(description)[:80]}",
            wanted='tensors prefix.<layer>.key|value, and {"replaces": [ids], "position": whole number}',
            fix="export the patch again with this version of tp-export",
        )
    return KVPrefix(entries, tuple(description["replaces"]), description["position"])
