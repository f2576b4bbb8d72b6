"""From a source model to an exported folder: docs/model-folder.md says what lies in it.

The folder is written beside its place and renamed when it is whole, so an interruption leaves nothing behind.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from tqdm import tqdm

from tp_runtime.errors import DeviceUnavailableError, ModelFormatError
from tp_runtime.patch import FLOAT_PRECISIONS, Delta, Patch
from tp_runtime.session import (
    DEFAULT_FILE,
    KV,
    DefaultPatch,
    Graph,
    ModelFolder,
    Slot,
    check_base,
    describe_files,
    fit_slots,
    write_slots_file,
)
from tp_runtime.storage import atomic_folder

from ..decoder import SLOT_SETS, kv_shape, patched, slots_of
from ..fit import repair_patch
from ..progress import clock
from ..quantise import (
    MEASURED,
    QuantisedStudent,
    check_precision,
    float_weights,
    log_probabilities,
    measured_precision,
    quantised,
)
from ..source import Source, load_model
from .genai_config import write_genai_config
from .half import store_in_bf16, to_fp16
from .names import name_dimensions, name_nodes, name_vectors, name_weights
from .quantise import quantise
from .simplify import simplify
from .slots import add_first_logit, make_slots_overridable, save_graph
from .trace import context_window, trace

ROUTES = ("auto", "fused", "optimum")
# What travels with the graph: what users of Hugging Face and ONNX expect in a folder, and the licence.
_COPIED = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "LICENSE",
    "GEMMA_TERMS.html",
)


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
        source: the model.
        out: the folder to make.
        slot_set: `output`, `mlp` or `all` (slot_modules.SLOT_SETS).
        route: `fused` (onnx_trace), `optimum` (onnx_optimum), or `auto`: optimum where the first fails.
        precision: of the weights; one of PRECISIONS.
        patch: a patch whose deltas become the defaults of the slots.
        repair: fit a patch that makes up for what a quantised precision costs, make it the default and put it beside
            the graph: the base of this folder is then the repaired one, and patches fitted in float32 are added to it.
        overwrite: replace an existing folder, once the new one is whole.

    Returns:
        `out`.

    Raises:
        ModelFormatError: unknown architecture, slot set, route or precision, no route can export it, or `out` is taken.
        BaseMismatchError, PatchTargetError, PatchShapeError: `patch` does not fit.
    """
    check_precision(precision)
    if route not in ROUTES:
        raise ModelFormatError("unknown route", field="route", got=route, wanted=" | ".join(ROUTES))
    if slot_set not in SLOT_SETS:
        raise ModelFormatError("unknown slot set", field="slot_set", got=slot_set, wanted=" | ".join(SLOT_SETS))
    if patch is not None:
        check_base(patch, source.name, source.digest, precision)
        patch.require_weights_only("graph")
    if repair and (patch is not None or precision in FLOAT_PRECISIONS):
        raise ModelFormatError(
            "nothing to repair" if patch is None else "one default is enough",
            field="repair",
            got=precision if patch is None else f"a default patch, {patch.name!r}",
            wanted="a quantised precision, and no other default patch",
            fix="add patches to a repaired base when it runs",
        )
    with clock("load weights"):
        model = load_model(source)
    if precision == MEASURED:
        with clock("measure the quantisers"):
            precision = measured_precision(source, model, precision)
    slots = slots_of(model, slot_set)
    if repair:
        patch = repair_patch(source, model, precision, slots)
    deltas: Mapping[tuple[int, str], Delta] = {}
    if patch is not None:
        deltas = fit_slots(patch, {(slot.layer, slot.site): slot for slot in slots})
    with atomic_folder(out, overwrite=overwrite) as folder:
        with clock("trace the graph"):
            graph, route = _trace(model, slots, route)
        with clock("write the folder"):
            if route == "fused":  # optimum's names are put right where it exports
                name_weights(graph)
                name_vectors(graph, _vectors(model))
                simplify(graph)
            name_dimensions(graph)
            add_first_logit(graph)
            carrying = make_slots_overridable(graph, slots, deltas, np.dtype(np.float32))
            _lower(graph, model, route, precision)
            if route == "fused":
                name_nodes(graph)
            written = save_graph(graph, folder, carrying)
            written.append(write_genai_config(model.config.get_text_config(), source.codec.eos_ids, folder))
            if patch is not None:
                patch.save(folder / DEFAULT_FILE, "f32")
                written.append(DEFAULT_FILE)
            files = describe_files(folder, written + _copy_companions(source.path, folder))
            default = None if patch is None else DefaultPatch(patch.name, patch.identity, patch.terms, repair)
            write_slots_file(_describe(source, model, folder, slots, route, precision, default, files))
        with clock("check the export against torch"):
            check_export(model, folder)
    return out


