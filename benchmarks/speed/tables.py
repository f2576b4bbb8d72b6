"""Writes BENCHMARKS.md from the measurements, so that no figure in it is typed by hand."""

from __future__ import annotations

import os
import re
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.speed import targets
from benchmarks.speed.plots import rank_ratios, share
from tp_runtime.storage import ANY_FILE, atomic_file

Run = dict[str, Any]

_TITLES = {
    "decode": "Time per decoded token",
    "roofline": "Share of the memory bandwidth that decoding uses",
    "first-token": "Time to the first token against the length of the context",
    "context": "Time to the first token with a prompt, a cached prefix or a patch",
    "cold-start": "Cold start",
    "memory": "Memory after all rounds",
    "disk": "Size on disk",
    "ranks": "Slowdown per token against the rank of a patch",
    "switch": "Time to switch to another patch against the number of loaded patches",
    "loaded-patches": "Memory of loaded patches",
    "batch": "Throughput of batches in which every row has a different patch",
}


def write(found: dict[str, Any], plots: dict[str, Path], out: Path) -> None:
    """Write the file atomically."""
    parts = [_head(found), targets.section(found)]
    for run in found["runs"]:
        parts.append(f"## {run['model']}, {_threads(run)}")
        parts += [_runtimes(run), _contexts(run), _slots(run), _ranks(run), _loaded(run), _batches(run), _left_out(run)]
    parts.append("## Plots")
    for name, path in plots.items():
        relative = Path(os.path.relpath(path, out.parent)).as_posix()
        parts.append(f"{_TITLES[name]}:\n\n![{_TITLES[name]}]({relative})")
    with atomic_file(out, ANY_FILE) as temporary:
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
    busy = " (other programs were running)" if load > 0.5 else ""
    commands = " and ".join(dict.fromkeys(f"`{run['command']}` on {run['date']}" for run in runs))
    return "# Benchmarks\n\n" + _wrapped(f"""\
These figures come from {commands}. The benchmarks need
`pip install -e '.[cpu,export,report,bench]'` first. Each figure is the median of {plan["rounds"]} rounds (cold starts:
{plan["cold"]}). A round measures the runtimes of one precision one after another, in new processes that have warmed up,
and the next round begins with another runtime. All other processes are stopped meanwhile. Compare figures within one
precision of a table, not between machines or days.

- Machine: {machine.get("processor", "unknown")}, {machine["cpus"]} CPUs ({", ".join(machine.get("flags", []))}; L3
  {machine.get("l3", "unknown")}), {machine["memory_bytes"] / 1e9:.0f} GB, {machine["system"]}, Python
  {machine["python"]}; load average at the start of a run: at most {load:.1f}{busy}
- Memory bandwidth, reading: {speeds}
- Versions: {", ".join(f"{name} {version}" for name, version in sorted(versions.items()))}
- Weights: all runtimes compute with the same weights. The published 4-bit GGUF file was dequantised to float32, and
  every other file was made from those values. llama.cpp's own quantiser made Q8_0 and Q4_0 from the published file.
  tp-runtime's int4 is `int4-rtn` here, which has the operators and the bytes of the calibrated `int4-gptq`.
- First token: the time from the token ids to the next id with greedy decoding, including the allocation of the KV
  cache. The prompt is the context followed by a question of {plan["question"]} tokens.
- Cold start: the time from the start of a process to its first token after 32 tokens, with the files in the page cache.
  Every runtime also loads the model's tokenizer, as an application does (llama.cpp reads it with the model).
- Memory: the memory of the process after its longest context. Anonymous memory is the part
  that no file backs.
- The contexts of --long are read by two runtimes only, on a model that has both in its table (int4 of genai's own
  graph, and tp-runtime's 4-bit head with window caches); the memory of these two is that after the longest of them.
- Huge pages: tp-runtime requests them from Linux (docs/serving.md), except for prepared folders. The other runtimes do
  not request them.
- Labels: "our graph" is tp-runtime's export, and "its graph" comes from genai's own builder. "No slots" is tp-runtime's
  export without slots. No patch fits it, and the comparison shows what empty slots cost.
- Cached prefix: a KV cache that holds the context is rewound to the end of the context, for every runtime that can
  rewind. A hit in tp-runtime's prefix cache also copies the entries into the request's own buffers.
- MB per token: the bytes of weights that a token needs, each counted once, without keys and values.
- Bandwidth used: the time to read these bytes at the memory bandwidth, divided by the measured time per token after the
  shortest context.""")


