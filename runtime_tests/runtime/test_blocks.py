"""`patched` blocks that do not end in order: in generators, in tasks and in other threads."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import ExitStack

import numpy as np
import pytest

from runtime_tests.logits import token_ids
from runtime_tests.patches import patch_for
from tp_runtime.errors import BusyError
from tp_runtime.model import PatchedModel
from tp_runtime.patch import Patch

IDS = token_ids(8)


@pytest.fixture
def other(model: PatchedModel) -> Patch:
    return patch_for(model.graph.folder, seed=2)


def test_blocks_that_end_in_the_wrong_order_leave_no_patch_active(
    model: PatchedModel, patch: Patch, other: Patch
) -> None:
    base, with_other = model.logits(IDS), model.logits(IDS, other)
    one, two = ExitStack(), ExitStack()
    one.enter_context(model.patched(patch))
    two.enter_context(model.patched(other))
    one.close()
    assert np.array_equal(model.logits(IDS), with_other)  # the block that goes on
    two.close()
    assert np.array_equal(model.logits(IDS), base)


def test_a_block_in_a_generator_that_another_thread_ends_changes_nothing_there(
    model: PatchedModel, patch: Patch, other: Patch
) -> None:
    model.load_patch(patch, "p")
    base, with_other = model.logits(IDS), model.logits(IDS, other)

    def inside() -> Iterator[bool]:
        with model.patched("p"):
            yield True

    generator = inside()
    results: list[bool] = []

    def end() -> None:
        with model.patched(other):
            generator.close()  # type: ignore[attr-defined]
            results.append(np.array_equal(model.logits(IDS), with_other))
        results.append(np.array_equal(model.logits(IDS), base))

    # The block stays active in the thread that entered it, so that one is not the thread of the tests.
    for work in (lambda: next(generator), end):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert results == [True, True]
    model.unload_patch("p")


def test_a_task_keeps_the_patch_of_its_block_after_blocks_of_its_own(
    model: PatchedModel, patch: Patch, other: Patch
) -> None:
    base, with_patch, with_other = (model.logits(IDS, choice) for choice in (None, patch, other))

    async def later(ended: asyncio.Event) -> None:
        await ended.wait()
        assert np.array_equal(model.logits(IDS), with_patch)
        with model.patched(other):
            assert np.array_equal(model.logits(IDS), with_other)
        assert np.array_equal(model.logits(IDS), with_patch)

    async def main() -> None:
        ended = asyncio.Event()
        with model.patched(patch):
            task = asyncio.create_task(later(ended))
        assert np.array_equal(model.logits(IDS), base)
        ended.set()
        await task

    asyncio.run(main())


def test_of_two_tasks_on_one_cache_the_second_is_refused_at_once(model: PatchedModel) -> None:
    wanted = model.generate("Where is the cat?", max_new_tokens=24)
    cache = model.new_cache()

    async def read(begun: asyncio.Event, refused: asyncio.Event) -> str:
        text = ""
        for chunk in model.stream("Where is the cat?", cache=cache, max_new_tokens=24):
            text += chunk
            if not begun.is_set():
                begun.set()
                await refused.wait()
        return text

    async def main() -> str:
        begun, refused = asyncio.Event(), asyncio.Event()
        task = asyncio.create_task(read(begun, refused))
        await begun.wait()
        with pytest.raises(BusyError):
            model.generate("Hi", cache=cache)
        with pytest.raises(BusyError):
            await asyncio.to_thread(model.generate, "Hi", cache=cache)
        refused.set()
        return await task

    assert asyncio.run(main()) == wanted
    model.generate("Hi", cache=cache, max_new_tokens=2)
