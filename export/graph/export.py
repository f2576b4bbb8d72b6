"""Export a source model to a folder; docs/model-folder.md describes what the folder contains.

The folder is written under a temporary name next to its final one and renamed when it is complete, so an interruption
leaves nothing behind.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from tqdm import tqdm

from tp_runtime.errors import ModelFormatError, printable
from tp_runtime.patch import FLOAT_PRECISIONS, Delta, Patch, SlotKey
from tp_runtime.session import (
    DEFAULT_FILE,
    KV,
    MODEL_FOLDER,
    DefaultPatch,
    ModelFolder,
    Slot,
    check_base,
    describe_files,
    fit_slots,
    write_slots_file,
)
from tp_runtime.storage import atomic_folder, check_output_folder, system_errors

from ..decoder import SLOT_SETS, blocks_of, kv_shape, slots_of
from ..fit import repair_patch, student_for
from ..progress import clock
from ..quantise import QuantisedStudent, as_student, check_precision, computes_in_float16
from ..source import Source, load_model
from .companions import companion_files
from .device_steps import add_device_steps
from .genai_config import write_genai_config
from .half import store_in_bf16, to_fp16
from .names import name_dimensions, name_nodes, name_vectors, name_weights
from .parity import check_export, prose_ids
from .quantise import quantise
from .residual import residual_scale, scale_residual
from .simplify import simplify
from .slots import add_first_logit, make_slots_overridable, save_graph
from .trace import context_window, trace
from .windowed import separate_windowed

ROUTES = ("auto", "fused", "optimum")


def export_model(
    source: Source,
    out: Path,
    *,
    slot_set: str = "output",
    route: str = "auto",
    precision: str = "fp32",
    patch: Patch | None = None,
    repair: bool = False,
    overwrite: bool = False,
) -> Path:
    """Export `source` to the folder `out` with patch slots.

    Args:
        source: the model to export.
        out: the path of the folder to create.
        slot_set: the name of the set of sites that get a slot: `output`, `mlp` or `all` (slot_modules.SLOT_SETS).
        route: the name of the exporter: `fused` (trace.py), `optimum` (optimum_route.py), or `auto`, which takes
            `optimum` if `fused` fails.
        precision: the precision of the weights, one of PRECISIONS.
        patch: a patch whose deltas become the defaults of the slots.
        repair: whether to fit a patch that compensates what a quantised precision costs. That patch becomes the default
            of the slots and is stored next to the graph. The base of this folder is then the repaired one, and patches
            that were fitted in float32 are added to it.
        overwrite: whether to replace an existing folder, once the new one is complete. Only a folder is replaced that
            this function wrote, that holds nothing else, and that is not part of `source` and does not hold it.

    Returns:
        `out`.

    Raises:
        ModelFormatError: the architecture, the slot set, the route or the precision is unknown, no route can export the
            model, the precision does not suit the route or the weights, `repair` is set for a float precision or
            together with `patch`, or the exported graph does not compute what the model computes.
        OutputError: `out` holds something that is not replaced, or is, holds or lies in the folder of `source`; this is
            found before the work.
        BaseMismatchError: `patch` was fitted on another base model, another precision or other calibrated weights.
        PatchTargetError: `patch` addresses a slot that the graph does not have, or has a KV prefix.
        PatchShapeError: `patch` has more layers than the graph, or the shape of a delta does not fit its slot.
        UnsafePathError: a licence file has a name that a model folder cannot list.
        OSError: the operating system reports an error, for example because the disk is full.
    """
    check_precision(precision)
    if route not in ROUTES:
        raise ModelFormatError("the route is unknown", field="route", got=route, wanted=" | ".join(ROUTES))
    if slot_set not in SLOT_SETS:
        raise ModelFormatError("the slot set is unknown", field="slot_set", got=slot_set, wanted=" | ".join(SLOT_SETS))
    if route == "optimum" and computes_in_float16(precision):
        raise _needs_fused(precision, "the route optimum has none")
    if patch is not None:
        check_base(patch, source.name, source.digest, precision, source.digest_change)
        patch.require_weights_only("graph")
    if repair and (patch is not None or precision in FLOAT_PRECISIONS):
        raise ModelFormatError(
            "a float precision has nothing to repair" if patch is None else "a folder has one default patch only",
            field="repair",
            got=precision if patch is None else f"a default patch, {patch.name!r}",
            wanted="a quantised precision, and no other default patch",
            fix="add patches to the repaired base at run time",
        )
    replaces = MODEL_FOLDER if overwrite else None
    check_output_folder(out, replaces, [source.path])
    companions = companion_files(source)
    with clock("load weights"):
        model = load_model(source)
    with clock("quantise the weights"):
        student = student_for(source, model, precision)
    if student is not None:
        precision = student.name
        if patch is not None:  # only now are the weights known that it has to be fitted behind
            change, digest = source.digest_change, student.weights_digest
            check_base(patch, source.name, source.digest, precision, change, digest)
    slots = slots_of(model, slot_set)
    if repair:
        assert student is not None
        patch = repair_patch(source, model, student, slots)
    deltas: Mapping[SlotKey, Delta] = {}
    if patch is not None:
        deltas = fit_slots(patch, {(slot.layer, slot.site): slot for slot in slots})
    # The graph holds references to the model's weights until it is saved, and they are the student's.
    with atomic_folder(out, replaces, [source.path]) as folder, system_errors(), as_student(student):
        with clock("trace the graph"):
            graph, route = _trace(model, slots, route, precision)
        with clock("write the folder"):
            if route == "fused":  # the optimum route has named its weights already
                name_weights(graph)
                name_vectors(graph, _vectors(model))
                simplify(graph)
            name_dimensions(graph)
            add_first_logit(graph)
            windowed = separate_windowed(graph) if route == "fused" else None
            # Scales of blocks would become too small for float16, so quantised weights that write to the residual
            # stream are not scaled; what overflows then is refused by the check.
            writes_by_norms = blocks_of(model)[0].adapter.attention_norm is not None
            if computes_in_float16(precision) and (student is None or writes_by_norms):
                scale = residual_scale(model, prose_ids(source.codec, model.config.get_text_config().vocab_size))
                if scale < 1:
                    tqdm.write(f"the residual stream is scaled by {scale} to fit float16", file=sys.stderr)
                    slots = scale_residual(graph, slots, scale)
            default_values = make_slots_overridable(graph, slots, deltas, np.dtype(np.float32))
            _lower(graph, student, precision)
            config = model.config.get_text_config()
            best = add_device_steps(graph, config.vocab_size) if computes_in_float16(precision) else None
            if route == "fused":
                name_nodes(graph)
            written = save_graph(graph, folder, default_values)
            written.append(write_genai_config(config, context_window(config), source.codec.eos_ids, folder))
            if patch is not None:
                patch.save(folder / DEFAULT_FILE, "f32")
                written.append(DEFAULT_FILE)
            for name, content in companions.items():
                (folder / name).write_bytes(content)
            files = describe_files(folder, [*written, *companions])
            default = None if patch is None else DefaultPatch(patch.name, patch.identity, patch.terms, repair)
            described = _describe(source, model, folder, slots, route, precision, default, files)
            digest = None if student is None else student.weights_digest
            write_slots_file(replace(described, windowed=windowed, best=best, weights_digest=digest))
        with clock("check the export against torch"):
            parity = check_export(source.codec, model, folder, student)
        tqdm.write("not checked: no ONNX Runtime" if parity is None else f"checked {parity}", file=sys.stderr)
    return out


def _trace(model: Any, slots: list[Slot], route: str, precision: str) -> tuple[ir.Model, str]:
    """Return the graph and the route that exported it; the errors of the exporters become ModelFormatError."""
    if route != "optimum":
        try:
            return trace(model, slots), "fused"
        except Exception as error:  # torch, transformers and onnxscript raise errors of any type
            if route == "fused":
                raise ModelFormatError(
                    f"the model cannot be traced with fused attention: {_reason(error)}",
                    field="route",
                    got=route,
                    fix="use --route auto",
                ) from error
            if computes_in_float16(precision):
                raise _needs_fused(precision, _reason(error)) from error
            tqdm.write(f"warning: fused attention failed, falling back to optimum: {_reason(error)}", file=sys.stderr)
    try:
        from . import optimum_route  # its imports take seconds, and the usual route does not need them

        return optimum_route.trace(model, slots), "optimum"
    except ModelFormatError:
        raise
    except Exception as error:
        raise ModelFormatError(
            f"optimum cannot export the model: {_reason(error)}", field="route", got=route
        ) from error


def _vectors(model: Any) -> dict[str, np.ndarray]:
    return {
        name: vector.detach().float().cpu().numpy() for name, vector in model.named_parameters() if vector.dim() == 1
    }


def _needs_fused(precision: str, reason: str) -> ModelFormatError:
    """Return the error for the route `optimum`: its unfused norms square activations, which overflows float16 first."""
    return ModelFormatError(
        f"a graph without fused operators cannot run in float16: {reason}",
        field="precision",
        got=precision,
        wanted="another precision",
    )


def _lower(graph: ir.Model, student: QuantisedStudent | None, precision: str) -> None:
    """Convert a graph of float32 weights, those of the student, to `precision`; changes it in place."""
    if precision == "bf16":
        store_in_bf16(graph)
    elif student is not None:
        quantise(graph, student)
    if computes_in_float16(precision):
        to_fp16(graph)  # after the weights are in blocks, so that only their scales are rounded


def _reason(error: BaseException) -> str:
    """Return the first line of the first error: exporters wrap that error in others, and add pages of advice."""
    while (cause := error.__cause__ or error.__context__) is not None:
        error = cause
    return printable(f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]:.300}")


def _describe(
    source: Source,
    model: Any,
    folder: Path,
    slots: list[Slot],
    route: str,
    precision: str,
    default: DefaultPatch | None,
    files: dict[str, Any],
) -> ModelFolder:
    config = model.config.get_text_config()
    return ModelFolder(
        path=folder,
        architecture=source.architecture,
        base_model=source.name,
        base_digest=source.digest,
        precision=precision,
        style=source.style,
        route=route,
        layers=config.num_hidden_layers,
        vocab_size=config.vocab_size,
        context_window=context_window(config),
        kv=KV(*kv_shape(config), "f16" if computes_in_float16(precision) else "f32"),
        slots={(slot.layer, slot.site): slot for slot in slots},
        default_patch=default,
        files=files,
        digest_change=source.digest_change,
    )
