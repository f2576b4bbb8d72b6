"""From a source model to an exported folder: docs/model-folder.md says what lies in it.

The folder is written beside its place and renamed when it is whole, so an interruption leaves nothing behind.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from tqdm import tqdm

from tp_runtime.atomic import atomic_folder
from tp_runtime.errors import DeviceUnavailableError, ModelFormatError
from tp_runtime.folder import KV, DefaultPatch, ModelFolder, Slot, describe_files, write_slots_file
from tp_runtime.graph import Graph
from tp_runtime.patch import Delta, Patch
from tp_runtime.slots import check_base, fit_slots

from . import onnx_slots, onnx_trace
from .adapters import kv_shape
from .genai import write_genai_config
from .progress import clock
from .slot_modules import SLOT_SETS, slots_of
from .source import Source, load_model
from .weights_only import refuse_prefix

PRECISIONS = ("fp32",)
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
        overwrite: replace an existing folder, once the new one is whole.

    Returns:
        `out`.

    Raises:
        ModelFormatError: unknown architecture, slot set, route or precision, no route can export it, or `out` is taken.
        BaseMismatchError, PatchTargetError, PatchShapeError: `patch` does not fit.
    """
    if precision not in PRECISIONS:
        raise ModelFormatError("unknown precision", field="precision", got=precision, wanted=" | ".join(PRECISIONS))
    if route not in ROUTES:
        raise ModelFormatError("unknown route", field="route", got=route, wanted=" | ".join(ROUTES))
    if slot_set not in SLOT_SETS:
        raise ModelFormatError("unknown slot set", field="slot_set", got=slot_set, wanted=" | ".join(SLOT_SETS))
    if patch is not None:
        check_base(patch, source.name, source.digest, precision)
        refuse_prefix(patch, "graph")
    with clock("load weights"):
        model = load_model(source)
    slots = slots_of(model, slot_set)
    deltas: Mapping[tuple[int, str], Delta] = {}
    if patch is not None:
        deltas = fit_slots(patch, {(slot.layer, slot.site): slot for slot in slots})
    with atomic_folder(out, overwrite=overwrite) as folder:
        with clock("trace the graph"):
            graph, route = _trace(model, slots, route)
        with clock("write the folder"):
            if route == "fused":  # optimum's names are put right where it exports
                onnx_slots.name_weights(graph)
            onnx_slots.name_dimensions(graph)
            onnx_slots.add_first_logit(graph)
            carrying = onnx_slots.make_slots_overridable(graph, slots, deltas, np.dtype(np.float32))
            written = onnx_slots.save(graph, folder, carrying)
            written.append(write_genai_config(model.config.get_text_config(), source.codec.eos_ids, folder))
            files = describe_files(folder, written + _copy_companions(source.path, folder))
            write_slots_file(_describe(source, model, folder, slots, route, precision, patch, files))
        with clock("check the export against torch"):
            check_export(model, folder)
    return out


def _trace(model: Any, slots: list[Slot], route: str) -> tuple[ir.Model, str]:
    """The graph, and the route it came by. Torch, transformers and onnxscript raise anything at all."""
    if route != "optimum":
        try:
            return onnx_trace.trace(model, slots), "fused"
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
        from . import onnx_optimum  # seconds of imports that the usual route does not need

        return onnx_optimum.trace(model, slots), "optimum"
    except ModelFormatError:
        raise
    except Exception as error:
        raise ModelFormatError(f"optimum cannot export it: {_reason(error)}", field="route", got=route) from error


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
    patch: Patch | None,
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
        context_window=onnx_trace.context_window(config),
        kv=KV(*kv_shape(config), "f32"),
        slots={(slot.layer, slot.site): slot for slot in slots},
        default_patch=None if patch is None else DefaultPatch(patch.name, patch.identity, patch.terms),
        files=files,
    )


def check_export(model: Any, folder: Path, tolerance: float = 1e-2) -> None:
    """Compare the exported graph with the torch model on a few tokens, with nothing bound in the slots.

    A wrong export must not leave the host; parity proper is the test suite's. Skipped where no ONNX Runtime is
    installed.

    Raises:
        ModelFormatError: the logits differ by more than `tolerance`.
    """
    try:
        graph = Graph(ModelFolder.open(folder), device="cpu")
    except DeviceUnavailableError:
        return
    rng = np.random.default_rng(0)
    ids = rng.integers(0, min(graph.folder.vocab_size, 1000), 24)
    got = graph.forward(ids.tolist(), graph.new_cache(graph.base), graph.base, all_logits=True)
    with torch.no_grad():
        wanted = model(torch.from_numpy(ids)[None], use_cache=False).logits[0].numpy()
    error = float(np.abs(got - wanted).max())
    if not error <= tolerance:
        raise ModelFormatError(
            "the exported graph does not compute what the model does",
            field="logits",
            got=f"max abs error {error:.2g}",
            wanted=f"at most {tolerance:g}",
            fix="report this architecture",
        )
