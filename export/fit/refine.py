"""Gradient steps from the closed form: context distillation of the same low-rank parameters, off by default.

    minimise  mean over completion tokens of KL(teacher || student)  over a, b and bias of every slot

These steps are not part of the method, which has no backpropagation. They show how much the closed form leaves to gain,
and at what cost. The base's weights and a KV prefix stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from typing import Any

import torch
from torch import Tensor

from ..decoder import TorchDelta, TorchPrefix, applied, blocks_of, decoder_of
from ..quantise import QuantisedStudent, as_student
from ..rollout import Dialogue, batches

_BATCH = 8
# Adam's learning rate, as a share of each tensor's root mean square, so that the factors of all layers and sites change
# at the same relative rate.
_RATE = 0.02


def refine_deltas(
    model: Any,
    dialogues: Sequence[Dialogue],
    deltas: Mapping[int, Mapping[str, TorchDelta]],
    steps: int,
    *,
    prefix: TorchPrefix | None = None,
    student: QuantisedStudent | None = None,
    seed: int = 0,
    progress: Callable[[float], None] = lambda loss: None,
) -> dict[int, dict[str, TorchDelta]]:
    """Improve `deltas` by `steps` steps of Adam with a cosine decay, one batch of dialogues per step.

    Args:
        model: a transformers causal language model that has an adapter. Its weights stay as they are.
        dialogues: the calibration sequences.
        deltas: a mapping layer -> site -> delta of the closed form.
        steps: the number of steps, at least 1.
        prefix: the key/value entries that precede the student's tokens, if there are any.
        student: the weights that the student has, if they are not the teacher's.
        seed: the seed for the order of the batches.
        progress: a callback that receives each step's loss, in nats per token.

    Returns:
        A mapping layer -> site -> improved delta.
    """
    trained = {layer: {site: _trainable(delta) for site, delta in sites.items()} for layer, sites in deltas.items()}
    groups = [
        {"params": [tensor], "lr": _RATE * max(float(tensor.detach().square().mean().sqrt()), 1e-8)}
        for sites in trained.values()
        for delta in sites.values()
        for tensor in (delta.a, delta.b, delta.bias)
        if tensor is not None
    ]
    optimiser = torch.optim.Adam(groups)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    pairs = batches(dialogues, _BATCH, model.device, replaced=0 if prefix is None else len(prefix.replaces))
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    blocks = blocks_of(model)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with ExitStack() as stack:
        for _ in range(steps):
            order = order or torch.randperm(len(pairs), generator=generator).tolist()
            teacher, student_batch = pairs[order.pop()]
            with torch.no_grad():
                wanted = _row_logits(model, teacher, None).log_softmax(-1)
            stack.enter_context(as_student(student))  # the student keeps these weights until the gradients are computed
            for layer, sites in trained.items():
                stack.enter_context(applied(blocks[layer], sites))
            loss = (wanted.exp() * (wanted - _row_logits(model, student_batch, prefix).log_softmax(-1))).sum(-1).mean()
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            schedule.step()
            stack.close()  # the teacher of the next step is unpatched
            progress(float(loss.detach()))
    return {layer: {site: _detached(delta) for site, delta in sites.items()} for layer, sites in trained.items()}


def _row_logits(model: Any, batch: Any, prefix: TorchPrefix | None) -> Tensor:
    """Return the logits [N, vocab] of the completion rows. The output head runs only on those rows."""
    inputs: dict[str, Any] = {"attention_mask": batch.attention_mask, "use_cache": False}
    if prefix is not None:
        inputs = prefix.model_inputs(batch.input_ids)
    with nullcontext() if prefix is None else prefix.before(model):
        hidden = decoder_of(model)(input_ids=batch.input_ids, **inputs).last_hidden_state
    logits = model.get_output_embeddings()(batch.rows(hidden))
    cap = getattr(model.config, "final_logit_softcapping", None)
    return logits if cap is None else cap * (logits / cap).tanh()


def _trainable(delta: TorchDelta) -> TorchDelta:
    def copy(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.detach().clone().requires_grad_()

    return TorchDelta(copy(delta.bias), copy(delta.a), copy(delta.b))


def _detached(delta: TorchDelta) -> TorchDelta:
    """Return the delta without gradients and without its mean.

    Truncation needs the mean and directions in order of energy. After gradient steps the directions are no longer in
    that order, so without its mean the delta cannot be truncated.
    """

    def plain(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.detach()

    return TorchDelta(plain(delta.bias), plain(delta.a), plain(delta.b))
