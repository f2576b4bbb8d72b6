"""Random attention layers in float64, with everything that compaction is given and a dense computation to compare."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tp_export.compaction import QueryRows, Target, text_part
from tp_export.decoder import Entry, Heads


@dataclass(frozen=True)
class Layer:
    """The tensors of one attention layer on `b` texts of `T` tokens behind a context of `n` entries.

    Attributes:
        query: the queries, [b, heads, T, head dim].
        key: the keys of the text, [b, kv heads, T, head dim].
        value: the values of the text, like `key`.
        context: the keys and values of the context, [kv heads, n, head dim].
        projection: the output projection, [d, heads * head dim].
        bias: the bias of the output projection, [d]; None if it has none.
        gain: the gain of a post-norm, [d]; None if there is none.
        window: the window in places.
        softcap: the bound of the logits.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    context: Entry
    projection: Tensor
    bias: Tensor | None = None
    gain: Tensor | None = None
    window: int | None = None
    softcap: float | None = None

    @property
    def scale(self) -> float:
        return float(self.query.shape[-1] ** -0.5)

    @property
    def heads(self) -> Heads:
        return Heads(self.query, self.key, self.value, self.scale, self.window, self.softcap)

    def rows(self) -> QueryRows:
        """Return all rows, text by text."""
        lse, out = text_part(self.heads)
        steps = self.query.shape[2]
        place = torch.arange(steps).repeat(len(self.query))
        query = self.query.transpose(1, 2).flatten(0, 1)
        return QueryRows(query, lse.flatten(0, 1), out.flatten(0, 1), place, self.key.shape[1], self.heads)

    def shares(self, keys: Tensor | None) -> Tensor:
        """Return one softmax over the entries and the text, [b, heads, T, n + T], masked place by place."""
        texts, count, steps, _size = self.query.shape
        group = count // self.key.shape[1]
        key = self.key
        if keys is not None:  # the entries lie at the first places, in front of every text
            key = torch.cat([keys.expand(texts, *keys.shape), key], 2)
        logits = self.scale * torch.einsum("bhtd,bhpd->bhtp", self.query, key.repeat_interleave(group, 1))
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        n = key.shape[2] - steps
        for own in range(n, n + steps):
            for place in range(n + steps):
                if place > own or (self.window is not None and place <= own - self.window):
                    logits[:, :, own - n, place] = -torch.inf
        return logits.softmax(-1)

    def outputs(self, entry: Entry | None) -> Tensor:
        """Return the outputs of the heads behind `entry`, [b * T, heads, head dim]."""
        shares = self.shares(None if entry is None else entry[0])
        group = self.query.shape[1] // self.key.shape[1]
        value = self.value
        if entry is not None:
            value = torch.cat([entry[1].expand(len(self.query), *entry[1].shape), value], 2)
        return (shares @ value.repeat_interleave(group, 1)).transpose(1, 2).flatten(0, 1)

    def branch(self, heads: Tensor) -> Tensor:
        """Return what outputs of heads [N, heads, head dim] add to the residual stream, [N, d]."""
        out = heads.flatten(1) @ self.projection.T
        out = out if self.bias is None else out + self.bias
        return out if self.gain is None else self.gain * out / out.square().mean(-1, keepdim=True).sqrt()

    def target(self, weight: Tensor | None = None) -> Target:
        """Return the target of the entries: this layer behind its whole context, on an input x_S = x_T."""
        heads = self.outputs(self.context)
        length = None
        projection, bias = self.projection, self.bias
        if self.gain is not None:
            plain = heads.flatten(1) @ projection.T
            plain = plain if bias is None else plain + bias
            length = plain.square().mean(-1).sqrt()
            projection = self.gain[:, None] * projection
            bias = None if bias is None else self.gain * bias
        change = self.branch(heads)
        if bias is not None:
            change = change - (bias if length is None else bias / length[:, None])
        return Target(heads, change, projection, length, torch.ones(len(heads)).double() if weight is None else weight)

    def error(self, entry: Entry) -> float:
        """Return how far the residual stream behind `entry` is from that behind the context, root mean square."""
        wanted, found = (self.branch(self.outputs(entries)) for entries in (self.context, entry))
        return float((found - wanted).square().mean().sqrt())


def random_layer(
    *,
    heads: int = 4,
    kv_heads: int = 2,
    size: int = 8,
    width: int = 24,
    n: int = 20,
    texts: int = 6,
    steps: int = 10,
    seed: int = 0,
    post_norm: bool = False,
    bias: bool = False,
    window: int | None = None,
    softcap: float | None = None,
) -> Layer:
    """Return a random layer whose queries share a direction, as those of real heads do."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    common = 2.5 * normal(heads, 1, size).sign()
    query = 1.2 * normal(texts, heads, steps, size) + common
    key, value = normal(texts, kv_heads, steps, size), normal(texts, kv_heads, steps, size)
    context = normal(kv_heads, n, size), normal(kv_heads, n, size)
    projection = normal(width, heads * size) / (heads * size) ** 0.5
    return Layer(
        query,
        key,
        value,
        context,
        projection,
        normal(width) * 0.3 if bias else None,
        1 + 0.3 * normal(width) if post_norm else None,
        window,
        softcap,
    )


def split(layer: Layer, texts: int) -> tuple[Layer, Layer]:
    """Return the layer on its first `texts` texts, and on the others."""

    def part(chosen: slice) -> Layer:
        return replace(layer, query=layer.query[chosen], key=layer.key[chosen], value=layer.value[chosen])

    return part(slice(texts)), part(slice(texts, None))
