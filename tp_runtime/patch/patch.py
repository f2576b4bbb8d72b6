"""The patch: low-rank deltas for a base model's layers and perhaps a short KV prefix, with the algebra of patches.

A patch is immutable. Scaling and adding are exact and take no memory: the result holds the patches that it is made of,
and its values are computed from those and from their strengths, each rounded once, whenever they are read. So the terms
(identity, strength) state the values bit for bit, however the result came about, and a KV cache can be keyed by them:
10 * (0.1 * p) has the terms of p and the values of p. This module does not handle graphs, sessions or devices.
"""

from __future__ import annotations

import hashlib
import numbers
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from ..errors import BaseMismatchError, PatchTargetError, PatchValueError, shown
from .algebra import sum_config, valid_strength
from .capabilities import ADDS_TO_WEIGHTS, NO_STRENGTH, ONLY_WEIGHTS_TRAVEL, Capabilities
from .config import PatchConfig
from .delta import Delta, SlotKey, check_slot
from .encoding import check_dtype, dtype_of_file, rounded_tensors
from .file import PatchFile, parse_patch, patch_bytes, read_patch, split_tensors, write_patch
from .kv_prefix import KVPrefix, prefix_from
from .names import entry_name, slot_name
from .tensors import Float32Values, Tensor

Terms = tuple[tuple[str, float], ...]
Summands = tuple[tuple["Patch", float], ...]

_WEIGHTS_ALONE = "fit a patch of weights alone: tp-export patch --method output"


