"""The KV prefix of a patch: key/value entries that stand in for the context's, at the start of every KV cache under it.

A patch without entries changes only the model's weights. A cached prompt keeps all entries and is exact. Fewer entries
are fitted, so that each one stands for more than itself (docs/method.md); weights beside them compensate for the rest.

The entries replace the beginning of the prompt. `replaces` holds the ids with which every prompt without the context
starts (with most chat templates, the beginning of the system and user messages). These ids are not run. The text after
them continues at `position`, its position after the full context, so that the rotary angles of the kept keys stay
correct.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from ..errors import PatchFormatError, PatchShapeError, PatchValueError, RequestError, shown
from .names import KV_PARTS, EntryKey, entry_name
from .tensors import Float32Values, Tensor, tensor_of

Array = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class KVPrefix:
    """The entries of every layer.

    Attributes:
        entries: for each (layer, "key" | "value") an array [n, kv heads, head dim], float32 and read-only, from layer 0
            to the last. The number n of entries may differ from layer to layer. The keys are rotated for their
            positions in the context. Each head may hold entries of other positions. Arrays that are passed are copied;
            the tensors of a patch file stay in its dtype, and become float32 whenever an array is read.
        tensors: the same entries as tensors.
        replaces: the ids at the start of a prompt that the entries replace.
        position: the position of the first token after them, at least the largest n.
        before_system: whether the entries stand in front of a system message of the prompt's own; otherwise they stand
            in its place.

    Raises:
        PatchShapeError: a layer or a part is missing, a layer has no entries or other numbers of keys and values, or
            the heads or their sizes differ.
        PatchValueError: a value is NaN or infinity, or `position` is below the largest number of entries.
    """

    entries: Mapping[EntryKey, Array]
    replaces: tuple[int, ...]
    position: int
    before_system: bool = False

    @property
    def tensors(self) -> Mapping[EntryKey, Tensor]:
        """The entries as they are held in memory."""
        assert isinstance(self.entries, Float32Values)  # __post_init__ made it
        return self.entries.tensors

    def __post_init__(self) -> None:
        entries = self.entries  # arrays, or tensors under the arrays' interface
        given: Mapping[EntryKey, Any] = entries.tensors if isinstance(entries, Float32Values) else entries
        wanted = [(layer, part) for layer in range(len(given) // 2) for part in KV_PARTS]
        if not given or sorted(given) != wanted:
            raise PatchShapeError(
                "the KV prefix lacks a layer, or the keys or values of one",
                field="prefix",
                got=f"{len(given)} tensors",
                wanted="keys and values of every layer, from 0 on",
            )
        heads = given[0, KV_PARTS[0]].shape[1:]
        held = {}
        for (layer, part), values in sorted(given.items(), key=itemgetter(0)):
            field = entry_name(layer, part)
            # A layer's keys come before its values, and say how many entries the layer has.
            keys = given[layer, KV_PARTS[0]]
            if len(values.shape) != 3 or values.shape != (keys.shape[0], *heads) or 0 in values.shape:
                expected = f"[entries, {', '.join(map(str, heads))}], at least one entry" if values is keys else ""
                raise PatchShapeError(
                    "a tensor of the KV prefix has a wrong shape",
                    field=field,
                    got=list(values.shape),
                    wanted=expected or f"{list(keys.shape)}, as the keys of this layer",
                )
            held[layer, part] = tensor_of(values)
            if not np.isfinite(held[layer, part].native()).all():
                raise PatchValueError(
                    "the tensor holds NaN or infinity",
                    field=field,
                    got="a value that is not finite",
                    wanted="finite numbers",
                    fix="export the patch again",
                )
        # The identity covers the ids and the position, so these are plain numbers that the caller cannot change.
        object.__setattr__(self, "replaces", tuple(int(token) for token in self.replaces))
        object.__setattr__(self, "position", int(self.position))
        object.__setattr__(self, "entries", Float32Values(MappingProxyType(held)))
        if self.position < self.longest:
            raise PatchValueError(
                "the text would begin before the end of the entries",
                field="config.prefix.position",
                got=self.position,
                wanted=f"at least {self.longest}, the largest number of entries",
            )

    @property
    def counts(self) -> tuple[int, ...]:
        """The number of entries of each head, layer by layer."""
        return tuple(self.tensors[layer, KV_PARTS[0]].shape[0] for layer in range(self.layers))

    @property
    def longest(self) -> int:
        """The largest number of entries that a layer has."""
        return max(self.counts)

    @property
    def amount(self) -> str:
        """The number of entries of a head for people: "5", or "3 to 9" if the layers differ."""
        return f"{min(self.counts)} to {self.longest}" if min(self.counts) < self.longest else str(self.longest)

    @property
    def layers(self) -> int:
        """The number of layers."""
        return len(self.entries) // 2

    @property
    def skipped(self) -> int:
        """The number of positions by which the text is shifted: position - len(replaces)."""
        return self.position - len(self.replaces)

    def require_start(self, tokens: Sequence[int]) -> None:
        """Check the start of a prompt.

        Raises:
            RequestError: `tokens` does not start with `replaces`, or has no id after it.
        """
        lead = len(self.replaces)
        if tuple(tokens[:lead]) != self.replaces or len(tokens) <= lead:
            system = "with" if self.before_system else "without"
            raise RequestError(
                "the prompt does not start as the patch's KV prefix requires",
                field="messages",
                got=f"ids {list(tokens[:lead])[:12]}",
                wanted=f"the {lead} ids that it replaces, {list(self.replaces)[:12]}, and at least one more",
                fix=f"send user messages through the model's chat template, {system} a system prompt",
            )

    def check(self, layers: int, heads: int, head_dim: int, vocab_size: int, context_window: int) -> None:
        """Check the entries against a model's KV cache, its vocabulary and its context window.

        Raises:
            PatchShapeError: the number of layers or heads or the head size differs, or no room for text is left.
            PatchValueError: an id that the entries replace is not in the model's vocabulary.
        """
        got = (self.layers, *self.tensors[0, "key"].shape[1:])
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
                "the KV prefix replaces ids that are not in the model's vocabulary",
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
        """Check the entries against the dtype of a KV cache.

        Raises:
            PatchValueError: a value is too large for `dtype`.
        """
        largest = float(np.finfo(dtype).max)
        for (layer, part), tensor in self.tensors.items():
            if (found := float(np.abs(tensor.native()).max())) > largest:
                raise PatchValueError(
                    "a value does not fit the cache's precision",
                    field=entry_name(layer, part),
                    got=found,
                    wanted=f"at most {largest:g}",
                    fix="use an fp32 export",
                )


def prefix_from(entries: Mapping[EntryKey, Tensor], description: Any) -> KVPrefix | None:
    """Build the KV prefix of a patch file.

    Args:
        entries: the prefix tensors of the file.
        description: the `prefix` object of the file's config; None if the config has no such object.

    Returns:
        The KV prefix; None if there are neither tensors nor a description.

    Raises:
        PatchFormatError: there are tensors without a description or the reverse, or the description is not of the form
            {"replaces": [ids], "position": n}, in files of versions 3 and 4 with "counts": [n of each layer] too, and
            with "before_system": true if it is so.
        PatchShapeError: `counts` are not those of the tensors; also see `KVPrefix`.
        PatchValueError: see `KVPrefix`.
    """
    if not entries and description is None:
        return None
    well_formed = (
        isinstance(description, Mapping)
        and set(description) - {"counts", "before_system"} == {"replaces", "position"}
        and description.get("before_system", True) is True
        and all(isinstance(description.get(numbers, []), list) for numbers in ("replaces", "counts"))
        and all(
            type(number) is int and number >= 0
            for number in [*description["replaces"], description["position"], *description.get("counts", [])]
        )
    )
    if not well_formed or not entries:
        raise PatchFormatError(
            "the patch's KV prefix is not complete",
            field="config.prefix",
            got=f"{len(entries)} tensors, {str(description)[:80]}",
            wanted='tensors prefix.<layer>.key|value, and {"replaces": [ids], "position": whole number}, perhaps with '
            '"before_system": true',
            fix="export the patch again with this version of tp-export",
        )
    before_system = "before_system" in description
    prefix = KVPrefix(Float32Values(entries), tuple(description["replaces"]), description["position"], before_system)
    counts = list(prefix.counts)
    if description.get("counts", counts) != counts:
        raise PatchShapeError(
            "the tensors do not have the described number of entries",
            field="config.prefix.counts",
            got=shown(description["counts"]),
            wanted=shown(counts),
            fix="export the patch again with this version of tp-export",
        )
    return prefix
