"""Which matrix kernels a decode step of several rows should run on this processor.

    python benchmarks/batch_kernels.py [--models smollm2,gemma] [--rows 1,2,4,8,16,32] [--threads 1] [--rounds 3]

For each kind of weights it builds one graph with all matrices of the model in their order, every matrix with weights of
its own, so that they come from memory as in a real step; attention, norms and patches are left out. The values do not
matter to the time. Every kind runs in a new process in every round, and the table shows medians, in milliseconds for
all rows together. `one by one` is the time of as many runs of one row. Needs the package onnx.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from statistics import median
from typing import Any, NamedTuple

import numpy as np


class Shape(NamedTuple):
    """The matrices of a model: sizes of the residual stream, queries, keys and the MLP, layers, and the vocabulary."""

    hidden: int
    queries: int
    keys: int
    mlp: int
    layers: int
    vocabulary: int


MODELS = {
    "smollm2": Shape(576, 576, 192, 1536, 30, 49152),
    "gemma": Shape(640, 1024, 256, 2048, 18, 262144),
}


class Weights(NamedTuple):
    """A kind of weights: bits (32 for float), values that share a scale, accuracy level, and whether it is symmetric.

    Accuracy level 4 quantises the rows to int8 and multiplies integers; level 1 makes floats of the weights first.
    """

    bits: int
    block: int = 32
    accuracy: int = 4
    symmetric: bool = True


KINDS = {
    "int4, blocks of 32": Weights(4),
    "int4, blocks of 32, zero points": Weights(4, symmetric=False),
    "int4, blocks of 64": Weights(4, 64),
    "int4, blocks of 128": Weights(4, 128),
    "int4, dequantised": Weights(4, accuracy=1),
    "int8, blocks of 32": Weights(8),
    "int8, blocks of 128": Weights(8, 128),
    "float32": Weights(32),
}


def graph(shape: Shape, kind: Weights) -> bytes:
    """Return the graph: input x [rows, hidden], outputs the logits and every layer's keys and values."""
    from onnx import TensorProto, helper, numpy_helper

    rng = np.random.default_rng(0)
    nodes: list[Any] = []
    tensors: list[Any] = []
    names: Iterator[str] = (f"t{number}" for number in range(10**6))

    def constant(values: np.ndarray) -> str:
        tensors.append(numpy_helper.from_array(values, name := next(names)))
        return name

    def matmul(x: str, inputs: int, outputs: int) -> str:
        out = next(names)
        if kind.bits == 32:
            weights = rng.standard_normal((inputs, outputs), np.float32)
            nodes.append(helper.make_node("MatMul", [x, constant(weights)], [out]))
            return out
        blocks = -(-inputs // kind.block)
        packed = rng.integers(0, 256, (outputs, blocks, kind.block * kind.bits // 8), np.uint8)
        given = [x, constant(packed), constant(np.ones(outputs * blocks, np.float32))]
        if not kind.symmetric:
            given.append(constant(rng.integers(0, 256, outputs * -(-blocks * kind.bits // 8), np.uint8)))
        attributes = {"bits": kind.bits, "block_size": kind.block, "accuracy_level": kind.accuracy}
        node = helper.make_node("MatMulNBits", given, [out], domain="com.microsoft", K=inputs, N=outputs, **attributes)
        nodes.append(node)
        return out

    x, kept = "x", []
    for _layer in range(shape.layers):
        kept += [matmul(x, shape.hidden, shape.keys) for _ in range(2)]
        x = matmul(matmul(x, shape.hidden, shape.queries), shape.queries, shape.hidden)
        gate, up, product = matmul(x, shape.hidden, shape.mlp), matmul(x, shape.hidden, shape.mlp), next(names)
        nodes.append(helper.make_node("Mul", [gate, up], [product]))
        x = matmul(product, shape.mlp, shape.hidden)
    kept.append(matmul(x, shape.hidden, shape.vocabulary))
    declared = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in kept]
    given = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", shape.hidden])]
    made = helper.make_graph(nodes, "step", given, declared, tensors)
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(made, opset_imports=opsets, ir_version=10).SerializeToString()


def times(model: str, kind: str, rows: list[int], threads: int) -> list[float]:
    """Return the milliseconds of a step for each number of rows, each the median of its runs."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    session = ort.InferenceSession(graph(MODELS[model], KINDS[kind]), options, ["CPUExecutionProvider"])
    found = []
    for count in rows:
        # Zeros stay zeros through all layers; other values would grow or vanish, and denormal floats take long.
        x, seconds, start = {"x": np.zeros((count, MODELS[model].hidden), np.float32)}, [], time.perf_counter()
        session.run(None, x)
        while len(seconds) < 3 or (time.perf_counter() - start < 1 and len(seconds) < 30):
            began = time.perf_counter()
            session.run(None, x)
            seconds.append(time.perf_counter() - began)
        found.append(1e3 * median(seconds))
    return found


def main() -> None:
    """Print a table for each model, or with --kind the times of one kind as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--rows", default="1,2,4,8,16,32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--kind", choices=KINDS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    rows = [int(count) for count in args.rows.split(",")]
    if args.kind:
        print(json.dumps(times(args.models, args.kind, rows, args.threads)))
        return
    for model in args.models.split(","):
        same = ["--rows", args.rows, "--threads", str(args.threads), "--models", model]
        found: dict[str, list[list[float]]] = {kind: [] for kind in KINDS}
        for _round in range(args.rounds):
            for kind, measured in found.items():
                command = [sys.executable, __file__, *same, "--kind", kind]
                done = subprocess.run(command, check=True, capture_output=True, text=True)
                measured.append(json.loads(done.stdout))
        print(f"\n{model}, {args.threads} threads, ms a step\n{'rows':<34}" + "".join(f"{count:>9}" for count in rows))
        for kind, measured in found.items():
            medians = [median(column) for column in zip(*measured, strict=True)]
            print(f"{kind:<34}" + "".join(f"{each:>9.1f}" for each in medians))
            if kind == next(iter(KINDS)) and rows[0] == 1:
                print(f"{'  one by one':<34}" + "".join(f"{count * medians[0]:>9.1f}" for count in rows))


if __name__ == "__main__":
    main()