@dataclass(frozen=True, eq=False)
class Patch:
    """A set of deltas by slot, with a description of how they were made.

    Attributes:
        deltas: for each (layer, site) a `Delta`, read-only, in order of layer and then of site name.
        config: the description.
        prefix: the key/value entries of the context that are put in front of the text, or None.
        dtype: the dtype that `save` takes by default, for all parts of the patch. A loaded patch has that of its file,
            in which it is also held in memory. A patch made in memory has "f16", as the result of a sum or a strength
            does.

    Raises:
        PatchFormatError: `dtype` is unknown.
        PatchTargetError: a site is unknown, a delta has only one of a and b, a delta has a mean without the pair, or a
            delta is empty.
        PatchShapeError: the arrays of a slot do not fit each other.
        PatchValueError: a value is NaN or infinity, or an array holds something other than numbers.
    """

    deltas: Mapping[SlotKey, Delta]
    config: PatchConfig
    prefix: KVPrefix | None = None
    dtype: str = "f16"

    # Without this, numpy would treat `np.float32(2) * patch` as an array operation.
    __array_ufunc__ = None

    def __post_init__(self) -> None:
        check_dtype(self.dtype)
        for slot, delta in self.deltas.items():
            check_slot(slot)
            delta.check(slot)
        ordered = {(int(layer), site): self.deltas[layer, site] for layer, site in sorted(self.deltas)}
        object.__setattr__(self, "deltas", MappingProxyType(ordered))

    # -- properties ------------------------------------------------------------------------------------------

    @property
    def name(self) -> str:
        """The name in the description, for people; it is never used as a key."""
        return self.config.name

    @property
    def ranks(self) -> dict[SlotKey, int]:
        """The rank of each slot; 0 if the slot has only a bias."""
        return {slot: delta.rank for slot, delta in self.deltas.items()}

    @property
    def rank(self) -> int:
        """The largest rank of any slot."""
        return max(self.ranks.values(), default=0)

    @cached_property
    def nbytes(self) -> int:
        """The number of bytes of the patch file: the one that it was loaded from, or the one that `save` would write.

        A patch of strength 0 has no file and 0 bytes.
        """
        return 0 if self.is_base else patch_bytes(self._tensors(), self._description(), self.dtype)

    @property
    def memory_bytes(self) -> int:
        """The number of bytes that the tensors take in memory: those of the file, or of the patches of a sum."""
        return sum(tensor.nbytes for tensor in self._tensors().values())

    @property
    def capabilities(self) -> Capabilities:
        """What the patch can do, which differs between weights and entries."""
        return Capabilities.of(bool(self.deltas), self.prefix is not None, self.config.precision, self.before_system)

    @property
    def before_system(self) -> bool:
        """Whether the patch has entries, and they stand in front of a system message of the request's own."""
        return self.prefix is not None and self.prefix.before_system

    def _tensors(self) -> dict[str, Tensor]:
        """Return every tensor by its name in the file."""
        tensors = {
            slot_name(*slot, part): tensor
            for slot, delta in self.deltas.items()
            for part, tensor in delta.tensors.items()
        }
        if self.prefix is not None:
            tensors |= {entry_name(*entry): tensor for entry, tensor in self.prefix.tensors.items()}
        return tensors

    @cached_property
    def identity(self) -> str:
        """The SHA-256 (hex) over the names, shapes and little-endian float32 values, in order of name.

        A KV prefix adds the ids that it replaces and its position. The file, its dtype and the rest of its description
        have no influence: patches with equal values are the same patch.
        """
        tensors = self._tensors()
        digest = hashlib.sha256(b"tp-patch identity 1\n")
        if self.prefix is not None:  # the effect of the entries depends on the ids and the position
            digest.update(f"prefix {list(self.prefix.replaces)} {self.prefix.position}\n".encode())
        for name in sorted(tensors):
            digest.update(f"{name} {list(tensors[name].shape)}\n".encode())
            digest.update(np.ascontiguousarray(tensors[name].float32(), "<f4").data)
        return digest.hexdigest()

    @cached_property
    def terms(self) -> Terms:
        """The ordered (identity, strength) pairs of the patches that this one is made of, for cache keys.

        A loaded, fitted or truncated patch is one term of strength 1. Strength 0 gives the base, which has no term.
        """
        return tuple((patch.identity, strength) for patch, strength in self._summands)

    @property
    def _summands(self) -> Summands:
        """The loaded, fitted or truncated patches that this one is the sum of, with their strengths."""
        # A patch that is no combination is its own summand. That is not stored, because the cycle would keep its arrays
        # in memory until the garbage collector runs.
        return self.__dict__.get("summands", () if self.is_base else ((self, 1.0),))

    @property
    def is_base(self) -> bool:
        """Whether the patch changes nothing: it has no delta and no KV prefix."""
        return not self.deltas and self.prefix is None

    def require_weights_only(self, form: str) -> None:
        """Check that the patch can be written in another form than a patch file, which can hold no entries.

        Args:
            form: the name of that form, for the error.

        Raises:
            PatchTargetError: the patch has entries.
        """
        if self.prefix is not None:
            raise PatchTargetError(
                f"{ONLY_WEIGHTS_TRAVEL}, and without its entries the weights of this patch are wrong",
                field=self.name,
                got=f"{self.capabilities.form}, to be written as a {form}",
                wanted="weights",
                fix=_WEIGHTS_ALONE,
            )

    def __repr__(self) -> str:
        size = f"{len(self.deltas)} slots, rank {self.rank}, {self.nbytes} bytes in {self.dtype}"
        if self.prefix is not None:
            size = f"{self.prefix.amount} KV entries, {size}"
        return f"<Patch {self.name!r}: {self.config.method}, {size}>"

    # -- algebra ---------------------------------------------------------------------------------------------

    def __mul__(self, strength: Any) -> Patch:
        strength = valid_strength(strength)
        if strength == 1.0:
            return self
        products = ((patch, valid_strength(strength * old)) for patch, old in self._summands)
        summands = tuple((patch, product) for patch, product in products if product != 0.0)
        if summands and self.prefix is not None:
            raise PatchValueError(
                f"a patch with entries has strength {NO_STRENGTH}, because keys and values cannot be scaled",
                field=self.name,
                got=f"strength {strength:g}",
                wanted=NO_STRENGTH,
                fix=_WEIGHTS_ALONE,
            )
        # The result has no probe and no figures, because these were measured at strength 1.
        config = replace(self.config, probe=None, fidelity=None, report=None)
        return _combination(summands, config if summands else replace(config, stop=()))

    __rmul__ = __mul__

    def __neg__(self) -> Patch:
        return -1.0 * self

    def __add__(self, other: Any) -> Patch:
        return _sum(self, other, "+") if isinstance(other, Patch) else NotImplemented

    def __radd__(self, other: Any) -> Patch:
        # sum([p, q]) starts with the integer 0.
        return self if isinstance(other, int) and other == 0 else NotImplemented

    def __sub__(self, other: Any) -> Patch:
        return _sum(self, -other, "-") if isinstance(other, Patch) else NotImplemented

    def truncate(self, rank: int) -> Patch:
        """Keep the first `rank` directions of every slot, and add the mean effect of the others to the bias.

        Args:
            rank: the largest rank to keep, at least 1. Slots of lower rank stay unchanged.

        Returns:
            A new patch with its own identity and one term of strength 1, without a probe and without held-out figures.
            If nothing is dropped, the same patch object.

        Raises:
            PatchValueError: `rank` is not a whole number >= 1, a slot has no mean, or the patch is a sum.
        """
        if isinstance(rank, bool) or not isinstance(rank, numbers.Integral) or rank < 1:
            raise PatchValueError(
                "the rank is not a positive integer",
                field="rank",
                got=shown(rank),
                wanted="a whole number >= 1",
                fix="pass rank >= 1",
            )
        if len(self._summands) > 1 or self.config.method == "composed":
            raise PatchValueError(
                "the patch is a sum, whose directions are not in order of energy",
                field=self.name,
                got=f"a sum of {max(2, len(self._summands))} or more patches",
                wanted="one fitted patch",
                fix="truncate each patch before adding",
            )
        if rank >= self.rank:
            return self
        deltas = {slot: delta.truncated(int(rank), slot) for slot, delta in self.deltas.items()}
        return Patch(deltas, replace(self.config, probe=None, fidelity=None, report=None), self.prefix, self.dtype)

    # -- files -----------------------------------------------------------------------------------------------

    def rounded(self, dtype: str) -> Patch:
        """Return the patch that is loaded from the file that `save(path, dtype)` writes.

        Measure this patch, so that the figures are those of the file.

        Args:
            dtype: as for `save`.

        Raises:
            PatchFormatError: the dtype is unknown.
            PatchValueError: a value does not fit the dtype.
            PatchShapeError: entries of an odd head dim cannot have four bits.
        """
        tensors = self._tensors()
        deltas, entries = split_tensors(rounded_tensors(tensors, dtype))
        prefix = None if self.prefix is None else replace(self.prefix, entries=Float32Values(entries))
        stored = dtype_of_file(tensors, dtype)
        return Patch({slot: Delta(**parts) for slot, parts in deltas.items()}, self.config, prefix, stored)

    def save(self, path: str | os.PathLike[str], dtype: str | None = None) -> None:
        """Write the patch file, whole or not at all. An existing file is replaced if it is a patch file.

        Args:
            path: the file to write, which ends in .safetensors.
            dtype: the dtype of the tensors; None takes the patch's own (`Patch.dtype`). "f16" and "bf16" halve the file
                and round the values, so the patch that is loaded from it has another identity. "i8" stores factors and
                entries in a quarter of the bytes of float32, and the other tensors as "f16" does. "i4" stores entries
                in about a seventh and the rest as "i8" does; entries that were not fitted for it lose by it. "f32"
                keeps the values.

        Raises:
            PatchTargetError: the patch holds no delta and no KV prefix.
            PatchValueError: a value does not fit the dtype.
            PatchShapeError: entries of an odd head dim cannot have four bits.
            PatchFormatError: the dtype is unknown, `path` has another suffix, the file would be too large, or the patch
                holds something else than its method makes.
            OutputError: `path` holds something that is not a patch file.
            OSError: the operating system refuses the write, for example because the disk is full. No file is left
                behind.
        """
        if self.is_base:
            raise PatchTargetError(
                "the patch holds no delta",
                field=self.name,
                got="0 slots",
                wanted="at least one",
                fix="save no file for strength 0; unload the patch instead",
            )
        self.config.check_contents(len(self.deltas), self.prefix is not None)
        write_patch(path, self._tensors(), self._description(), self.dtype if dtype is None else dtype)

    def _description(self) -> dict[str, Any]:
        """Return the JSON object for the file, without the keys that only its version requires."""
        config = self.config.to_dict()
        if self.prefix is not None:
            config["prefix"] = {"replaces": list(self.prefix.replaces), "position": self.prefix.position}
            if self.before_system:
                config["prefix"]["before_system"] = True
        return config

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Patch:
        """Read a patch file and check everything in it.

        Raises:
            PatchFormatError: the file is damaged, unsafe or not a patch, or it holds something else than its method
                makes.
            PatchVersionError: the file has a version, method or key that this version of tp-runtime does not know.
            PatchTargetError: a slot is unknown, a slot has only one of a and b, or the file holds no tensor.
            PatchShapeError: the arrays of a slot do not fit each other.
            PatchValueError: a value is NaN or infinity.
            OSError: the file cannot be read.
        """
        return cls._of(read_patch(path))

    @classmethod
    def parse(cls, raw: bytes, where: str | os.PathLike[str]) -> Patch:
        """Make a patch of the bytes of a patch file, with the checks of `load`.

        Args:
            raw: the bytes.
            where: where they are from, for errors.

        Raises:
            PatchFormatError, PatchVersionError, PatchTargetError, PatchShapeError, PatchValueError: as for `load`.
        """
        return cls._of(parse_patch(raw, Path(where)))

    @classmethod
    def _of(cls, file: PatchFile) -> Patch:
        config = dict(file.config)
        tensors, entries = split_tensors(file.tensors)
        prefix = prefix_from(entries, config.pop("prefix", None))
        deltas = {slot: Delta(**parts) for slot, parts in tensors.items()}
        patch = cls(deltas, PatchConfig.from_dict(config), prefix, file.dtype)
        patch.config.check_contents(len(deltas), prefix is not None)
        patch.__dict__["nbytes"] = file.nbytes  # another program may have written more or fewer bytes than `save` would
        return patch


