"""Runs the load test: 16 clients, 8 patches, and every answer equal to the one that a single request got.

    python -m benchmarks.serve MODEL_DIR [--seconds 300] [--rival-python PYTHON --gguf FILE [--lora FILE]] [--out FILE]

MODEL_DIR is a float32 folder, because greedy answers of quantised folders may change with the number of rows. The
clients are locust's. The result is one JSON file: answers, errors, throughput, percentiles of the first token, and the
resident memory of the server at the end of the first minute and at the end. With --rival-python the same clients ask
llama-cpp-python's server, which that interpreter has, for the same model with and without an adapter.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from runtime_tests.patches import patch_for
from tp_runtime.session import ModelFolder

CLIENTS, PATCHES = 16, 8
PROMPTS = ["The river was high, and the old bridge", "To bake bread you need"]


def free_port() -> int:
    """Return a port that nothing listens on."""
    with socket.socket() as made:
        made.bind(("127.0.0.1", 0))
        return int(made.getsockname()[1])


@contextlib.contextmanager
def running(command: list[str], url: str, log: Path) -> Iterator[int]:
    """Run a server until the block ends; yield its process id once it answers."""
    with log.open("wb") as sink:
        process = subprocess.Popen(command, stdout=sink, stderr=sink)
    try:
        while True:
            if process.poll() is not None:
                raise SystemExit(f"{command[0]} ended with {process.returncode}; see {log}")
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/v1/models"):
                break
            time.sleep(0.5)
        yield process.pid
    finally:
        process.terminate()
        process.wait(60)


def ask(url: str, body: dict[str, Any]) -> str:
    """Return the answer to one request."""
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{url}/v1/completions", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=600) as response:
        return json.loads(response.read())["choices"][0]["text"]


def resident(pid: int) -> int:
    """Return the resident memory of a process in bytes."""
    status = Path(f"/proc/{pid}/status").read_text()
    return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmRSS")))


def load(url: str, pid: int, asked: list[dict[str, Any]], seconds: int, scratch: Path) -> dict[str, Any]:
    """Run the clients, and return what they and the memory of the server did."""
    plan = scratch / "plan.json"
    plan.write_text(json.dumps({"asked": asked}), encoding="utf-8")
    sizes: list[tuple[float, int]] = []
    done, start = threading.Event(), time.monotonic()

    def watch() -> None:
        while not done.wait(1.0):
            sizes.append((time.monotonic() - start, resident(pid)))

    watching = threading.Thread(target=watch)
    watching.start()
    stats = scratch / "load"
    command = [sys.executable, "-m", "locust", "--headless", "-f", str(Path(__file__).with_name("users.py"))]
    command += ["-u", str(CLIENTS), "-r", str(CLIENTS), "-t", f"{seconds}s", "-s", "60", "--host", url]
    command += ["--csv", str(stats), "--only-summary"]
    environment = {**os.environ, "SERVE_PLAN": str(plan)}
    code = subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode
    done.set()
    watching.join()
    with Path(f"{stats}_stats.csv").open(newline="") as file:
        rows = {row["Name"]: row for row in csv.DictReader(file) if row["Type"] == "answer"}
    with Path(f"{stats}_failures.csv").open(newline="") as file:
        errors = [row["Error"] for row in csv.DictReader(file)]
    whole, first = rows["whole answer"], rows["first token"]
    at = min(60.0, seconds / 2)
    early = [size for when, size in sizes if at - 5 <= when <= at + 5]
    late = [size for when, size in sizes if seconds - 10 <= when <= seconds]
    mean_early, mean_late = sum(early) / len(early), sum(late) / len(late)
    rate = float(whole["Requests/s"])
    return {
        "seconds": seconds,
        "answers": int(whole["Request Count"]),
        "errors": int(whole["Failure Count"]),
        "first_errors": errors[:5],
        "locust_exit_code": code,
        "answers_per_second": rate,
        "tokens_per_second": rate * float(whole["Average Content Size"]),
        "first_token_ms": {"p50": float(first["50%"]), "p99": float(first["99%"])},
        "whole_answer_ms": {"p50": float(whole["50%"]), "p99": float(whole["99%"])},
        "resident_mb": {"minute 1": mean_early / 1e6, "end": mean_late / 1e6},
        "resident_growth": mean_late / mean_early - 1,
    }


def bodies(models: list[str], tokens: int) -> list[dict[str, Any]]:
    """Return the requests: every prompt under every name."""
    common = {"max_tokens": tokens, "temperature": 0}
    return [{"body": {"model": name, "prompt": prompt, **common}} for name in models for prompt in PROMPTS]


def measure_ours(folder: Path, seconds: int, rows: int, tokens: int, threads: int, scratch: Path) -> dict[str, Any]:
    """Measure tp-runtime with its patches in one batch."""
    patches = scratch / "patches"
    patches.mkdir()
    for number in range(PATCHES):
        patch_for(ModelFolder.open(folder), number, scale=0.02).save(patches / f"patch-{number}.safetensors")
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    code = "import sys; from tp_runtime.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", code, "serve", str(folder), "--port", str(port), "--rows", str(rows)]
    command += ["--patch-dir", str(patches), "--device", "cpu", "--threads", str(threads)]
    with running(command, url, scratch / "ours.log") as pid:
        asked = bodies([f"patch-{number}" for number in range(PATCHES)], tokens)
        for one in asked:
            one["answer"] = ask(url, one["body"])
        answers = len({one["answer"] for one in asked})
        return {"different_answers": answers, **load(url, pid, asked, seconds, scratch)}


def measure_rival(
    python: str, gguf: Path, lora: Path | None, seconds: int, tokens: int, threads: int, scratch: Path
) -> dict[str, Any]:
    """Measure llama-cpp-python's server. It runs one request at a time, and has the adapter that it started with."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = [python, "-m", "llama_cpp.server", "--model", str(gguf), "--port", str(port), "--n_ctx", "2048"]
    # By default a new request cuts the stream of the one that runs.
    command += ["--n_threads", str(threads), "--interrupt_requests", "false"]
    command += ["--model_alias", "model"] + ([] if lora is None else ["--lora_path", str(lora)])
    with running(command, url, scratch / "rival.log") as pid:
        asked = bodies(["model"], tokens)
        for one in asked:
            one["answer"] = ask(url, one["body"])
        return load(url, pid, asked, seconds, scratch)


