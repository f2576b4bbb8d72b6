"""The tensors of a patch in memory: in the dtype of their file, and exactly its values when they are read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from runtime_tests.patches import random_patch
from tp_runtime.patch import Patch
from tp_runtime.patch.dtypes import widen

EVERY_HALF = np.arange(2**16, dtype=np.uint16).view(np.float16)


def test_every_half_is_widened_exactly() -> None:
    finite = EVERY_HALF[np.isfinite(EVERY_HALF)]
    out = np.empty(finite.shape, np.float32)
    widen(finite, out)
    assert np.array_equal(out.view(np.int32), finite.astype(np.float32).view(np.int32))  # the sign of zero, too
    out = np.empty(EVERY_HALF.shape, np.float32)
    widen(EVERY_HALF, out)
    assert np.array_equal(out, EVERY_HALF.astype(np.float32), equal_nan=True)


def test_halves_are_widened_into_a_part_of_an_array() -> None:
    halves, out = EVERY_HALF[:12].reshape(3, 4), np.full((3, 6), 7, np.float32)
    widen(halves, out[:, 1:5])
    assert np.array_equal(out[:, 1:5], halves.astype(np.float32)) and (out[:, [0, 5]] == 7).all()


@pytest.mark.parametrize(("dtype", "item"), [("f16", 2), ("bf16", 2), ("f32", 4), ("i8", 1)])
def test_a_loaded_patch_takes_the_memory_of_its_file(tmp_path: Path, dtype: str, item: int) -> None:
    patch = random_patch(layers=2)
    patch.save(tmp_path / "p.safetensors", dtype)
    loaded = Patch.load(tmp_path / "p.safetensors")
    size = sum(values.size for delta in loaded.deltas.values() for values in delta.parts().values())
    # With int8, biases and means are halves, and the factors have scales.
    assert loaded.memory_bytes == item * size or (dtype == "i8" and size < loaded.memory_bytes < 2 * size)
    assert loaded.memory_bytes <= loaded.nbytes
    assert all(values.dtype == np.float32 for delta in loaded.deltas.values() for values in delta.parts().values())


def test_a_value_that_was_read_cannot_be_changed_in_the_patch(tmp_path: Path) -> None:
    random_patch().save(tmp_path / "p.safetensors")
    loaded = Patch.load(tmp_path / "p.safetensors")
    before = loaded.identity
    for delta in loaded.deltas.values():
        for values in delta.parts().values():
            with pytest.raises(ValueError, match="read-only"):
                values[...] = 1
    assert Patch(loaded.deltas, loaded.config).identity == before


def test_a_file_that_changes_after_it_was_read_does_not_change_the_patch(tmp_path: Path) -> None:
    file = tmp_path / "p.safetensors"
    random_patch(1).save(file)
    loaded = Patch.load(file)
    values = {slot: delta.parts() for slot, delta in loaded.deltas.items()}
    file.write_bytes(b"")
    for slot, delta in loaded.deltas.items():
        for part, array in delta.parts().items():
            assert np.array_equal(array, values[slot][part])
