"""What each precision of one model costs: the table of docs/precision.md.

    python benchmarks/precision.py SRC FOLDER... [--patch FILE --prompt-file FILE] [--queries FILE]

SRC is the source, FOLDERs are exports of it (tp-export model --precision ...). KL in nats a token of what the folder's
graph says to what the float32 torch model says: on held-out text, on its own answers to the queries, and, with a patch
fitted in float32, to the prompted model. One line of JSON a folder.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from tp_export.measure import fidelity
from tp_export.quantise import held_out_text, log_probabilities
from tp_export.queries import load_questions
from tp_export.rollout import dialogues_for
from tp_export.source import load_model, open_source
from tp_runtime.patch import Patch
from tp_runtime.session import Graph, ModelFolder

DEMO = Path(__file__).parent.parent / "demo"


def main() -> None:
    """Measure the folders one after the other."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("src")
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--patch", type=Path, help="fitted in float32")
    parser.add_argument("--prompt-file", type=Path, default=DEMO / "pirate.txt", help="what it stands for")
    parser.add_argument("--queries", type=Path, default=DEMO / "held-out.txt")
    args = parser.parse_args()
    source = open_source(args.src)
    model = load_model(source)
    ids = source.codec.render(held_out_text(), raw=True)
    reference = log_probabilities(model, torch.tensor([ids]))
    queries, teacher = load_questions(args.queries), fidelity.torch_student(model)
    plain = dialogues_for(source, model, None, queries, 48)
    patch = None if args.patch is None else Patch.load(args.patch)
    prompted = dialogues_for(source, model, args.prompt_file.read_text().strip(), queries, 48) if patch else []
    for folder in args.folders:
        graph = Graph(ModelFolder.open(folder), "cpu")
        got = torch.from_numpy(graph.run(list(ids), graph.base)).log_softmax(-1)
        base = fidelity.runtime_student(graph)
        figures = {
            "precision": graph.folder.precision + (" repaired" if graph.repair else ""),
            "megabytes": round(sum(f.stat().st_size for f in folder.glob("*.onnx*")) / 1e6, 1),
            "kl_text": round(float((reference.exp() * (reference - got)).sum(-1).mean()), 4),
            "top1_text": round(float((reference.argmax(-1) == got.argmax(-1)).float().mean()), 3),
        }
        if graph.folder.precision != "fp32":  # it is the reference itself
            figures["kl_answers"] = round(fidelity.measure_fidelity(plain, teacher, base, base).kl_patched, 4)
        if patch is not None:
            measured = fidelity.measure_fidelity(prompted, teacher, base, fidelity.runtime_student(graph, patch))
            figures |= {
                "kl_prompted_unpatched": round(measured.kl_unpatched, 4),
                "kl_prompted_patched": round(measured.kl_patched, 4),
                "gap_closed": round(measured.gap_closed, 4),
            }
        print(json.dumps(figures), flush=True)


if __name__ == "__main__":
    main()
