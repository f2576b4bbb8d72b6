"""The patch: low-rank deltas beside a base model's layers, perhaps a short KV prefix, and their algebra.

A patch is immutable. Scaling and adding are exact and cheap (arrays are shared where they do not change), and
every result remembers which loaded patches it is made of, at what strengths, so that a KV cache can be keyed
by it. Knows nothing of graphs, sessions or devices.
"""

from __future__ import annotations

import hashlib
import numbers
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from types import MappingProxyType
from typing import Any

import numpy as np

from ..errors import BaseMismatchError, PatchTargetError, PatchValueError
from .config import PatchConfig
from .delta import Delta, SlotKey, check_slot
from .file import entry_name, read_patch, slot_name, write_patch
from .kv_prefix import KVPrefix, prefix_from

Terms = tuple[tuple[str, float], ...]

# A patch fitted on any of these acts on every precision of its base; one fitted on a quantised base does not.
FLOAT_PRECISIONS = ("fp32", "fp16", "bf16")


@dataclass(frozen=True, eq=False)
class Patch:
    """Deltas by slot, and the description of where they come from.

    Attributes:
        deltas: (layer, site) to `Delta`, read-only, in order of layer and then site name.
        config: the description.
        prefix: key/value entries of the context, put in front of the text; None for a pure patch.

    Raises:
        PatchTargetError: an unknown site, half of a pair, a mean without a pair, an empty delta.
        PatchShapeError: arrays of one slot that do not fit each other.
        PatchValueError: NaN, infinity, or an array that is not made of numbers.
    """

    deltas: Mapping[SlotKey, Delta]
    config: PatchConfig
    prefix: KVPrefix | None = None

    # numpy would otherwise treat `np.float32(2) * patch` as an array operation.
    __array_ufunc__ = None

    def __post_init__(self) -> None:
        for slot, delta in self.deltas.items():
            check_slot(slot)
            delta.check(slot)
        ordered = {(int(layer), site): self.deltas[layer, site] for layer, site in sorted(self.deltas)}
        object.__setattr__(self, "deltas", MappingProxyType(ordered))

    # -- what it is ------------------------------------------------------------------------------------------

    @property
    def name(self) -> str:
        """The description's name: for people, never a key."""
        return self.config.name

    @property
    def ranks(self) -> dict[SlotKey, int]:
        """Rank of each slot; 0 where there is only a bias."""
        return {slot: delta.rank for slot, delta in self.deltas.items()}

    @property
    def rank(self) -> int:
        """The largest rank of any slot."""
        return max(self.ranks.values(), default=0)

    @property
    def nbytes(self) -> int:
        """Bytes of the float32 arrays in memory."""
        return sum(values.nbytes for values in self._tensors().values())

    def _tensors(self) -> dict[str, np.ndarray]:
        """Every array by its name in the file."""
        tensors = {
            slot_name(*slot, part): values
            for slot, delta in self.deltas.items()
            for part, values in delta.parts().items()
        }
        if self.prefix is not None:
            tensors |= {entry_name(*entry): values for entry, values in self.prefix.entries.items()}
        return tensors

    @cached_property
    def identity(self) -> str:
        """SHA-256 (hex) over names, shapes and little-endian float32 values, in order of name.

        The file, its dtype and its description do not enter: the same values are the same patch.
        """
        tensors = self._tensors()
        digest = hashlib.sha256(b"tp-patch identity 1\n")
        if self.prefix is not None:  # the ids and the position belong to what the entries do
            digest.update(f"prefix {list(self.prefix.replaces)} {self.prefix.position}\n".encode())
        for name in sorted(tensors):
            digest.update(f"{name} {list(tensors[name].shape)}\n".encode())
            digest.update(np.ascontiguousarray(tensors[name], "<f4").data)
        return digest.hexdigest()

    @cached_property
    def terms(self) -> Terms:
        """The ordered (identity, strength) of the patches this one is made of: its part of a cache key.

        A loaded, fitted or truncated patch is one term of strength 1. Strength 0 leaves no term: the base.
        """
        return () if self.is_base else ((self.identity, 1.0),)

    @property
    def is_base(self) -> bool:
        """Whether it changes nothing: no delta and no prefix."""
        return not self.deltas and self.prefix is None

    def require_weights_only(self, form: str) -> None:
        """Raise PatchTargetError if the patch has a KV prefix: `form`, a file of another tool, cannot hold one."""
        if self.prefix is not None:
            raise PatchTargetError(
                f"a {form} has no place for a KV prefix, and without it these weights are wrong",
                field="prefix",
                got=f"{len(self.prefix)} entries a head",
                wanted="a patch of weights alone",
                fix="fit the patch without --prefix",
            )

    def __repr__(self) -> str:
        kib = self.nbytes / 1024
        size = f"{len(self.deltas)} slots, rank {self.rank}, {kib:.0f} KiB"
        if self.prefix is not None:
            size = f"{len(self.prefix)} KV entries, {size}"
        return f"<Patch {self.name!r}: {self.config.method}, {size}>"

    # -- algebra ---------------------------------------------------------------------------------------------

    def __mul__(self, strength: Any) -> Patch:
        strength = _strength(strength)
        if strength == 1.0:
            return self
        terms = tuple((identity, _strength(strength * old)) for identity, old in self.terms)
        terms = tuple(term for term in terms if term[1] != 0.0)
        if terms and self.prefix is not None:
            raise PatchValueError(
                "a patch with a KV prefix has no strength but 1 and 0: entries of a cache cannot be scaled",
                field=self.name,
                got=f"strength {strength:g}",
                wanted="1 or 0",
                fix="scale a patch fitted without --prefix",
            )
        deltas = {slot: delta.scaled(strength) for slot, delta in self.deltas.items()} if terms else {}
        # The probe and the figures were measured at strength 1.
        return _made_of(deltas, replace(self.config, probe=None, fidelity=None, report=None), terms)

    __rmul__ = __mul__

    def __neg__(self) -> Patch:
        return -1.0 * self

    def __add__(self, other: Any) -> Patch:
        return _sum(self, other, "+") if isinstance(other, Patch) else NotImplemented

    def __radd__(self, other: Any) -> Patch:
        # sum([p, q]) starts from the integer 0.
        return self if isinstance(other, int) and other == 0 else NotImplemented

    def __sub__(self, other: Any) -> Patch:
        return _sum(self, -other, "-") if isinstance(other, Patch) else NotImplemented

    def truncate(self, rank: int) -> Patch:
        """Keep the first `rank` directions of every slot, and let the bias take the mean effect of the rest.

        Args:
            rank: the largest rank to keep, at least 1; slots of lower rank stay as they are.

        Returns:
            A patch of its own (own identity, one term of strength 1), with no probe and no held-out figures;
            this very patch if nothing is dropped.

        Raises:
            PatchValueError: `rank` is not a whole number >= 1, a slot lacks its mean, or the patch is a sum.
        """
        if isinstance(rank, bool) or not isinstance(rank, numbers.Integral) or rank < 1:
            raise PatchValueError(
                "not a rank", field="rank", got=repr(rank), wanted="a whole number >= 1", fix="pass rank >= 1"
            )
        if len(self.terms) > 1 or self.config.method == "composed":
            raise PatchValueError(
                "a sum's directions are no longer in order of energy",
                field=self.name,
                got=f"a patch of {max(2, len(self.terms))} or more patches",
                wanted="one fitted patch",
                fix="truncate each patch before adding",
            )
        if rank >= self.rank:
            return self
        deltas = {slot: delta.truncated(int(rank), slot) for slot, delta in self.deltas.items()}
        return Patch(deltas, replace(self.config, probe=None, fidelity=None, report=None), self.prefix)

    # -- files -----------------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str], dtype: str = "f16") -> None:
        """Write the patch file, whole or not at all; a file that is there is replaced.

        Args:
            path: ends in .safetensors.
            dtype: "f16" and "bf16" halve the file and round the values (so what is loaded again has another
                identity); "f32" keeps them.

        Raises:
            PatchTargetError: the patch holds no delta.
            PatchValueError: a value does not fit the dtype.
            PatchFormatError: an unknown dtype, or another suffix.
            OSError: the operating system's error; no file is left behind.
        """
        if self.is_base:
            raise PatchTargetError(
                "the patch holds no delta",
                field=self.name,
                got="0 slots",
                wanted="at least one",
                fix="strength 0 needs no file: unload the patch",
            )
        config = self.config.to_dict()
        if self.prefix is not None:
            config["prefix"] = {"replaces": list(self.prefix.replaces), "position": self.prefix.position}
        write_patch(path, self._tensors(), config, dtype)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Patch:
        """Read a patch file, checking everything in it.

        Raises:
            PatchFormatError: damaged, unsafe or not a patch.
            PatchVersionError: a version, method or key that this reader does not know.
            PatchTargetError: an unknown slot, half of a pair, or no delta at all.
            PatchShapeError: arrays of one slot that do not fit each other.
            PatchValueError: NaN or infinity.
        """
        slots, entries, config = read_patch(path)
        prefix = prefix_from(entries, config.pop("prefix", None))
        deltas = {slot: Delta(**parts) for slot, parts in slots.items()}
        return cls(deltas, PatchConfig.from_dict(config), prefix)


