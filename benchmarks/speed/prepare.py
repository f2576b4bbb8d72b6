"""Prepares the files that the runtimes are measured on, one folder for each model, and keeps files that exist.

    source              a link to the fetched Hugging Face folder
    ours-PRECISION      the export of `tp-export model --precision`; genai runs on it too
    prepared-PRECISION  the same export after `tp-runtime prepare`
    ours-int4-head4     the int4 export with a 4-bit head as well, as genai's builder has it; it also runs with window
                        caches, which need no other files
    slots-SET-PRECISION the same export with other slots: none (slotless.py), mlp, all
    optimum             optimum's own export
    genai-PRECISION     the graph of onnxruntime-genai's builder, from a separate environment (genai_graphs.py)
    *.gguf              the published file and its re-quantised versions (gguf_files.py)

If a step fails, the runtimes that need its files are left out with the reason, and all other steps still run.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

MODELS = ("smollm2-135m-instruct", "gemma-3-270m")
BITS = ("fp32", "int8", "int4")
# Maps a folder's name to the value that --precision takes. `int4-rtn` has the operators and the bytes of `int4`, which
# first calibrates several quantisers for minutes and chooses one; only the values of the weights differ.
_PRECISIONS = {"fp32": "fp32", "int8": "int8", "int4": "int4-rtn", "int4-head4": "int4-symmetric-head4"}
_HERE = Path(__file__).parent.parent


def prepare(name: str, folder: Path, builder: str | None) -> dict[str, str]:
    """Make the files that are missing.

    Args:
        name: the name of a base model that has a manifest.
        folder: the folder for its files.
        builder: the Python of an environment with onnxruntime-genai's builder, or None.

    Returns:
        For each file or folder that could not be made, the reason.
    """
    folder.mkdir(parents=True, exist_ok=True)
    failed: dict[str, str] = {}
    source = folder / "source"
    if not source.exists():
        found = run_step([*program("tp_export", "fetch"), name], failed, "source")
        if found is None:
            return failed
        source.symlink_to(found.strip().splitlines()[-1])
    for bits, precision in _PRECISIONS.items():
        out = folder / f"ours-{bits}"
        if not (out / "patch_slots.json").exists():
            run_step(
                [*program("tp_export", "model"), str(source), str(out), "--precision", precision], failed, out.name
            )
        if bits not in ("fp32", "int4") or out.name in failed:
            continue
        prepared = folder / f"prepared-{bits}"
        if not prepared.exists():
            shutil.copytree(out, prepared, ignore=shutil.ignore_patterns("prepared"))
            run_step([*program("tp_runtime", "prepare"), str(prepared)], failed, prepared.name)
        for slots in ("none", "mlp", "all"):
            out = folder / f"slots-{slots}-{bits}"
            if not (out / "patch_slots.json").exists():
                made = [sys.executable, str(_HERE / "slotless.py")]
                if slots != "none":
                    made = [*program("tp_export", "model"), "--slots", slots]
                run_step([*made, str(source), str(out), "--precision", precision], failed, out.name)
    if not (folder / "optimum" / "config.json").exists():
        command = ["-m", "optimum.exporters.onnx", "--model", str(source), "--task", "text-generation-with-past"]
        run_step([sys.executable, *command, str(folder / "optimum")], failed, "optimum")
    if any(not (folder / f"{kind}.gguf").exists() for kind in ("published", "q8_0", "q4_0")):
        run_step([sys.executable, str(_HERE / "gguf_files.py"), name, str(folder)], failed, "*.gguf")
    for bits in BITS:
        out = folder / f"genai-{bits}"
        if not (out / "genai_config.json").exists():
            if builder is None:
                failed[out.name] = (
                    "--builder is missing; benchmarks/genai_graphs.py describes how to make its environment"
                )
                continue
            made = folder / "genai"
            script = [builder, str(_HERE / "genai_graphs.py"), str(source), str(made), "--precisions", bits]
            if run_step(script, failed, out.name) is not None:
                (made / bits).rename(out)
                made.rmdir()
    return failed


def program(package: str, command: str) -> list[str]:
    """Return the command line that runs a command of `tp_export` or `tp_runtime` with this Python."""
    return [sys.executable, "-c", f"from {package}.cli import main; raise SystemExit(main())", command]


def run_step(command: Sequence[str], failed: dict[str, str], what: str) -> str | None:
    """Run one step and return its stdout. On failure return None, and keep its last line on stderr as the reason."""
    print(f"preparing {what}", file=sys.stderr, flush=True)
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode == 0:
        return done.stdout
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    failed[what] = lines[-1] if lines else f"exit code {done.returncode}"
    print(f"  failed: {failed[what]}", file=sys.stderr, flush=True)
    return None
