"""Patches of an open model: loading, choosing and unloading them, and that no misuse changes the model."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime_tests.logits import token_ids
from runtime_tests.patches import patch_for
from tp_runtime.errors import (
    BaseMismatchError,
    PatchFormatError,
    PatchInUseError,
    PatchShapeError,
    PatchTargetError,
    PatchValueError,
)
from tp_runtime.model import ACTIVE, PatchedModel
from tp_runtime.patch import Delta, Patch
from tp_runtime.session import ModelFolder, probe

IDS = token_ids(20)


@pytest.fixture(scope="module")
def shared(tiny_llama_export: Path) -> PatchedModel:
    return PatchedModel.from_pretrained(tiny_llama_export, "cpu")


@pytest.fixture
def model(shared: PatchedModel) -> Iterator[PatchedModel]:
    yield shared
    for name in shared.patches:
        shared.unload_patch(name)


@pytest.fixture(scope="module")
def patch(tiny_llama_export: Path) -> Patch:
    return patch_for(ModelFolder.open(tiny_llama_export), seed=1)


@pytest.fixture(scope="module")
def other(tiny_llama_export: Path) -> Patch:
    return patch_for(ModelFolder.open(tiny_llama_export), seed=2)


def same(one: Any, two: Any) -> bool:
    return np.array_equal(one, two)


# -- loading and unloading -----------------------------------------------------------------------------------


def test_loaded_patches_are_used_by_name_and_unloading_restores_the_base_exactly(
    model: PatchedModel, patch: Patch, other: Patch, tmp_path: Path
) -> None:
    base = model.logits(IDS)
    patch.save(tmp_path / "p.safetensors", "f32")
    assert model.load_patch(tmp_path / "p.safetensors") == "random-1"
    assert model.load_patch(str(tmp_path / "p.safetensors"), "again") == "again"
    assert model.load_patch(other, name="other") == "other"
    assert list(model.patches) == ["random-1", "again", "other"] and model.patches["other"] is other
    assert same(model.logits(IDS), base)  # loading switches nothing on
    assert same(model.logits(IDS, "again"), model.logits(IDS, patch))
    assert same(model.logits(IDS, "random-1"), model.logits(IDS, patch))
    assert same(model.logits(IDS, "other"), model.logits(IDS, other))
    assert not same(model.logits(IDS, "other"), model.logits(IDS, "again"))
    for name in ("other", "random-1", "again"):
        assert not same(model.logits(IDS, name), base)
        model.unload_patch(name)
        assert same(model.logits(IDS), base)
        with pytest.raises(PatchTargetError, match="no patch of that name"):
            model.logits(IDS, name)
    assert not model.patches


def test_the_view_of_loaded_patches_is_read_only(model: PatchedModel, patch: Patch) -> None:
    with pytest.raises(TypeError):
        model.patches["p"] = patch  # type: ignore[index]


def test_a_taken_name_is_refused(model: PatchedModel, patch: Patch, other: Patch) -> None:
    model.load_patch(patch, "p")
    with pytest.raises(PatchInUseError, match="'p'"):
        model.load_patch(other, "p")
    assert model.patches["p"] is patch


def test_strength_scales_a_patch_chosen_by_name_by_object_or_by_block(model: PatchedModel, patch: Patch) -> None:
    model.load_patch(patch, "p")
    half = model.logits(IDS, 0.5 * patch)
    assert not same(half, model.logits(IDS, patch))
    assert same(model.logits(IDS, "p", 0.5), half) and same(model.logits(IDS, patch, 0.5), half)
    with model.patched("p", 0.5):
        assert same(model.logits(IDS), half)
        assert same(model.logits(IDS, strength=2), model.logits(IDS, patch))
        assert same(model.logits(IDS, "p"), model.logits(IDS, patch))  # a patch that a request names has strength 1
    with model.patched("p"):
        assert same(model.logits(IDS, strength=0.5), half)
    assert same(model.logits(IDS, "p", 0), model.logits(IDS, None))
    assert same(model.logits(IDS, "p", -1), model.logits(IDS, -patch))


def test_unknown_names_and_objects_that_are_not_patches_are_refused(model: PatchedModel, patch: Patch) -> None:
    model.load_patch(patch, "p")
    before = model.logits(IDS)
    for call in (
        lambda: model.logits(IDS, "q"),
        lambda: model.stream("Hi", patch="q"),
        lambda: model.new_cache("q"),
        lambda: model.unload_patch("q"),
        lambda: model.check("q"),
        lambda: model.patched("q").__enter__(),
    ):
        with pytest.raises(PatchTargetError, match="'p'"):  # the error lists the loaded names
            call()
    for thing in (1, 2.0, Path("p"), ["p"], {"p": 1.0}):
        with pytest.raises(PatchTargetError, match="not a patch"):
            model.logits(IDS, thing)  # type: ignore[arg-type]
    assert list(model.patches) == ["p"] and same(model.logits(IDS), before)


@pytest.mark.parametrize("strength", [float("nan"), float("inf"), -float("inf"), True, "1", None, 1e300])
def test_invalid_strengths_are_refused(model: PatchedModel, patch: Patch, strength: Any) -> None:
    model.load_patch(patch, "p")
    with model.patched("p"):
        before = model.logits(IDS)
        for choice in ("p", patch, ACTIVE):
            if strength is not True or choice is patch:  # True equals 1.0, so "p" and ACTIVE are not scaled
                with pytest.raises(PatchValueError) as error:
                    model.stream("Hi", patch=choice, strength=strength)
                assert error.value.field == "strength"
        with pytest.raises(PatchValueError):
            model.patched(patch, strength).__enter__()
        assert same(model.logits(IDS), before)


@pytest.mark.parametrize("choice", [None, ACTIVE])
def test_a_strength_without_a_patch_is_refused(model: PatchedModel, choice: Any) -> None:
    for strength in (0.5, 0, float("nan")):
        with pytest.raises(PatchTargetError) as error:
            model.logits(IDS, choice, strength)
        assert error.value.field == "strength"


def bad_patches(patch: Patch) -> dict[str, tuple[type, Patch]]:
    """Return patches that do not fit the model, with the error that each raises."""
    delta = patch.deltas[0, "mlp_out"]
    assert delta.a is not None and delta.b is not None
    slots = {
        "too many layers": (PatchShapeError, {**patch.deltas, (3, "mlp_out"): delta}),
        "site": (PatchTargetError, {**patch.deltas, (0, "gate"): delta}),
        "inputs": (PatchShapeError, {(0, "mlp_out"): Delta(np.ones((7, 2)), delta.b[:2])}),
        "outputs": (PatchShapeError, {(0, "mlp_out"): Delta(delta.a, np.ones((delta.rank, 7)))}),
        "bias": (PatchShapeError, {(0, "mlp_out"): Delta(bias=np.ones(7))}),
    }
    bad: dict[str, tuple[type, Patch]] = {name: (error, Patch(d, patch.config)) for name, (error, d) in slots.items()}
    foreign = replace(patch.config, base_digest="0" * 64)
    bad["base"] = BaseMismatchError, Patch(patch.deltas, foreign)
    bad["precision"] = BaseMismatchError, Patch(patch.deltas, replace(patch.config, precision="int4"))
    return bad


@pytest.mark.parametrize("kind", ["too many layers", "site", "inputs", "outputs", "bias", "base", "precision"])
def test_a_patch_that_does_not_fit_changes_nothing(model: PatchedModel, patch: Patch, kind: str) -> None:
    error, bad = bad_patches(patch)[kind]
    base = model.logits(IDS)
    model.load_patch(patch, "p")
    with model.patched("p"):
        active = model.logits(IDS)
        for call in (
            lambda: model.load_patch(bad, "bad"),
            lambda: model.load_patch(bad, "p"),
            lambda: model.stream("Hi", patch=bad),
            lambda: model.logits(IDS, bad, 0.5),
            lambda: model.patched(bad).__enter__(),
            lambda: model.new_cache(bad),
        ):
            with pytest.raises(error):
                call()
        assert same(model.logits(IDS), active)
    assert dict(model.patches) == {"p": patch} and same(model.logits(IDS), base)


def test_a_patch_of_another_base_is_refused_even_if_its_values_were_accepted_before(
    model: PatchedModel, patch: Patch
) -> None:
    """The identity covers only values, so an accepted patch must not make its foreign copy acceptable."""
    foreign = bad_patches(patch)["base"][1]
    model.logits(IDS, patch)
    for strength in (1, 0):
        model.logits(IDS, patch, strength)
        with pytest.raises(BaseMismatchError):
            model.logits(IDS, foreign, strength)


# -- in use --------------------------------------------------------------------------------------------------


def test_a_patch_in_use_by_a_stream_cannot_be_unloaded(model: PatchedModel, patch: Patch) -> None:
    model.load_patch(patch, "p")
    for strength in (1.0, 0.5):
        streams = [model.stream("Hi", patch="p", strength=strength, max_new_tokens=200) for _ in range(2)]
        for stream in streams:
            next(stream)
        for stream, users in zip(streams, (2, 1), strict=True):
            with pytest.raises(PatchInUseError, match=f"used {users} times"):
                model.unload_patch("p")
            stream.close()
    for _chunk in model.stream("Hi", patch="p", max_new_tokens=3):
        pass  # a stream that ran to its end releases the patch without close
    model.unload_patch("p")


def test_a_patch_cannot_be_unloaded_inside_its_block(model: PatchedModel, patch: Patch) -> None:
    model.load_patch(patch, "p")
    with pytest.raises(ZeroDivisionError), model.patched("p", 0.5), model.patched(None):
        with pytest.raises(PatchInUseError):
            model.unload_patch("p")
        raise ZeroDivisionError
    model.unload_patch("p")


def test_a_stream_does_not_run_if_its_patch_was_unloaded_before_it_began(
    model: PatchedModel, patch: Patch, other: Patch
) -> None:
    model.load_patch(patch, "p")
    unloaded, replaced = (model.stream("Hi", patch="p") for _ in range(2))
    model.unload_patch("p")
    with pytest.raises(PatchTargetError):
        next(unloaded)
    model.load_patch(other, "p")
    with pytest.raises(PatchTargetError):
        next(replaced)
    model.unload_patch("p")  # neither stream counts as a user


def test_a_dropped_stream_releases_its_patch_even_while_the_lock_is_held(model: PatchedModel, patch: Patch) -> None:
    model.load_patch(patch, "p")

    def drop() -> None:
        stream = model.stream("Hi", patch="p", max_new_tokens=200)
        next(stream)
        with model._patches.lock:  # the garbage collector may run while another patch is being loaded
            del stream

    thread = threading.Thread(target=drop, daemon=True)
    thread.start()
    thread.join(60)
    assert not thread.is_alive()
    model.unload_patch("p")


def test_a_failed_request_releases_its_patch(model: PatchedModel, patch: Patch, monkeypatch: Any) -> None:
    model.load_patch(patch, "p")
    stream = model.stream("Hi", patch="p")
    monkeypatch.setattr(model.graph, "forward", lambda *_a, **_k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        next(stream)
    model.unload_patch("p")


# -- the active patch ----------------------------------------------------------------------------------------


def test_nested_blocks_restore_the_patch_that_was_active_before(
    model: PatchedModel, patch: Patch, other: Patch
) -> None:
    model.load_patch(patch, "p")
    base, with_p, with_q = (model.logits(IDS, choice) for choice in (None, patch, other))
    with model.patched("p") as entered:
        assert entered is model and same(model.logits(IDS), with_p)
        with model.patched(other):
            assert same(model.logits(IDS), with_q)
            assert same(model.logits(IDS, None), base)
            with model.patched(None):
                assert same(model.logits(IDS), base)
        with pytest.raises(PatchTargetError), model.patched("no such"):
            pass
        assert same(model.logits(IDS), with_p)
        stream = model.stream("Hi", max_new_tokens=6)
    assert same(model.logits(IDS), base)
    # A request uses the patch that was active when the request was made.
    assert "".join(stream) == model.generate("Hi", patch="p", max_new_tokens=6)


def test_blocks_are_local_to_a_thread(model: PatchedModel, patch: Patch, other: Patch) -> None:
    wanted = [model.logits(IDS, choice) for choice in (patch, other, None)]
    meet = threading.Barrier(3)

    def work(choice: Patch | None) -> bool:
        with model.patched(choice):
            meet.wait(30)
            results = [model.logits(IDS) for _ in range(5)]
            meet.wait(30)
        return all(same(got, wanted[[patch, other, None].index(choice)]) for got in results)

    with ThreadPoolExecutor(3) as pool, model.patched(other):
        futures = [pool.submit(work, choice) for choice in (patch, other, None)]
        assert all(future.result() for future in futures)
    with model.patched(patch), ThreadPoolExecutor(1) as pool:
        assert same(pool.submit(model.logits, IDS).result(), wanted[2])  # a new thread starts without a patch


def test_blocks_are_local_to_a_task_and_reach_its_threads(model: PatchedModel, patch: Patch, other: Patch) -> None:
    model.load_patch(patch, "p")
    wanted = {choice: model.logits(IDS, choice) for choice in ("p", other, None)}

    async def work(choice: Any) -> bool:
        with model.patched(choice):
            await asyncio.sleep(0.01)
            here, there = model.logits(IDS), await asyncio.to_thread(model.logits, IDS)
        return same(here, wanted[choice]) and same(there, wanted[choice]) and same(model.logits(IDS), wanted[None])

    async def main() -> list[bool]:
        return await asyncio.gather(*(work(choice) for choice in ("p", other, None)))

    assert asyncio.run(main()) == [True] * 3


def test_a_task_that_outlives_its_block_cannot_use_an_unloaded_patch(model: PatchedModel, patch: Patch) -> None:
    model.load_patch(patch, "p")

    async def later() -> Any:
        await asyncio.sleep(0.01)
        return model.logits(IDS)

    async def main() -> None:
        with model.patched("p"):
            task = asyncio.create_task(later())
        model.unload_patch("p")
        with pytest.raises(PatchTargetError):
            await task

    asyncio.run(main())


# -- probes --------------------------------------------------------------------------------------------------


def test_load_with_check_accepts_only_patches_that_pass_their_probe(
    model: PatchedModel, patch: Patch, other: Patch
) -> None:
    measured = probe.measure_probe(IDS, model.logits(IDS, patch))
    good = Patch(patch.deltas, replace(patch.config, probe=measured))
    wrong = Patch(other.deltas, replace(other.config, probe=measured))
    assert model.load_patch(good, "good", check=True) == "good"
    assert model.check("good").ok and model.check(good) == model.check("good")
    assert not model.check(wrong).ok
    with pytest.raises(PatchFormatError, match=r"config\.probe"):
        model.load_patch(wrong, "wrong", check=True)
    with pytest.raises(PatchFormatError, match="no probe"):
        model.load_patch(patch, "none", check=True)
    assert list(model.patches) == ["good"]
