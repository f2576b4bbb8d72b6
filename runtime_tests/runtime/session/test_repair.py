"""A repaired folder: its default patch compensates what quantisation costs, and is part of the base.

The repair of the fixture is random; runtime_tests/export/graph/test_precision.py fits one.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from runtime_tests.committed import private_copy
from runtime_tests.logits import furthest, token_ids
from runtime_tests.patches import patch_for
from tp_runtime.patch import Patch
from tp_runtime.session import DEFAULT_FILE, Graph, ModelFolder

IDS = token_ids(40)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Graph:
    return Graph(ModelFolder.open(private_copy("tiny-llama-int4", tmp_path_factory.mktemp("export"))), "cpu")


@pytest.fixture(scope="module")
def repaired(tmp_path_factory: pytest.TempPathFactory) -> Graph:
    return Graph(ModelFolder.open(private_copy("tiny-llama-repaired", tmp_path_factory.mktemp("export"))), "cpu")


@pytest.fixture(scope="module")
def repair(repaired: Graph) -> Patch:
    return Patch.load(repaired.folder.path / DEFAULT_FILE)


def test_the_base_of_a_repaired_folder_includes_the_repair(plain: Graph, repaired: Graph, repair: Patch) -> None:
    wanted = plain.run(IDS, plain.bind(repair))
    assert furthest(wanted, plain.run(IDS, plain.base)) > 0.1
    for bound in (repaired.base, repaired.default, repaired.bind(None)):
        assert bound.key[1] == repair.terms
        assert np.array_equal(repaired.run(IDS, bound), wanted)


def test_float_patches_are_added_to_the_repair(
    plain: Graph, repaired: Graph, repair: Patch, tiny_llama_export: Path
) -> None:
    context = patch_for(ModelFolder.open(tiny_llama_export), scale=0.3)
    bound = repaired.bind(context)
    assert bound.key[1] == (*repair.terms, *context.terms)
    assert furthest(repaired.run(IDS, bound), plain.run(IDS, plain.bind(repair + context))) < 1e-4


def test_patches_fitted_for_the_precision_replace_the_repair(plain: Graph, repaired: Graph, repair: Patch) -> None:
    own = Patch({key: delta.scaled(0.5) for key, delta in repair.deltas.items()}, repair.config)
    bound = repaired.bind(own)
    assert bound.key[1] == own.terms
    assert np.array_equal(repaired.run(IDS, bound), plain.run(IDS, plain.bind(own)))


def test_strength_zero_is_the_repaired_base(repaired: Graph, repair: Patch) -> None:
    assert repaired.bind(0.0 * repair) is repaired.base
