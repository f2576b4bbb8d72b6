"""BENCHMARKS.md from the measurements: no figure in it is typed by hand."""

from __future__ import annotations

import os
import re
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.speed import targets
from benchmarks.speed.plots import rank_ratios, share
from tp_runtime.storage import atomic_file

Run = dict[str, Any]

_TITLES = {
    "decode": "Decoding",
    "roofline": "How far from the memory's speed",
    "first-token": "First token against the length of the prompt",
    "context": "The four ways to carry a context: what each costs until the first token",
    "cold-start": "Cold start",
    "memory": "Memory after all rounds",
    "disk": "Size",
    "ranks": "What a rank costs",
    "switch": "Switching against the number of loaded patches",
    "loaded-patches": "Memory of loaded patches",
    "batch": "Batches in which every row has another patch",
}


def write(found: dict[str, Any], plots: dict[str, Path], out: Path) -> None:
    """The whole file, whole or not at all."""
    parts = [_head(found), targets.section(found)]
    for run in found["runs"]:
        parts.append(f"## {run['model']}, {_threads(run)}")
        parts += [_runtimes(run), _carrying(run), _slots(run), _ranks(run), _loaded(run), _batches(run), _left_out(run)]
    parts.append("## Plots")
    for name, path in plots.items():
        there = Path(os.path.relpath(path, out.parent)).as_posix()
        parts.append(f"{_TITLES[name]}:\n\n![{_TITLES[name]}]({there})")
    with atomic_file(out) as temporary:
        temporary.write_text("\n\n".join(filter(None, parts)) + "\n", encoding="utf-8")


def _head(found: dict[str, Any]) -> str:
    runs = found["runs"]
    machine, plan = runs[-1]["machine"], runs[-1]["plan"]
    versions = {k: v for run in runs for row in run["rivals"].values() for k, v in row["versions"].items()}
    speeds = ", ".join(
        f"{run['bytes_per_second'] / 1e9:.1f} GB/s with {_threads(run)}"
        for run in runs
        if run["model"] == runs[0]["model"]
    )
    load = max(run["machine"]["load_before"] for run in runs)
    busy = " (other work was running)" if load > 0.5 else ""
    remarks = "".join(f"\n- {remark}" for remark in dict.fromkeys(run.get("remark") for run in runs) if remark)
    commands = " and ".join(dict.fromkeys(f"`{run['command']}` on {run['date']}" for run in runs))
    return "# Benchmarks\n\n" + _wrapped(f"""\
Written by {commands}; `pip install -e '.[cpu,export,report,bench]'` first. Each figure is
a median of {plan["rounds"]} rounds (cold starts: {plan["cold"]}). A round asks the runtimes of each precision in turn,
in new processes that have warmed up, and the next one begins with another; all others are stopped meanwhile. Compare
within a precision of a table, not between machines or days.

- Machine: {machine.get("processor", "unknown")}, {machine["cpus"]} CPUs ({", ".join(machine.get("flags", []))}; L3
  {machine.get("l3", "unknown")}), {machine["memory_bytes"] / 1e9:.0f} GB, {machine["system"]}, Python
  {machine["python"]}; load average when a run began: at most {load:.1f}{busy}
- Memory read at: {speeds}
- Versions: {", ".join(f"{name} {version}" for name, version in sorted(versions.items()))}
- Weights: all runtimes compute with the same ones. The published 4-bit GGUF file was dequantised to float32, and every
  other file was made from those values; llama.cpp's Q8_0 and Q4_0 by its own quantiser from the published file.
- First token: greedy, from token ids to the next id, KV cache allocated in it; the prompt is the context and a question
  of {plan["question"]} tokens. Cold start: from starting a process to its first token after 32 tokens, files in the
  page cache. Memory: of the process, after its longest context; anonymous is what no file backs.
- tp-runtime asks Linux for huge pages (docs/serving.md), except for prepared folders; the others take what they are
  given. "No slots" is our export without them, which no patch fits: what empty slots cost.
- Cached prefix: a live cache rewound to the context's end, for every runtime that can. What tp-runtime's prefix cache
  finds is copied into the request's own buffers besides.
- Read: bytes of weights that a token needs, once each, KV not counted. Reached: the time to read them at the memory's
  speed, over the time a token took after the shortest context.{remarks}""")


def _wrapped(text: str) -> str:
    """Paragraphs and points filled to the width of the other documents."""
    parts = re.split(r"\n\s*\n|\n(?=- )", text)
    filled = [
        textwrap.fill(
            " ".join(part.split()),
            120,
            subsequent_indent="  " if part.startswith("- ") else "",
            break_long_words=False,
            break_on_hyphens=False,
        )
        for part in parts
    ]
    return "\n".join([filled[0], "", *filled[1:]])


def _runtimes(run: Run) -> str:
    rivals = run["rivals"].values()
    lengths = _lengths(name for row in rivals for name in row["first_s"] if name.startswith("prompt-"))
    decoded = _lengths(name for row in rivals for name in row["token_s"] if name.startswith("prompt-"))
    head = ["runtime", "disk MB", "load s", "cold start s", *(f"first token ms, {n}" for n in lengths)]
    head += [*(f"token ms, {n}" for n in decoded), "read MB", "reached", "peak MB", "anonymous MB"]
    rows = []
    for row in rivals:
        reached, memory = share(row, run["bytes_per_second"]), row["memory_worked"]
        rows.append([
            row["label"],
            _number(row["disk_bytes"], 1e-6, 0),
            _number(row.get("load_s"), 1, 2),
            _number(row.get("cold_start_s"), 1, 2),
            *(_number(row["first_s"].get(f"prompt-{n}"), 1e3, 0) for n in lengths),
            *(_number(row["token_s"].get(f"prompt-{n}"), 1e3, 2) for n in decoded),
            _number(row["token_bytes"], 1e-6, 0),
            "" if reached is None else f"{reached:.0%}",
            _number(memory.get("peak"), 1e-6, 0),
            _number(memory.get("anonymous"), 1e-6, 0),
        ])  # fmt: skip
    return _table(head, rows)