# -- parts of the algebra ------------------------------------------------------------------------------------


def _combination(summands: Summands, config: PatchConfig) -> Patch:
    """Return the sum of strength * patch over `summands`, in their order."""
    deltas: dict[SlotKey, Delta] = {}
    prefix = None
    for patch, strength in summands:
        for slot, delta in patch.deltas.items():
            scaled = delta if strength == 1.0 else delta.scaled(strength)
            deltas[slot] = deltas[slot].joined(scaled, slot) if slot in deltas else scaled
        prefix = prefix or patch.prefix
    combined = Patch(deltas, config, prefix)
    combined.__dict__["summands"] = summands
    return combined


def _sum(p: Patch, q: Patch, sign: str) -> Patch:
    """Return p + q; `sign` is used only in the name."""
    if p.config.base_digest != q.config.base_digest:
        raise BaseMismatchError(
            "the patches were fitted on different base models",
            field="base_digest",
            got=f"{q.config.base_digest} ({q.config.base_model}, patch {q.name!r})",
            wanted=f"{p.config.base_digest} ({p.config.base_model}, patch {p.name!r})",
            fix="add patches of one base model",
        )
    config = sum_config(p.config, q.config, sign)
    if q.is_base:  # adding the base makes no sum, so p can still be truncated and checked
        return p
    if p.is_base:
        return q
    if p.prefix is not None and q.prefix is not None:
        raise PatchValueError(
            f"both patches have entries, and a patch with entries adds {ADDS_TO_WEIGHTS}",
            field=q.name,
            got=q.capabilities.form,
            wanted=f"weights only, because {p.name!r} has entries",
            fix=_WEIGHTS_ALONE,
        )
    return _combination(p._summands + q._summands, config)
