"""Move a model's weights off any grid of few levels without changing what the model computes.

The models of these benchmarks come from four-bit files. A quantiser may find the levels of such a file again, which it
could not with weights that were trained in float. Random changes of basis that cancel each other give weights like
those: heads are rotated between the values and the output projection, the hidden values of an MLP are scaled between
`up` and `down`, and the residual stream is rotated, for which the gains of norms move into the layers that read them.
Where a norm stands between a layer and the stream, the stream cannot be rotated. Random factors then move from the
gains into the layers instead: the whole gains of Gemma 3 would bring outliers into the weights, which no quantiser of
blocks withstands.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tp_export.decoder import blocks_of, kv_shape


@torch.no_grad()
def move_off_grid(model: Any, seed: int = 0) -> None:
    """Change the weights of a model of the Llama or Gemma 3 design in place; its logits change by rounding only."""
    generator = torch.Generator().manual_seed(seed)
    blocks = blocks_of(model)
    rotates = all(block.post_norm is None for block in blocks)

    def fold(norm: Any, readers: list[Any]) -> None:
        gain = norm(torch.ones(1, norm.weight.shape[0]))[0]  # the root mean square that it divides by is 1
        factor = gain if rotates else torch.rand(len(gain), generator=generator) + 0.5
        for linear in readers:
            linear.weight.mul_(factor)
        norm.weight.add_((1 if rotates else gain / factor) - gain)

    heads, size = kv_shape(model.config)
    head = model.get_output_embeddings()
    head.weight = nn.Parameter(head.weight.clone())  # the table and the head change differently
    fold(model.model.norm, [head])
    for block in blocks:
        attention, mlp = block.layer.self_attn, block.layer.mlp
        fold(block.layer.input_layernorm, [attention.q_proj, attention.k_proj, attention.v_proj])
        fold(block.mlp_norm, [mlp.gate_proj, mlp.up_proj])
        group = attention.o_proj.weight.shape[1] // (heads * size)
        for number in range(heads):
            turn = _rotation(size, generator)
            rows = slice(number * size, (number + 1) * size)
            attention.v_proj.weight[rows] = turn @ attention.v_proj.weight[rows]
            for query in range(number * group, (number + 1) * group):
                columns = slice(query * size, (query + 1) * size)
                attention.o_proj.weight[:, columns] = attention.o_proj.weight[:, columns] @ turn.T
        scale = torch.rand(mlp.up_proj.weight.shape[0], generator=generator) + 0.5
        mlp.up_proj.weight.mul_(scale[:, None])
        mlp.down_proj.weight.div_(scale)
    if not rotates:
        return
    turn = _rotation(model.config.hidden_size, generator)
    table = model.get_input_embeddings()
    for reads in (table, head, *(part for block in blocks for part in _parts(block)[0])):
        reads.weight.copy_(reads.weight @ turn.T)
    for writes in (part for block in blocks for part in _parts(block)[1]):
        writes.weight.copy_(turn @ writes.weight)


def _parts(block: Any) -> tuple[list[Any], list[Any]]:
    """Return the linear layers of a block that read the residual stream, and those that add to it."""
    attention, mlp = block.layer.self_attn, block.layer.mlp
    reads = [attention.q_proj, attention.k_proj, attention.v_proj, mlp.gate_proj, mlp.up_proj]
    return reads, [attention.o_proj, mlp.down_proj]


def _rotation(size: int, generator: torch.Generator) -> Tensor:
    return torch.linalg.qr(torch.randn(size, size, generator=generator))[0]
