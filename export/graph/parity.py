"""Compare an exported folder with the torch model: both read the same text, and their predictions must agree.

This check keeps a wrong export from leaving the host; the test suite measures parity in full.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tp_runtime.errors import DeviceUnavailableError, ModelFormatError, RequestError, library_text
from tp_runtime.session import GRAPH_FILE, Graph, ModelFolder
from tp_runtime.text import TextCodec

from ..decoder import patched
from ..quantise import QuantisedStudent, as_student, computes_in_float16, held_out_text, log_probabilities, token_kl

_TOKENS = 64
# In float32 both compute the same sums in another order, so single log probabilities are compared. In the other
# precisions the graph rounds activations as well, by an amount that depends on the processor's kernels, so the mean KL
# divergence is compared. The limits are several times what the models of this project lose on any processor tried
# (docs/precision.md); a graph with a wrong weight loses whole nats.
_LARGEST_ERROR = 1e-2
_LARGEST_KL = {"fp16": 0.02, "bf16": 0.02, "int8": 0.05, "int4": 0.1}


@dataclass(frozen=True)
class Parity:
    """How far the predictions of an exported graph are from those of the torch model.

    Attributes:
        precision: the precision of the graph.
        tokens: the number of tokens that both read.
        error: the largest absolute difference of two log probabilities.
        kl: the mean KL divergence of the graph's predictions from the torch model's, in nats per token.
    """

    precision: str
    tokens: int
    error: float
    kl: float

    @property
    def limit(self) -> float:
        """The largest `error` that is accepted in fp32; in other precisions, the largest `kl`."""
        if self.precision == "fp32":
            return _LARGEST_ERROR
        # int4 weights with float16 activations are compared with the same weights, so only the activations are rounded.
        return _LARGEST_KL["fp16" if computes_in_float16(self.precision) else self.precision.partition("-")[0]]

    @property
    def agrees(self) -> bool:
        """Whether the graph computes what the model computes, up to rounding. NaN does not agree."""
        return (self.error if self.precision == "fp32" else self.kl) <= self.limit

    def require(self, fix: str) -> None:
        """Raise ModelFormatError, with `fix` as its instruction, unless the graph computes what the model computes."""
        if not self.agrees:
            raise ModelFormatError(
                "the exported graph does not compute what the model computes",
                field="logits",
                got=self,
                wanted=f"{'an error' if self.precision == 'fp32' else 'a KL'} of at most {self.limit}",
                fix=fix,
            )

    def __str__(self) -> str:
        return (
            f"{self.precision} on {self.tokens} tokens of built-in text: KL {self.kl:.2g} nats per token, "
            f"largest error of a log probability {self.error:.2g}"
        )


def measure_parity(codec: TextCodec, model: Any, graph: Graph, student: QuantisedStudent | None) -> Parity:
    """Let the graph and the torch model read the same prose, with nothing bound to the graph's slots.

    A quantised graph is compared with the torch model in the same quantised weights. A repaired graph is compared with
    the torch model under the same repair.

    Args:
        codec: the codec of the model.
        model: the torch model in float32.
        graph: the exported graph.
        student: the weights of a quantised graph; None for a float precision.

    Raises:
        ModelFormatError: ONNX Runtime cannot run the graph.
    """
    precision = graph.folder.precision
    ids = prose_ids(codec, graph.folder.vocab_size)[: graph.folder.context_window]
    try:
        got = torch.from_numpy(graph.run(ids, graph.base)).log_softmax(-1)
    except RuntimeError as error:  # what a run with a binding raises
        raise ModelFormatError(
            "ONNX Runtime cannot run the exported graph",
            field=GRAPH_FILE,
            got=library_text(error),
            fix="use --route optimum, or report this architecture",
        ) from error
    with ExitStack() as stack:
        stack.enter_context(as_student(student))
        if graph.repair is not None:
            stack.enter_context(patched(model, graph.repair))
        wanted = log_probabilities(model, torch.tensor([ids]))
    kl = float(token_kl(wanted, got).mean())
    return Parity(precision, len(ids), float((got - wanted).abs().max()), kl)


def prose_ids(codec: TextCodec, vocab_size: int) -> list[int]:
    """Return the ids of prose, with those that every text begins with.

    If the tokenizer has too few for it, ids from all over the vocabulary follow. Only such ids would not do: on
    random text the rounding of activations costs several times what it costs on prose.
    """
    try:
        ids = codec.render(held_out_text(), raw=True)[:_TOKENS]
    except RequestError:  # a tokenizer for another script may have no token of this text
        ids = []
    step = max(1, vocab_size // _TOKENS)
    return ids + list(range(0, vocab_size, step))[: _TOKENS - len(ids)]


def check_export(codec: TextCodec, model: Any, folder: Path, student: QuantisedStudent | None) -> Parity | None:
    """Check that an exported folder computes what the torch model computes.

    Args:
        codec: the codec of the model.
        model: the torch model in float32.
        folder: the exported folder.
        student: the weights of a quantised folder; None for a float precision.

    Returns:
        What was measured; None if no ONNX Runtime is installed, so that nothing could be checked.

    Raises:
        ModelFormatError: the graph does not compute what the model computes, or ONNX Runtime cannot run it.
    """
    try:
        graph = Graph(ModelFolder.open(folder), device="cpu")
    except DeviceUnavailableError:
        return None
    parity = measure_parity(codec, model, graph, student)
    parity.require("use --precision fp32, or report this architecture")
    return parity
