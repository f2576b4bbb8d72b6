"""Measures the cost of a fit: seconds against rows N, width d, layers L and rank r, and peak memory against model size.

    python benchmarks/fit_cost.py [--out docs/fit-cost.svg] [--json FILE]

The script fits random Llama-like models with the form `output`. Each measurement runs in its own process, so that its
peak memory belongs to no other. Each time is the median of --repeats runs. The predicted curve counts floating point
operations and divides them by the rate of a matrix product on this machine:

    both passes        2 sides * T tokens * 2 p,   p = 4 d^2 + 3 d f weights per layer
    MLP of the rows    2 * N * 2 * 3 d f           (teacher and student once more, for the targets)
    moments and solve  N (f^2 + f d) + f^3 / 3 + 2 f^2 d + d^3, in float64, counted twice

The plot shows this curve and the measured times. Where the two differ, something other than arithmetic takes time.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

BASE = {"rows": 512, "width": 256, "layers": 6, "rank": 16}
SWEEPS: dict[str, tuple[int, ...]] = {
    "rows": (128, 256, 512, 1024, 2048),
    "width": (128, 256, 384, 512),
    "layers": (3, 6, 12, 24),
    "rank": (1, 4, 16, 64),
}
SIZES = (4, 8, 16, 32)  # layers of the models whose peak memory is measured, d = 512
PROMPT, ANSWER = 32, 32


def flops(rows: int, width: int, layers: int, rank: int) -> float:
    """Return the number of operations of one fit, by the formulas in the module docstring."""
    f, d = 3 * width, width
    tokens = rows // ANSWER * (2 * PROMPT + ANSWER + PROMPT + ANSWER)  # teacher and student sequences
    passes = tokens * 2 * (4 * d * d + 3 * d * f)
    again = 2 * rows * 2 * 3 * d * f
    solve = 2 * (2 * rows * (f * f + f * d) + f**3 / 3 + 2 * f * f * d + d**3)
    return layers * (passes + again + solve)


def fit_once(rows: int, width: int, layers: int, rank: int, folder: str, offload: bool) -> dict[str, float]:
    """Run one fit in this process.

    Returns:
        The seconds of the fit, its peak resident memory beyond that of the imports, and the size of the weights file.
        Both sizes are in bytes.
    """
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    from tp_export.fit import Settings, fit_lockstep
    from tp_export.rollout import Dialogue
    from tp_export.source import Source, load_model
    from tp_runtime.bench import memory_bytes

    def ids(count: int, seed: int) -> tuple[int, ...]:
        return tuple(torch.randint(3, 500, (count,), generator=torch.Generator().manual_seed(seed)).tolist())

    path = Path(folder) / f"d{width}-l{layers}"
    if not path.exists():
        config = LlamaConfig(
            hidden_size=width,
            intermediate_size=3 * width,
            num_hidden_layers=layers,
            num_attention_heads=width // 64,
            num_key_value_heads=width // 64,
            vocab_size=512,
            tie_word_embeddings=True,
        )
        AutoModelForCausalLM.from_config(config).save_pretrained(path)
        return fit_in_new_process(rows, width, layers, rank, folder, offload)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak, which was that of the imports or of the parent
    before = memory_bytes("VmRSS")
    if offload:
        config = json.loads((path / "config.json").read_text())
        model = load_model(Source(path, path.name, config, codec=None), offload=True)  # type: ignore[arg-type] # no text
    else:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    context = ids(PROMPT, 0)
    dialogues = [
        Dialogue((1, *context, *ids(PROMPT, s)), (1, *ids(PROMPT, s)), ids(ANSWER, s + 1))
        for s in range(rows // ANSWER)
    ]
    start = time.perf_counter()
    fit_lockstep(model, dialogues, "output", Settings(rank))
    seconds = time.perf_counter() - start
    peak = memory_bytes("VmHWM")
    assert before is not None and peak is not None
    weights = sum(file.stat().st_size for file in path.glob("*.safetensors"))
    return {"seconds": seconds, "peak": peak - before, "weights": weights}


def fit_in_new_process(*arguments: Any) -> dict[str, float]:
    """Run `fit_once` in its own process."""
    command = [sys.executable, __file__, "--one", json.dumps(arguments)]
    found: dict[str, float] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return found


def rate() -> float:
    """Return the operations per second of a float32 matrix product on this machine."""
    import torch

    a, times = torch.randn(1024, 1024), []
    for _ in range(9):
        start = time.perf_counter()
        a @ a
        times.append(time.perf_counter() - start)
    return 2 * 1024**3 / statistics.median(times)


def measure(repeats: int) -> dict[str, Any]:
    """Run every sweep and measure the memory peaks."""
    from tqdm import tqdm

    speed = rate()
    found: dict[str, Any] = {"flops_per_second": speed, "sweeps": {}, "memory": []}
    total = sum(map(len, SWEEPS.values())) + len(SIZES)
    with tempfile.TemporaryDirectory() as folder, tqdm(total=total, desc="fits") as bar:
        for name, values in SWEEPS.items():
            points = []
            for value in values:
                at = {**BASE, name: value}
                runs = [fit_in_new_process(*at.values(), folder, False)["seconds"] for _ in range(repeats)]
                predicted = flops(**at) / speed
                points.append({name: value, "seconds": statistics.median(runs), "predicted": predicted})
                bar.update()
            found["sweeps"][name] = points
        for layers in SIZES:
            plain, offloaded = (fit_in_new_process(256, 512, layers, 16, folder, offload) for offload in (False, True))
            found["memory"].append(
                {"weights": plain["weights"], "in memory": plain["peak"], "--offload": offloaded["peak"]}
            )
            bar.update()
    return found


def draw(found: dict[str, Any], out: Path) -> None:
    """Draw one figure with a panel for each sweep and a panel for memory."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 5.6), layout="constrained")
    panels = list(figure.subplots(2, 3).flat)
    for axes, (name, points) in zip(panels, found["sweeps"].items(), strict=False):
        at = [point[name] for point in points]
        axes.plot(at, [point["seconds"] for point in points], "o-", color="#c4512d", label="measured")
        axes.plot(at, [point["predicted"] for point in points], "--", color="#1c6ba0", label="predicted")
        symbol = {"rows": "N", "width": "d", "layers": "L", "rank": "r"}[name]
        axes.set(xlabel=f"{name} {symbol}", ylabel="seconds", xscale="log", yscale="log")
        axes.set_xticks(at, [str(value) for value in at])
        axes.minorticks_off()
        axes.legend(frameon=False)
    at = [point["weights"] / 1e6 for point in found["memory"]]
    for variant, colour in (("in memory", "#c4512d"), ("--offload", "#1c6ba0")):
        panels[4].plot(at, [point[variant] / 1e6 for point in found["memory"]], "o-", color=colour, label=variant)
    panels[4].set(xlabel="weights, MB", ylabel="peak memory of the fit, MB", xlim=(0, None), ylim=(0, None))
    panels[4].legend(frameon=False)
    panels[5].set_axis_off()
    figure.savefig(out)


def main() -> None:
    """Measure and draw, or run with --one the single fit that the parent process requests."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("docs/fit-cost.svg"))
    parser.add_argument("--json", type=Path, help="a file to write the figures to as well")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(fit_once(*json.loads(args.one))))
        return
    found = measure(args.repeats)
    draw(found, args.out)
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
