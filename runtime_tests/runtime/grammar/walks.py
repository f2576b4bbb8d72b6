"""Completions by a model that knows nothing: random logits under a constraint, picked as the sampler picks."""

from __future__ import annotations

import numpy as np
from tokenizers import Tokenizer

from tp_runtime.generation.constraint import masked
from tp_runtime.grammar import GrammarConstraint

LONGEST = 500  # ids of a walk


class Walker:
    """Draws ids under a constraint. A bias towards closing characters lets walks through strings and lists end."""

    def __init__(self, tokenizer: Tokenizer, width: int, eos_ids: tuple[int, ...], seed: int) -> None:
        self.width, self.eos_ids = width, eos_ids
        self.random = np.random.default_rng(seed)
        self._bias = np.zeros(width, dtype=np.float32)
        for token in range(min(width, tokenizer.get_vocab_size())):
            text = tokenizer.decode([token], skip_special_tokens=False)
            if token in eos_ids or text.strip()[:1] in ('"', "]", "}") or text == ",":
                self._bias[token] = 3.0

    def logits(self) -> np.ndarray:
        """Return the logits of a step [width]."""
        return (self.random.gumbel(size=self.width).astype(np.float32) + self._bias) * 1.5

    def step(self, constraint: GrammarConstraint, ids: list[int]) -> int:
        """Pick the next id as the sampler does: forced, or picked and checked, or picked under the mask."""
        constraint.follow(ids)
        forced = constraint.forced()
        if forced and self.random.random() < 0.5:
            assert all_follow(constraint, ids, forced)
            return forced[0]
        logits = self.logits()
        token = int(logits.argmax())
        if not constraint.allows(token):
            token = int(masked(logits, constraint.allowed()).argmax())
            assert constraint.allows(token)
        return token

    def walk(self, constraint: GrammarConstraint) -> tuple[list[int], bool]:
        """Return the ids of a completion, without the id that ended it, and whether one did."""
        ids: list[int] = []
        while len(ids) < LONGEST:
            if ids and self.random.random() < 0.05:  # a step is repeated: the state goes back, and comes again
                constraint.follow(ids[: int(self.random.integers(len(ids)))])
            token = self.step(constraint, ids)
            if token in self.eos_ids:
                return ids, True
            ids.append(token)
        return ids, False


def all_follow(constraint: GrammarConstraint, ids: list[int], forced: list[int]) -> bool:
    """Return whether each forced id is allowed after those before it. The state is that after `ids` again."""
    for at, token in enumerate(forced):
        constraint.follow(ids + forced[:at])
        if not constraint.allows(token) or not bit(constraint.allowed(), token):
            return False
    constraint.follow(ids)
    return True


def bit(bits: np.ndarray, token: int) -> bool:
    """Return whether a mask allows an id."""
    return bool(bits[token // 32] >> np.uint32(token % 32) & np.uint32(1))