def _trace(model: Any, slots: list[Slot], route: str) -> tuple[ir.Model, str]:
    """The graph, and the route it came by. Torch, transformers and onnxscript raise anything at all."""
    if route != "optimum":
        try:
            return trace(model, slots), "fused"
        except Exception as error:
            if route == "fused":
                raise ModelFormatError(
                    f"cannot be traced with fused attention: {_reason(error)}",
                    field="route",
                    got=route,
                    fix="use route auto",
                ) from error
            tqdm.write(f"warning: no fused attention, falling back to optimum: {_reason(error)}", file=sys.stderr)
    try:
        from . import optimum_route as onnx_optimum  # seconds of imports that the usual route does not need

        return onnx_optimum.trace(model, slots), "optimum"
    except ModelFormatError:
        raise
    except Exception as error:
        raise ModelFormatError(f"optimum cannot export it: {_reason(error)}", field="route", got=route) from error


def _vectors(model: Any) -> dict[str, np.ndarray]:
    return {
        name: vector.detach().float().cpu().numpy() for name, vector in model.named_parameters() if vector.dim() == 1
    }


def _lower(graph: ir.Model, model: Any, route: str, precision: str) -> None:
    """Bring a float32 graph to `precision`; in place."""
    if precision == "fp16":
        if route != "fused":  # its norms square activations in the open, and squares leave float16 first
            raise ModelFormatError(
                "no fp16 for a graph without fused operators", field="precision", got=precision, wanted="another one"
            )
        to_fp16(graph)
    elif precision == "bf16":
        store_in_bf16(graph)
    elif precision not in FLOAT_PRECISIONS:
        quantise(graph, quantised(precision), float_weights(model))


def _reason(error: BaseException) -> str:
    """What went wrong first, in one line: exporters wrap it in pages of advice."""
    while (cause := error.__cause__ or error.__context__) is not None:
        error = cause
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def _copy_companions(source: Path, folder: Path) -> list[str]:
    present = [name for name in _COPIED if (source / name).is_file()]
    for name in present:
        shutil.copyfile(source / name, folder / name)
    return present


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
        kv=KV(*kv_shape(config), "f16" if precision == "fp16" else "f32"),
        slots={(slot.layer, slot.site): slot for slot in slots},
        default_patch=default,
        files=files,
    )


def check_export(model: Any, folder: Path) -> None:
    """Compare the exported graph with the torch model on a few tokens, with nothing bound in the slots.

    A wrong export must not leave the host; parity proper is the test suite's. Skipped where no ONNX Runtime is
    installed. A quantised graph is compared with the torch model in the same weights, a repaired one with the repair.

    Raises:
        ModelFormatError: the graph says something else than the model.
    """
    try:
        graph = Graph(ModelFolder.open(folder), device="cpu")
    except DeviceUnavailableError:
        return
    precision = graph.folder.precision
    ids = np.random.default_rng(0).integers(0, min(graph.folder.vocab_size, 1000), 24)
    got = torch.from_numpy(graph.run(ids.tolist(), graph.base)).log_softmax(-1)
    with ExitStack() as stack:
        if precision not in FLOAT_PRECISIONS:
            stack.enter_context(QuantisedStudent(model, quantised(precision)).whole())
        if graph.repair is not None:
            stack.enter_context(patched(model, graph.repair))
        wanted = log_probabilities(model, torch.from_numpy(ids)[None])
    error, loss = float((got - wanted).abs().max()), float((wanted.exp() * (wanted - got)).sum(-1).mean())
    # In float32 the two are the same sums in another order; below, every activation is rounded on the way.
    if not (error <= 1e-2 if precision == "fp32" else loss <= 0.1):
        raise ModelFormatError(
            "the exported graph does not compute what the model does",
            field="logits",
            got=f"max abs error {error:.2g}, KL {loss:.2g}",
            wanted="at most 0.01" if precision == "fp32" else "a KL of at most 0.1",
            fix="use --precision fp32, or report this architecture",
        )
