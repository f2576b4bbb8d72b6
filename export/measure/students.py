"""Students: models whose logits are compared with the teacher's, run by transformers or by the exported graph.

A student is called with token ids and returns logits. `attached()` uploads its patch and registers its hooks once. The
patch is active only during the student's own calls, so many students of one model can be compared dialogue by dialogue.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor

from tp_runtime.patch import Patch
from tp_runtime.session import Graph

from ..decoder import PatchHooks, TorchPrefix, torch_prefix
from ..quantise import QuantisedStudent, as_student


class Student(Protocol):
    """A model that is called with token ids and returns logits."""

    def __call__(self, tokens: Sequence[int], first: int) -> Tensor:
        """Return the logits [len(tokens) - first, vocab] of the positions from `first` on."""

    def attached(self) -> AbstractContextManager[None]:
        """Return a context within which no call has to upload the patch or register its hooks again."""


class TorchStudent:
    """A student run by transformers and patched by forward hooks.

    If the patch has a KV prefix, the tokens attend to its key/value entries too. The teacher can stand behind the
    context's cached keys and values, so that the context is not run again for every query.

    Args:
        model: a transformers causal language model whose architecture has an adapter.
        patch: the patch that the student runs under; None for the base.
        weights: the quantised weights that the student runs with; None for the model's own weights.
        cached: the cached keys and values of the ids that every sequence begins with; None to run whole sequences.
            They are exact if `weights` is None and the patch changes no weights.

    Raises:
        PatchShapeError, PatchValueError: the patch's KV prefix does not fit the model.
    """

    def __init__(
        self,
        model: Any,
        patch: Patch | None = None,
        weights: QuantisedStudent | None = None,
        cached: TorchPrefix | None = None,
    ) -> None:
        self._model, self._patch, self._weights = model, patch, weights
        self._prefix = cached if patch is None else torch_prefix(patch, model)
        self._hooks: PatchHooks | None = None

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Upload the patch and register its hooks for as long as the context is open; a nested context does nothing."""
        if self._patch is None or self._hooks is not None:
            yield
            return
        with PatchHooks(self._model, self._patch) as self._hooks:
            try:
                yield
            finally:
                self._hooks = None

    def __call__(self, tokens: Sequence[int], first: int) -> Tensor:
        """Return the logits [len(tokens) - first, vocab] of the positions from `first` on."""
        return self.run(tokens, first)

    def run(self, tokens: Sequence[int], first: int, without_layer: int | None = None) -> Tensor:
        """Return the same logits; if `without_layer` is given, the patch's deltas of that layer are switched off."""
        replaced = 0 if self._prefix is None else len(self._prefix.replaces)
        if self._patch is not None and self._patch.prefix is not None:
            self._patch.prefix.require_start(tokens)
        ids = torch.tensor([list(tokens[replaced:])], device=self._model.device)
        inputs = {"use_cache": False} if self._prefix is None else self._prefix.model_inputs(ids)
        with ExitStack() as stack:
            stack.enter_context(self.attached())
            stack.enter_context(torch.no_grad())
            stack.enter_context(as_student(self._weights))
            if self._hooks is not None:
                stack.enter_context(self._hooks.on(without_layer))
            if self._prefix is not None:
                stack.enter_context(self._prefix.before(self._model))
            return self._model(ids, **inputs, logits_to_keep=len(tokens) - first).logits[0]

    def without_layer(self, layer: int) -> Student:
        """Return the student with the patch's deltas of one layer switched off; it shares this student's hooks."""
        return _WithoutLayer(self, layer)


class _WithoutLayer:
    def __init__(self, student: TorchStudent, layer: int) -> None:
        self._student, self._layer = student, layer

    def attached(self) -> AbstractContextManager[None]:
        return self._student.attached()

    def __call__(self, tokens: Sequence[int], first: int) -> Tensor:
        return self._student.run(tokens, first, self._layer)


class RuntimeStudent:
    """A student run by tp_runtime.

    The measured figure then includes the effect of the exported graph, its precision and its slots.

    Args:
        graph: the exported graph in a session.
        patch: the patch that the student runs under; None for the base.

    Raises:
        PatchError: the patch does not fit the graph.
    """

    def __init__(self, graph: Graph, patch: Patch | None = None) -> None:
        self._graph, self._bound = graph, graph.bind(patch)

    def attached(self) -> AbstractContextManager[None]:
        """Return an empty context: the patch is already bound to the session's inputs."""
        return nullcontext()

    def __call__(self, tokens: Sequence[int], first: int) -> Tensor:
        """Return the logits [len(tokens) - first, vocab] of the positions from `first` on."""
        cache = self._graph.new_cache(self._bound)
        cache.require_start(tokens)
        if first > len(cache):
            self._graph.forward(tokens[len(cache) : first], cache, self._bound)
        return torch.from_numpy(self._graph.forward(tokens[first:], cache, self._bound, all_logits=True))
