"""The compaction of one layer: select, mass and fold, values, joint values, rounding (docs/method.md).

It takes what the student's queries are, already behind the entries of the layers below, and what the teacher's heads
and its residual stream are on the same tokens. The teacher is the same model behind all entries of the context.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..decoder import Entry
from .joint import fit_joint
from .mass import fold, fold_direction, mass_factors
from .rounding import Rounding, round_lines, unrounded
from .rows import QueryRows
from .selection import select_forward, select_seen
from .values import fit_values

_KEY_RIDGE = 1e-2  # of the keys' rounding; the values' has that of their fit
_JOINT_COLUMNS = 12_288  # heads * entries up to which the joint fit's Gram matrix (600 MB) is made


@dataclass(frozen=True)
class Ridges:
    """The relative ridges of the fit: of the mass factors towards 1, and of the values towards the context's own."""

    mass: float = 1e-2
    values: float = 3e-3


@dataclass(frozen=True)
class Target:
    """What the entries of one layer are fitted to.

    Attributes:
        heads: the outputs of the teacher's heads, [N, heads, head dim].
        change: v_T - x_S, what the heads have to add to the student's residual stream, [N, d].
        projection: the output projection, with the gain of a post-norm in it, [d, heads * head dim].
        length: the root mean square that a post-norm divides by, taken from the teacher, [N]; None without a post-norm.
        weight: the weight of each token, [N].
    """

    heads: Tensor
    change: Tensor
    projection: Tensor
    length: Tensor | None
    weight: Tensor


def compact(
    rows: QueryRows,
    context: Entry,
    count: int,
    target: Target,
    ridges: Ridges,
    rounding: Rounding = unrounded,
    *,
    forward: bool = False,
) -> Entry:
    """Return `count` entries for each key/value head that stand in for the context's, rounded to what the file holds.

    Args:
        rows: the student's rows.
        context: the keys and values of the whole context, [kv heads, n, head dim].
        count: the number of entries to keep, at most n.
        target: what the entries are fitted to.
        ridges: the ridges of the fit.
        rounding: the rounding of the file. The values are fitted behind the rounded keys.
        forward: whether entries are selected one after another (selection.py); it costs a Gram matrix for each head.

    Returns:
        Keys and values, [kv heads, count, head dim].
    """
    # A post-norm divides the branch by its length, so an error counts for as much less.
    tokens = target.weight if target.length is None else target.weight / target.length.square().clamp(min=1e-20)
    weight = (tokens / tokens.mean()).repeat_interleave(rows.group)
    heads = [
        _compact_head(
            rows, head, (context[0][head], context[1][head]), count, target, weight, ridges, rounding, forward
        )
        for head in range(rows.kv_heads)
    ]
    keys, values = (torch.stack(part) for part in zip(*(entry for entry, _gram in heads), strict=True))
    if rows.query.shape[1] * count <= _JOINT_COLUMNS:
        values = values + _joint(rows, keys, values, target, ridges)
    rounded = [
        round_lines(value, gram, ridges.values, rounding) for value, (_entry, gram) in zip(values, heads, strict=True)
    ]
    return keys, torch.stack(rounded)


def _compact_head(
    rows: QueryRows,
    head: int,
    context: Entry,
    count: int,
    target: Target,
    weight: Tensor,
    ridges: Ridges,
    rounding: Rounding,
    forward: bool,
) -> tuple[Entry, Tensor]:
    """Return the rounded keys and the fitted values of one head, and the Gram matrix of their shares [count, count]."""
    keys, values = context
    shares, text = rows.shares(head, keys)
    if forward and count < len(keys):
        kept = select_forward(shares, weight, values, count)
    else:
        kept = select_seen(shares, weight, count)
    keys, values, shares = keys[kept], values[kept], shares[:, kept]
    weighted = shares * weight[:, None]
    factors = mass_factors(weighted.T @ shares, weighted.T @ (1 - text), ridges.mass)
    attention, query = (weighted * shares).sum(1), rows.of_head(rows.query, head)
    keys = fold(keys, factors, fold_direction(query, attention, rows.heads.scale))
    hessian = (query * attention[:, None]).T @ query
    keys = round_lines(keys.T, hessian, _KEY_RIDGE, rounding).T
    shares, text = rows.shares(head, keys)
    behind = rows.of_head(target.heads, head) - text[:, None] * rows.of_head(rows.out, head)
    gram = (shares * weight[:, None]).T @ shares
    return (keys, fit_values(shares, behind - shares @ values, values, weight, ridges.values)), gram


def _joint(rows: QueryRows, keys: Tensor, values: Tensor, target: Target, ridges: Ridges) -> Tensor:
    tokens = len(rows.query)
    found = [rows.shares(head, key) for head, key in enumerate(keys)]
    # [N, heads, p], the heads in the order of the query heads
    shares = torch.cat([share.view(tokens, rows.group, -1) for share, _text in found], 1)
    text = torch.cat([text.view(tokens, rows.group) for _share, text in found], 1)
    own = torch.cat(
        [(share @ value).view(tokens, rows.group, -1) for (share, _), value in zip(found, values, strict=True)], 1
    )
    heads = (own + text[..., None] * rows.out).reshape(tokens, -1)
    branch = heads @ target.projection.T
    weight = target.weight / target.weight.mean()
    if target.length is not None:  # the post-norm is linearised at the teacher's length
        branch, shares = branch / target.length[:, None], shares / target.length[:, None, None]
    return fit_joint(shares, target.change - branch, target.projection, rows.kv_heads, weight, ridges.values)