def _wrapped(text: str) -> str:
    """Fill paragraphs and list items to the width of the other documents."""
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
    head = ["runtime", "disk MB", "load s", "cold start s", *(f"first token ms, context {n}" for n in lengths)]
    head += [*(f"token ms, context {n}" for n in decoded), "MB per token", "bandwidth used", "peak MB", "anonymous MB"]
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


def _contexts(run: Run) -> str:
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
    head += ["token ms after the prompt", "token ms with the patch"]
    caption = (
        "Time to the first token of tp-runtime without a context, with it as a prompt, with it as a cached prefix, and "
        "with a patch of rank 16 instead; then the time per decoded token:"
    )
    return _table(head, rows, caption)


def _slots(run: Run) -> str:
    """Return the table of what empty slots cost, for each set of slots that an export can have."""
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
        ["precision", "context", "no slots ms", *sets],
        rows,
        "Decode time with each set of empty slots, divided by that without slots:",
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
    caption = (
        "Decode time with a random patch in every slot, divided by that of the base. Rank 0 measures the base once "
        "more and shows the noise:"
    )
    return _table(head, rows, caption)


def _loaded(run: Run) -> str:
    rows = [
        [
            bits,
            str(row["patches"]),
            f"{row['switch_ms']:.3f}",
            f"{1e3 * row['switch_ms'] / bench['patch_slots']:.2f}",
            f"{row['convert_ms']:.2f}",
            _number(row["anonymous_bytes"], 1e-6, 1),
            _number(row["files_bytes"], 1e-6, 1),
            _number(row["converted_bytes"], 1e-6, 1),
        ]
        for bits, bench in run["patches"].items()
        for row in bench.get("resident", ())
    ]
    head = [
        "precision",
        "patches loaded",
        "switch ms",
        "switch µs per slot",
        "switch with conversion ms",
        "additional memory MB",
        "files MB",
        "kept converted MB",
    ]
    return _table(head, rows, "Switch time and memory with loaded patches of rank 16:")


def _batches(run: Run) -> str:
    rows = [
        [bits, str(row["rows"]), *(f"{row[k]:.1f}" for k in ("base_ms", "patched_ms")), f"{row['ratio_per_step']:.3f}"]
        for bits, batch in run["batches"].items()
        for row in batch.get("sizes", ())
    ]
    head = ["precision", "rows", "base ms", "different patches ms", "median ratio"]
    return _table(
        head, rows, "One decode step of a batch, with the base in every row and with a different patch in every row:"
    )


def _left_out(run: Run) -> str:
    """Return the list of everything that was not measured, with the reasons."""
    lines = [f"- {key}: {reason}" for key, reason in run["left_out"].items()]
    lines += [f"- preparing {key}: {reason}" for key, reason in run["not_prepared"].items()]
    for key, row in run["rivals"].items():
        for reason in dict.fromkeys(row["failed"].values()):
            names = ", ".join(name for name, its in row["failed"].items() if its == reason)
            lines.append(f"- {key} ({names}): {reason}")
    for what in ("patches", "batches"):
        lines += [f"- {what} {bits}: {one['failed']}" for bits, one in run[what].items() if "failed" in one]
    return "Not measured:\n\n" + "\n".join(lines) if lines else ""


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], caption: str = "") -> str:
    if not rows:
        return ""
    lines = [head, ["---", *("---:" for _ in head[1:])], *rows]
    text = "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
    return f"{caption}\n\n{text}" if caption else text


def _number(value: float | None, scale: float, digits: int) -> str:
    return "" if value is None else f"{scale * value:.{digits}f}"


def _lengths(names: Iterable[str]) -> list[int]:
    return sorted({int(name.rpartition("-")[2]) for name in names})


def _threads(run: Run) -> str:
    return f"{run['threads']} thread{'s' if run['threads'] > 1 else ''}"
