#!/usr/bin/env bash
# Runs the GPU tests and the benchmark on any CUDA machine, from a fresh checkout:
#     runtime_tests/gpu/run.sh [RESULTS]      (default: build/gpu)
# The script makes a virtual environment in RESULTS/venv, runs runtime_tests/gpu, and then runs `tp-runtime bench` on
# the fp32, fp16, int4 and int4-fp16 exports of SmolLM2-135M and of Gemma 3 270M, for float16 ones also with captured
# steps. It writes the GPU, the driver, the versions, the test results and every figure to RESULTS/report.json. It exits
# with 1 if a test or a benchmark failed.
set -euo pipefail

start=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
results=${1:-build/gpu}
[[ $results = /* || -z ${1:-} ]] || results=$start/$results
mkdir -p "$results"
results=$(cd "$results" && pwd)
bin=$results/venv/bin

if ! command -v nvidia-smi > /dev/null; then
    echo "error: nvidia-smi was not found; this script needs a machine with an NVIDIA GPU and its driver" >&2
    exit 2
fi
nvidia-smi --query-gpu=name,driver_version,compute_cap,memory.total --format=csv,noheader | tee "$results/gpu.csv"

# torch is installed first and with its exact version. The cpu extra must not be installed, because the two builds of
# ONNX Runtime share one folder.
torch=$(sed -n 's/^ *"\(torch==[^"]*\)".*/\1/p' pyproject.toml)
"${PYTHON:-python3}" -m venv "$results/venv"
"$bin/python" -m pip install --quiet --disable-pip-version-check "$torch"
"$bin/python" -m pip install --quiet --disable-pip-version-check --editable '.[gpu,export,report,test]'

failed=()
rm -f "$results"/{steps.jsonl,tests.xml,bench-*.json}
TP_REQUIRE_GPU=1 TP_GPU_RESULTS=$results/steps.jsonl \
    "$bin/python" -m pytest runtime_tests/gpu -s --junitxml "$results/tests.xml" || failed+=(tests)

for name in smollm2-135m-instruct gemma-3-270m; do
    if ! base=$("$bin/tp-export" fetch "$name"); then
        failed+=("fetch-$name")
        continue
    fi
    for precision in fp32 fp16 int4 int4-fp16; do
        model=$results/model-$name-$precision
        if ! "$bin/tp-export" model "$base" "$model" --precision "$precision" --overwrite; then
            failed+=("export-$name-$precision")
            continue
        fi
        modes=("")
        [[ $precision != *fp16 ]] || modes+=(--cuda-graphs)
        for mode in "${modes[@]}"; do
            "$bin/tp-runtime" bench "$model" --device cuda $mode --ranks 0,1,4,16,64 --resident 1,10,100 --tokens 64 \
                -o "$results/bench-$name-$precision$mode.json" || failed+=("bench-$name-$precision$mode")
        done
    done
done

"$bin/python" - "$results" "${failed[@]}" <<'PYTHON'
import json
import platform
import sys
from importlib import metadata
from pathlib import Path
from xml.etree import ElementTree

results, failed = Path(sys.argv[1]), sys.argv[2:]
names = ("name", "driver", "compute_capability", "memory")
gpus = [dict(zip(names, line.split(", "))) for line in (results / "gpu.csv").read_text().splitlines()]
reported = ("onnxruntime", "nvidia-", "torch", "numpy")
packages = [dist for dist in metadata.distributions() if dist.name.startswith(reported)]
steps, tests = results / "steps.jsonl", results / "tests.xml"
report = {
    "gpus": gpus,
    "machine": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
    "versions": {dist.name: dist.version for dist in packages},
    "failed": failed,
    "tests": [dict(suite.attrib) for suite in ElementTree.parse(tests).iter("testsuite")] if tests.exists() else None,
    "steps": [json.loads(line) for line in steps.read_text().splitlines()] if steps.exists() else [],
    "bench": {file.stem[6:]: json.loads(file.read_text()) for file in sorted(results.glob("bench-*.json"))},
}
(results / "report.json").write_text(json.dumps(report, indent=1) + "\n")
print(f"{results / 'report.json'}: " + (f"failed: {', '.join(failed)}" if failed else "nothing failed"))
PYTHON
((${#failed[@]} == 0))
