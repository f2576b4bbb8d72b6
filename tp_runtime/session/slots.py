"""This module checks a patch against the base and the slots of a graph, and builds the tensors that are bound."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from ..errors import BaseMismatchError, PatchShapeError, PatchTargetError, PatchValueError
from ..patch import FLOAT_PRECISIONS, Delta, Patch, SlotKey, Tensor, fitted_precision, slot_name
from .description import DigestChange, Slot
from .layer_kinds import entry_counts
from .model_folder import ModelFolder


def check_base(
    patch: Patch,
    base_model: str,
    base_digest: str,
    precision: str,
    change: DigestChange | None = None,
    weights_digest: str | None = None,
) -> None:
    """Check that `patch` was fitted on this base. A patch that repairs a quantised base fits that precision only.

    Args:
        patch: the patch.
        base_model: the name of the base, for the error.
        base_digest: the digest of the base.
        precision: the precision of the graph that the patch is to run on.
        change: the digest that earlier versions gave this base, if it was another one.
        weights_digest: the digest of the graph's quantised weights, if they were calibrated.

    Raises:
        BaseMismatchError: the patch was fitted on another base, or it repairs a base of another precision or with other
            calibrated weights, or it has the digest that earlier versions gave this base.
    """
    if change is not None and patch.config.base_digest == change.before:
        raise BaseMismatchError(
            f"the patch {patch.name!r} was fitted on this base under the digest of an earlier version, "
            f"which differs because {change.reason}",
            field="base_digest",
            got=f"{patch.config.base_digest[:16]} ({patch.config.base_model})",
            wanted=f"{base_digest[:16]} ({base_model})",
            fix="fit the patch again",
        )
    if patch.config.base_digest != base_digest:
        raise BaseMismatchError(
            f"the patch {patch.name!r} was fitted on another base model",
            field="base_digest",
            got=f"{patch.config.base_digest[:16]} ({patch.config.base_model})",
            wanted=f"{base_digest[:16]} ({base_model})",
            fix="fit the patch on this base, or use the base it was fitted on",
        )
    fits = fitted_precision(precision)
    if fitted_precision(patch.config.precision) not in (fits, *FLOAT_PRECISIONS):
        raise BaseMismatchError(
            f"the patch {patch.name!r} repairs a quantised base of another precision",
            field="precision",
            got=patch.config.precision,
            wanted=fits,
            fix=f"use the {patch.config.precision} export of the base, or fit the patch for {fits}",
        )
    fitted = patch.config.weights_digest
    if fitted is not None and weights_digest is not None and fitted != weights_digest:
        raise BaseMismatchError(
            f"the patch {patch.name!r} was fitted behind other weights of this precision, from another calibration",
            field="weights_digest",
            got=fitted[:16],
            wanted=weights_digest[:16],
            fix="fit the patch behind this folder: tp-export patch ... --student FOLDER",
        )


def check_patch(patch: Patch, folder: ModelFolder) -> None:
    """Check that `patch` can run on the graph of a folder.

    Raises:
        BaseMismatchError: as for `check_base`.
        PatchTargetError, PatchShapeError: as for `fit_slots`, or the shape of the KV prefix does not fit the model, or
            layers that share a cache length have different numbers of entries.
        PatchValueError: the KV prefix replaces an id that the model does not have, or holds a value that does not fit
            the graph's dtype.
    """
    check_base(
        patch, folder.base_model, folder.base_digest, folder.precision, folder.digest_change, folder.weights_digest
    )
    if patch.prefix is not None:
        kv = folder.kv
        patch.prefix.check(folder.layers, kv.heads, kv.head_dim, folder.vocab_size, folder.context_window)
        entry_counts(patch.prefix, folder.windowed, folder.route)
        patch.prefix.check_dtype(kv.numpy_dtype)
    fit_slots(patch, folder.slots)


def fit_slots(patch: Patch, slots: Mapping[SlotKey, Slot]) -> Mapping[SlotKey, Delta]:
    """Check that every delta of `patch` has a slot of its shape; return the deltas.

    Raises:
        PatchTargetError: the graph has no slot for a delta.
        PatchShapeError: the graph has fewer layers than the patch, or a slot has another shape than its delta.
    """
    layers = 1 + max((layer for layer, _ in slots), default=-1)
    sites = sorted({site for _, site in slots})
    for (layer, site), delta in patch.deltas.items():
        field = f"layers.{layer}.{site}"
        if layer >= layers:
            raise PatchShapeError(
                f"the patch {patch.name!r} has more layers than the graph",
                field=field,
                got=f"layer {layer}",
                wanted=f"0..{layers - 1}",
                fix="use the base model that the patch was fitted on",
            )
        slot = slots.get((layer, site))
        if slot is None:
            raise PatchTargetError(
                f"the graph has no slot for this delta of the patch {patch.name!r}",
                field=field,
                got=f"site {site}",
                wanted=f"one of {', '.join(sites) or 'no sites at all'}",
                fix="export the model with --slots mlp or --slots all, or fit the patch with --method output",
            )
        wanted = {"a": slot.inputs, "b": slot.outputs, "bias": slot.outputs}
        for part, size in wanted.items():
            tensor = delta.tensors.get(part)
            if tensor is not None and (got := tensor.shape[part == "b"]) != size:
                raise PatchShapeError(
                    f"a tensor of the patch {patch.name!r} does not fit the slot",
                    field=f"{field}.{part}",
                    got=got,
                    wanted=f"{size} {'inputs' if part == 'a' else 'outputs'}",
                    fix="use the base model that the patch was fitted on",
                )
    return patch.deltas


def folder_arrays(
    deltas: Mapping[SlotKey, Delta], folder: ModelFolder, only: set[SlotKey] | None = None
) -> dict[str, NDArray]:
    """Return the tensors to bind to the slots of a folder's graph, by graph input name.

    Args:
        deltas: the deltas of a patch, by (layer, site).
        folder: the folder.
        only: the slots to bind; None means all.

    Raises:
        PatchValueError: a value does not fit the dtype of the graph's slots.
    """
    arrays: dict[str, NDArray] = {}
    for key, slot in folder.slots.items():
        if only is None or key in only:
            arrays |= slot_arrays(deltas.get(key), slot, folder.kv.numpy_dtype)
    return arrays


def slot_arrays(delta: Delta | None, slot: Slot, dtype: DTypeLike) -> dict[str, NDArray]:
    """Return the tensors to bind to one slot, by graph input name.

    Args:
        delta: the patch's delta for the slot. None means no delta: rank 0 and a bias of zero, which is exactly the
            base.
        slot: the slot.
        dtype: the dtype of the graph's slots.

    Returns:
        The tensors a [1, in, rank], b [1, rank, out] and bias [1, 1, out].

    Raises:
        PatchValueError: a value does not fit the dtype.
    """
    tensors = {} if delta is None else as_added(delta, slot).tensors
    shapes = {"a": (slot.inputs, 0), "b": (0, slot.outputs), "bias": (slot.outputs,)}
    arrays = {}
    for name, (part, shape) in zip(slot.tensors, shapes.items(), strict=True):
        tensor = tensors.get(part)
        values = np.zeros(shape, dtype) if tensor is None else _converted(tensor, np.dtype(dtype))
        # Every patch is finite in float32; only a narrower dtype can fail to hold a value.
        if tensor is not None and values.dtype != np.float32 and not np.isfinite(values).all():
            raise PatchValueError(
                "a value does not fit the slot's precision",
                field=slot_name(slot.layer, slot.site, part),
                got=float(np.abs(tensor.float32()).max()),
                wanted=f"at most {np.finfo(dtype).max}",
                fix="use a smaller strength, or an fp32 export",
            )
        arrays[name] = values.reshape(1, -1, slot.outputs) if part == "bias" else values[None]
    return arrays


def as_added(delta: Delta, slot: Slot) -> Delta:
    """Return a delta as the graph adds it: times the slot's scale. All tensors that are bound come from here."""
    return delta if slot.scale == 1 else delta.scaled(slot.scale)


def _converted(tensor: Tensor, dtype: np.dtype[Any]) -> NDArray:
    """Return a tensor's values in a dtype; they share its memory if it holds them so."""
    held = tensor.native()
    if held.dtype == dtype:
        return np.ascontiguousarray(held)
    values = np.empty(tensor.shape, dtype)
    tensor.write(values)
    return values


def check_rows(values: Mapping[str, Any], batch: int) -> None:
    """Check that each slot tensor has one row for the whole batch, or one row for each sequence in it.

    Without this check ONNX would broadcast a batch of one over the rows of a patch and return the logits of the first.

    Args:
        values: the OrtValues of the slots, by graph input name.
        batch: the number of sequences in the run.

    Raises:
        PatchShapeError: a tensor has another number of rows.
    """
    for name, value in values.items():
        if (rows := value.shape()[0]) not in (1, batch):
            raise PatchShapeError(
                "the rows of a slot tensor do not match the batch",
                field=name,
                got=f"{rows} rows",
                wanted="1 row" if batch == 1 else f"1 or {batch} rows",
                fix="bind one patch for the whole batch, or one row for each sequence",
            )