def _carrying(run: Run) -> str:
    rows, lengths = [], []
    for row in run["rivals"].values():
        first = row["first_s"]
        if "patch" not in first:
            continue
        lengths = _lengths(name for name in first if name.startswith("prompt-"))
        for n in lengths:
            times = (first.get(name) for name in ("none", f"prompt-{n}", f"cached-{n}", "patch"))
            steps = (row["token_s"].get(name) for name in (f"prompt-{n}", f"patched-{n}"))
            figures = [*(_number(t, 1e3, 0) for t in times), *(_number(t, 1e3, 2) for t in steps)]
            rows.append([row["label"].removeprefix("tp-runtime "), str(n), *figures])
    head = ["precision", "context", "no prompt ms", "prompt ms", "cached prefix ms", "patch ms"]
    head += ["token ms after it", "the same under a patch"]
    said = "First token of tp-runtime, by the way that a context is carried (patch: rank 16), and decoding after it:"
    return _table(head, rows, said)


def _slots(run: Run) -> str:
    """What slots cost while nothing is in them, by the set that an export has."""
    rows, sets = [], {"output (the default)": "ours-{}", "mlp": "slots-mlp-{}", "all": "slots-all-{}"}
    for bits in ("fp32", "int4"):
        keys = [f"slots-none-{bits}", *(key.format(bits) for key in sets.values())]
        found = [run["rivals"].get(key, {}).get("token_s", {}) for key in keys]
        for length in _lengths(name for name in found[0] if name.startswith("prompt-")):
            ratios = [
                f"{targets.ratio(run, 'token', key, keys[0], length):.3f}" if tokens else ""
                for key, tokens in zip(keys[1:], found[1:], strict=True)
            ]
            rows.append([bits, str(length), f"{1e3 * found[0][f'prompt-{length}']:.2f}", *ratios])
    return _table(
        ["precision", "context", "no slots ms", *sets], rows, "A token with empty slots, over one without any:"
    )


def _ranks(run: Run) -> str:
    rows = []
    for bits, bench in run["patches"].items():
        ratios = dict(rank_ratios(bench))
        if ratios:
            base = bench["arms"][0]["token_ms"]
            rows.append([bits, f"{base:.2f}", *(f"{ratio:.3f}" for ratio in ratios.values())])
            head = ["precision", "base ms", *(f"rank {rank}" for rank in ratios)]
    if not rows:
        return ""
    said = "Per-token time with a random patch in every slot, over the base's; rank 0 is the base again (noise):"
    return _table(head, rows, said)


def _loaded(run: Run) -> str:
    rows = [
        [
            bits,
            str(row["patches"]),
            f"{row['switch_ms']:.3f}",
            f"{1e3 * row['switch_ms'] / bench['patch_slots']:.2f}",
            _number(row["anonymous_bytes"], 1e-6, 1),
            _number(row["patch_bytes"], 1e-6, 2),
        ]
        for bits, bench in run["patches"].items()
        for row in bench.get("resident", ())
    ]
    head = ["precision", "patches loaded", "switch ms", "µs a slot", "more memory MB", "one patch's tensors MB"]
    return _table(head, rows, "Loaded patches of rank 16:")


def _batches(run: Run) -> str:
    rows = [
        [bits, str(row["rows"]), *(f"{row[k]:.1f}" for k in ("base_ms", "patched_ms")), f"{row['ratio_per_step']:.3f}"]
        for bits, batch in run["batches"].items()
        for row in batch.get("sizes", ())
    ]
    head = ["precision", "rows", "all base ms", "all different patches ms", "ratio"]
    return _table(head, rows, "A step of a batch:")


def _left_out(run: Run) -> str:
    """Nothing is left out silently."""
    lines = [f"- {key}: {reason}" for key, reason in run["left_out"].items()]
    lines += [f"- making {key}: {reason}" for key, reason in run["not_prepared"].items()]
    for key, row in run["rivals"].items():
        for reason in dict.fromkeys(row["failed"].values()):
            names = ", ".join(name for name, its in row["failed"].items() if its == reason)
            lines.append(f"- {key} ({names}): {reason}")
    for what in ("patches", "batches"):
        lines += [f"- {what} {bits}: {one['failed']}" for bits, one in run[what].items() if "failed" in one]
    return "Not measured:\n\n" + "\n".join(lines) if lines else ""


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], said: str = "") -> str:
    if not rows:
        return ""
    lines = [head, ["---", *("---:" for _ in head[1:])], *rows]
    text = "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
    return f"{said}\n\n{text}" if said else text


def _number(value: float | None, scale: float, digits: int) -> str:
    return "" if value is None else f"{scale * value:.{digits}f}"


def _lengths(names: Iterable[str]) -> list[int]:
    return sorted({int(name.rpartition("-")[2]) for name in names})


def _threads(run: Run) -> str:
    return f"{run['threads']} thread{'s' if run['threads'] > 1 else ''}"