def main() -> None:
    """Measure, and write the result."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path, metavar="MODEL_DIR", help="a float32 folder")
    parser.add_argument("--seconds", type=int, default=300, help="how long the clients ask (default 300)")
    parser.add_argument("--rows", type=int, default=8, help="rows of the batch (default 8)")
    parser.add_argument("--tokens", type=int, default=24, help="tokens of each answer (default 24)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="threads of each server (default: cores)")
    parser.add_argument("--rival-python", help="an interpreter that has llama-cpp-python[server]")
    parser.add_argument("--gguf", type=Path, help="the same model at the same bits, for llama.cpp")
    parser.add_argument("--lora", type=Path, help="an adapter for llama.cpp, which is loaded at the start")
    parser.add_argument("--rival-seconds", type=int, default=60)
    parser.add_argument("--out", type=Path, default=Path("build/serve.json"))
    args = parser.parse_args()
    found: dict[str, Any] = {"clients": CLIENTS, "patches": PATCHES, "tokens": args.tokens}
    found |= {"cores": os.cpu_count(), "threads": args.threads, "rows": args.rows}
    found["load_before"] = os.getloadavg()
    with tempfile.TemporaryDirectory() as name:
        found["tp-runtime"] = measure_ours(args.model, args.seconds, args.rows, args.tokens, args.threads, Path(name))
        if args.rival_python and args.gguf:
            for lora in [None] if args.lora is None else [None, args.lora]:
                title = "llama-cpp-python, no adapter" if lora is None else "llama-cpp-python, one adapter"
                scratch = Path(name)
                found[title] = measure_rival(
                    args.rival_python, args.gguf, lora, args.rival_seconds, args.tokens, args.threads, scratch
                )
    found["load_after"] = os.getloadavg()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
