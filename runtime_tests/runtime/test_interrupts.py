"""A Ctrl-C at any line leaves no patch in use, no patch active and no KV cache taken."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from runtime_tests.interrupts import interrupted_at_every_step
from runtime_tests.logits import token_ids
from tp_runtime.errors import PatchTargetError
from tp_runtime.model import PatchedModel
from tp_runtime.patch import Patch
from tp_runtime.session import Use

IDS = token_ids(5)
TAKES = ("loaded_patches.py", "session/uses.py", "session/kv_cache.py", "contextlib.py")
REQUESTS = (
    *TAKES,
    "tp_runtime/model.py",
    "text/stream.py",
    "text/request.py",
    "generation/engine.py",
    "graph.py",
    "run_io.py",
)

# An interrupt in a finaliser is reported and cannot be raised; the use ends nevertheless.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(autouse=True, scope="module")
def quick_collections() -> Iterator[None]:
    """Collections look only at what these tests make: after the host's tests the process holds all of torch."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def blocks(model: PatchedModel) -> None:
    with model.patched("p"), model.patched(None):
        pass


def read(model: PatchedModel) -> None:
    for _chunk in model.stream("Hi", patch="p", max_new_tokens=2):
        pass


def close(model: PatchedModel) -> None:
    stream = model.stream("Hi", patch="p", max_new_tokens=9)
    next(stream)
    stream.close()


def leave(model: PatchedModel) -> None:
    with model.stream("Hi", patch="p", max_new_tokens=9) as stream:
        next(stream)


def run(model: PatchedModel) -> None:
    with model.patched("p"):
        model.logits(IDS)


def check_that_nothing_is_left(model: PatchedModel, patch: Patch, base: Any, place: str) -> None:
    assert np.array_equal(model.logits(IDS), base), place  # no patch is active
    model.unload_patch("p")  # no request uses it
    model.load_patch(patch, "p")


@pytest.mark.parametrize("action", [blocks, read, close, leave, run])
def test_an_interrupt_at_any_line_leaves_no_patch_in_use(
    model: PatchedModel, patch: Patch, action: Callable[[PatchedModel], None]
) -> None:
    base = model.logits(IDS)
    model.load_patch(patch, "p")
    for place in interrupted_at_every_step(lambda: action(model), REQUESTS):
        check_that_nothing_is_left(model, patch, base, place)


def test_an_interrupt_at_any_line_of_joining_a_batch_leaves_no_patch_in_use(model: PatchedModel, patch: Patch) -> None:
    def join_and_leave() -> None:
        with model.batch() as batch:
            batch.add("Hi", patch="p")

    base = model.logits(IDS)
    model.load_patch(patch, "p")
    for place in interrupted_at_every_step(join_and_leave, (*REQUESTS, "text/batch.py")):
        gc.collect()  # a batch and its completions refer to each other
        check_that_nothing_is_left(model, patch, base, place)


def test_an_interrupt_at_any_instruction_of_a_block_leaves_no_patch_active(model: PatchedModel, patch: Patch) -> None:
    """Between a call and the assignment of its result no line begins, but an interrupt may arrive."""
    base = model.logits(IDS)
    model.load_patch(patch, "p")
    for place in interrupted_at_every_step(lambda: blocks(model), TAKES, opcodes=True):
        check_that_nothing_is_left(model, patch, base, place)


def test_an_interrupt_at_any_line_inside_an_outer_block_leaves_that_block_active(
    model: PatchedModel, patch: Patch
) -> None:
    model.load_patch(patch, "p")
    wanted = model.logits(IDS, patch)
    with model.patched(patch):
        for place in interrupted_at_every_step(lambda: blocks(model), TAKES):
            assert np.array_equal(model.logits(IDS), wanted), place


def test_an_interrupt_at_any_line_leaves_a_cache_free_and_right(model: PatchedModel) -> None:
    cache = model.new_cache()
    wanted = model.generate("Where is the cat?", max_new_tokens=4)

    def answer() -> None:
        model.generate("Hi", cache=cache, max_new_tokens=3)

    for place in interrupted_at_every_step(answer, (*REQUESTS, "kv_buffers.py", "step_io.py", "run_io.py")):
        assert model.generate("Where is the cat?", cache=cache, max_new_tokens=4) == wanted, place


def test_an_interrupt_at_any_instruction_of_taking_a_cache_leaves_it_free(model: PatchedModel) -> None:
    cache = model.new_cache()

    def take() -> None:
        use = Use(cache.uses)
        cache.take(use)
        use.end()

    for place in interrupted_at_every_step(take, TAKES, opcodes=True):
        assert cache.uses.first() is None, place


def test_an_interrupt_at_any_line_leaves_a_patch_loaded_or_not(model: PatchedModel, patch: Patch) -> None:
    def load_and_unload() -> None:
        model.load_patch(patch, "p")
        model.unload_patch("p")

    for _place in interrupted_at_every_step(load_and_unload, REQUESTS):
        if "p" in model.patches:
            model.unload_patch("p")
        with pytest.raises(PatchTargetError):
            model.unload_patch("p")


def test_a_patch_is_free_again_while_the_interrupt_is_still_handled(model: PatchedModel, patch: Patch) -> None:
    """The traceback keeps the frames of the request alive, so the patch cannot wait for their end."""
    model.load_patch(patch, "p")
    stream = model.stream("Hi", patch="p", max_new_tokens=9)
    next(stream)
    model.graph.forward = lambda *_a, **_k: (_ for _ in ()).throw(KeyboardInterrupt)  # type: ignore[method-assign]
    try:
        next(stream)
    except KeyboardInterrupt:
        model.unload_patch("p")
    finally:
        del model.graph.forward  # type: ignore[method-assign]
    assert "p" not in model.patches
