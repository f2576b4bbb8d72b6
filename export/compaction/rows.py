"""The rows that a layer's entries are fitted to: what its queries see of the text, and their shares of the entries.

A row is a pair (token, query head). Row i has, under one softmax over the entries and the text in front of it,

    s_ij = cap(scale q_i key_j)           the logit of entry j
    LSE_i = log(sum_j exp s_ij + exp lse_i)
    P_ij = exp(s_ij - LSE_i)              the share of entry j
    text_i = exp(lse_i - LSE_i)           the share of the text
    head_i = sum_j P_ij value_j + text_i out_i

lse_i and out_i are the log-sum-exp of the text's logits and the normalised output of the text alone. They do not depend
on the entries, so a layer's text is attended to once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..decoder import Heads, entries_seen


@dataclass(frozen=True)
class QueryRows:
    """The rows of one layer.

    Attributes:
        query: the rotated queries, [N, heads, head dim].
        lse: the log-sum-exp of the text's logits, [N, heads].
        out: the output of the text alone, [N, heads, head dim].
        place: the place of each token in the text, [N].
        kv_heads: the number of key/value heads; each serves heads / kv_heads query heads in order.
        heads: the scale, the window and the soft cap of the layer.
    """

    query: Tensor
    lse: Tensor
    out: Tensor
    place: Tensor
    kv_heads: int
    heads: Heads

    @property
    def group(self) -> int:
        """The number of query heads for each key/value head."""
        return int(self.query.shape[1]) // self.kv_heads

    def of_head(self, x: Tensor, head: int) -> Tensor:
        """Return the part [N * group, ...] of x [N, heads, ...] that belongs to one key/value head."""
        return x[:, head * self.group : (head + 1) * self.group].reshape(-1, *x.shape[2:])

    def logits(self, head: int, keys: Tensor) -> Tensor:
        """Return the logits [N * group, n] of the entries `keys` [n, head dim] of one key/value head.

        An entry that the window hides has the logit minus infinity.
        """
        found = self.heads.capped(self.of_head(self.query, head) @ keys.T * self.heads.scale)
        if self.heads.window is not None:
            seen = entries_seen(self.place, len(keys), self.heads.window)
            found = found.masked_fill(~seen.repeat_interleave(self.group, 0), -torch.inf)
        return found

    def shares(self, head: int, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Return the shares of the entries [N * group, n] and of the text [N * group]."""
        logits, lse = self.logits(head, keys), self.of_head(self.lse, head)
        total = torch.logaddexp(logits.logsumexp(-1), lse)
        return (logits - total[:, None]).exp(), (lse - total).exp()


def text_part(heads: Heads) -> tuple[Tensor, Tensor]:
    """Return lse [b, T, heads] and out [b, T, heads, head dim] of a layer that attends to the text alone."""
    group = heads.query.shape[1] // heads.key.shape[1]
    key, value = heads.key.repeat_interleave(group, 1), heads.value.repeat_interleave(group, 1)
    logits = heads.capped(heads.query @ key.transpose(2, 3) * heads.scale)
    logits = logits.masked_fill(~heads.text_mask()[:, None], -torch.inf)
    return logits.logsumexp(-1).transpose(1, 2), (logits.softmax(-1) @ value).transpose(1, 2)