def _made_of(
    deltas: Mapping[SlotKey, Delta], config: PatchConfig, terms: Terms, prefix: KVPrefix | None = None
) -> Patch:
    """A patch whose terms are known: set before anyone asks, so that no digest is computed for them."""
    patch = Patch(deltas, config, prefix)
    patch.__dict__["terms"] = terms
    return patch


# -- parts of the algebra ------------------------------------------------------------------------------------


def _strength(value: Any) -> float:
    got = type(value).__name__
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        try:
            got = str(strength := float(value))
            # Past these bounds float32 deltas turn to zeros or infinities, and the terms would not tell.
            if strength == 0.0 or 1e-30 <= abs(strength) <= 1e30:
                return strength
        except OverflowError:
            got = "an integer too large for a float"
    raise PatchValueError(
        "not a strength",
        field="strength",
        got=got,
        wanted="a finite number, 0 or of magnitude 1e-30 to 1e30",
        fix="use a moderate factor, such as 0.5 or -1",
    )


def _sum(p: Patch, q: Patch, sign: str) -> Patch:
    """p + q, with `sign` for the name only."""
    if p.config.base_digest != q.config.base_digest:
        raise BaseMismatchError(
            "the patches were fitted on different base models",
            field="base_digest",
            got=f"{q.config.base_digest} ({q.config.base_model}, patch {q.name!r})",
            wanted=f"{p.config.base_digest} ({p.config.base_model}, patch {p.name!r})",
            fix="add patches of one base model",
        )
    config = _sum_config(p.config, q.config, sign)
    if q.is_base:  # adding no patch makes no sum: what is left can still be truncated and checked
        return p
    if p.is_base:
        return q
    if p.prefix is not None and q.prefix is not None:
        raise PatchValueError(
            "both patches carry a KV prefix, and only one can stand at the front",
            field=q.name,
            got="a KV prefix",
            wanted=f"none beside that of {p.name!r}",
            fix="fit one of them without --prefix",
        )
    deltas = dict(p.deltas)
    for slot, delta in q.deltas.items():
        deltas[slot] = deltas[slot].joined(delta, slot) if slot in deltas else delta
    return _made_of(deltas, config, p.terms + q.terms, p.prefix or q.prefix)


def _sum_config(p: PatchConfig, q: PatchConfig, sign: str) -> PatchConfig:
    """What can still be said of a sum: nothing that belongs to one fit."""
    quantised = {c.precision for c in (p, q)} - set(FLOAT_PRECISIONS)
    if len(quantised) > 1:
        raise BaseMismatchError(
            "the patches repair different quantised bases",
            field="precision",
            got=repr(q.precision),
            wanted=repr(p.precision),
            fix="add patches fitted on one precision",
        )
    if p.licence is None or q.licence is None:
        licence = None  # unknown for a part is unknown for the whole
    else:
        licence = p.licence if p.licence == q.licence else f"({p.licence}) AND ({q.licence})"
    return PatchConfig(
        name=f"{p.name}{sign}{q.name}",
        method="composed",
        base_model=p.base_model,
        base_digest=p.base_digest,
        architecture=p.architecture,
        precision=quantised.pop() if quantised else p.precision,
        context_digest=p.context_digest if p.context_digest == q.context_digest else "",
        licence=licence,
    )
