"""Measures what each precision of one model costs: the table of docs/precision.md.

    python benchmarks/precision.py SRC FOLDER... [--patch FILE --prompt-file FILE] [--queries FILE]
    python benchmarks/precision.py SRC --quantisers [NAME...] [--off-grid]

SRC is the source of the model, and each FOLDER is an export of it (tp-export model --precision ...). The script prints
one line of JSON for each folder. A KL figure is the divergence of the folder's graph from the float32 torch model, in
nats per token. The script measures it on held-out text and on the torch model's own answers to the queries. With the
patch of a prompt, it also measures the divergence of the patched graph from the prompted torch model. With a patch that
only repairs, the figures are those of the graph under the repair.

With --quantisers the script compares quantisers of int4 in torch (all of `--precision int4` unless some are named), on
the model's own weights, or with --off-grid on weights off any grid (off_grid.py). The texts are the held-out text and
documents of benchmarks/contexts; no quantiser is calibrated on any of them. A standard error takes the tokens as
independent.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from off_grid import move_off_grid

from tp_export.fit import calibration_texts
from tp_export.measure import RuntimeStudent, TorchStudent, measure_fidelity
from tp_export.quantise import INT4, QuantisedStudent, held_out_text, log_probabilities, quantised, token_kl
from tp_export.queries import load_questions
from tp_export.rollout import Prompting, dialogues_for
from tp_export.source import Source, load_model, open_source
from tp_runtime.patch import Patch
from tp_runtime.session import Graph, ModelFolder

DEMO = Path(__file__).parent.parent / "demo"
CONTEXTS = Path(__file__).parent / "contexts"
DOCUMENTS = ("policy.txt", "handbook.txt", "operators.txt")
TOKENS = 1024  # of a text, at most


def main() -> None:
    """Compare the quantisers, measure the folders, or both."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("src")
    parser.add_argument("folders", nargs="*", type=Path)
    parser.add_argument("--patch", type=Path, help="a patch of the prompt, or a repair of the folders")
    parser.add_argument("--prompt-file", type=Path, default=DEMO / "pirate.txt", help="the prompt it replaces")
    parser.add_argument("--queries", type=Path, default=DEMO / "held-out.txt")
    parser.add_argument("--quantisers", nargs="*", metavar="NAME", help="compare the quantisers of int4 in torch")
    parser.add_argument("--off-grid", action="store_true", help="compare them on weights off any grid")
    args = parser.parse_args()
    source = open_source(args.src)
    model = load_model(source)
    if args.quantisers is not None:
        compare_quantisers(source, model, args.quantisers or INT4, args.off_grid)
    if args.folders:
        measure_folders(args, source, model)


def compare_quantisers(source: Source, model: Any, names: Sequence[str], off_grid: bool) -> None:
    """Measure quantisers of int4 in torch, on the model's own weights or on weights off any grid."""
    documents = "\n".join((CONTEXTS / name).read_text() for name in DOCUMENTS)
    texts = {"text": held_out_text(), "documents": documents}
    window = min(TOKENS, model.config.max_position_embeddings)
    read = {name: torch.tensor([source.codec.render(text, raw=True)[:window]]) for name, text in texts.items()}
    calibrated = any(quantised(name).calibrated is not None for name in names)
    calibration = calibration_texts(source, model) if calibrated else ()
    if off_grid:
        move_off_grid(model)
    exact = {name: log_probabilities(model, ids) for name, ids in read.items()}
    for name in names:
        start = time.perf_counter()
        student = QuantisedStudent.of(model, quantised(name), calibration)
        figures: dict[str, Any] = {"weights": "off any grid" if off_grid else "own", "precision": name}
        figures["seconds"] = round(time.perf_counter() - start, 1)
        with student.whole():
            for text, ids in read.items():
                figures |= kl_figures(text, exact[text], log_probabilities(model, ids))
        print(json.dumps(figures), flush=True)


def kl_figures(text: str, reference: torch.Tensor, got: torch.Tensor) -> dict[str, float]:
    """Return the mean KL on a text with its standard error, which takes the tokens as independent."""
    kl = token_kl(reference, got)
    return {f"kl_{text}": round(float(kl.mean()), 4), f"kl_{text}_se": round(float(kl.std()) / len(kl) ** 0.5, 4)}


def measure_folders(args: argparse.Namespace, source: Source, model: Any) -> None:
    """Measure exported folders, one after another."""
    ids = source.codec.render(held_out_text(), raw=True)
    reference = log_probabilities(model, torch.tensor([ids]))
    queries, teacher = load_questions(args.queries), TorchStudent(model)
    plain = dialogues_for(model, Prompting(source.codec, None), queries, 48)
    given = None if args.patch is None else Patch.load(args.patch)
    repairs = given is not None and given.config.context_digest == ""
    patch, repair = (None, given) if repairs else (given, None)
    asked = Prompting(source.codec, args.prompt_file.read_text().strip())
    prompted = dialogues_for(model, asked, queries, 48) if patch else []
    for folder in args.folders:
        graph = Graph(ModelFolder.open(folder), "cpu")
        got = torch.from_numpy(graph.run(list(ids), graph.bind(repair))).log_softmax(-1)
        base = RuntimeStudent(graph, repair)
        figures = {
            "precision": graph.folder.precision + (" repaired" if graph.repair or repair else ""),
            "megabytes": round(sum(f.stat().st_size for f in folder.glob("*.onnx*")) / 1e6, 1),
            **kl_figures("text", reference, got),
            "top1_text": round(float((reference.argmax(-1) == got.argmax(-1)).float().mean()), 3),
        }
        if graph.folder.precision != "fp32":  # fp32 is the precision of the reference itself
            figures["kl_answers"] = round(measure_fidelity(plain, teacher, base, base).kl_patched, 4)
        if patch is not None:
            measured = measure_fidelity(prompted, teacher, base, RuntimeStudent(graph, patch))
            figures |= {
                "kl_prompted_unpatched": round(measured.kl_unpatched, 4),
                "kl_prompted_patched": round(measured.kl_patched, 4),
            }
            beside = ("gap_closed", "gap_closed_se", "gap_closed_first", "gap_closed_first_se", "top1_agreement")
            figures |= {name: round(value, 4) for name, value in measured.to_dict().items() if name in beside}
        print(json.dumps(figures), flush=True)


if __name__ == "__main__":
    main()
