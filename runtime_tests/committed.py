"""The committed fixtures: exported tiny models and little graphs, so that the edge tests need no exporter.

`python -m runtime_tests.export.fixtures` makes them anew.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from runtime_tests.patches import patch_for
from tp_runtime.patch import Patch
from tp_runtime.session import ModelFolder

FIXTURES = Path(__file__).parent / "fixtures"
GRAPHS = FIXTURES / "graphs"
DIGESTS = FIXTURES / "digests.json"
FIGURES = FIXTURES / "torch.json"


def digests() -> dict[str, str]:
    """SHA-256 of each little graph and each folder's patch_slots.json (which lists every other file), by its path."""
    return json.loads(DIGESTS.read_text(encoding="utf-8"))


def torch_figures() -> dict[str, dict[str, dict[str, list[Any]]]]:
    """What torch says of a few tokens in the weights of each model folder: `default` with nothing bound, and `patched`.

    Each is written as a patch's probe is.
    """
    return json.loads(FIGURES.read_text(encoding="utf-8"))


def figure_patch(folder: ModelFolder) -> Patch:
    """The patch of the `patched` figures: something in every slot, in place of the folder's default patch."""
    return patch_for(folder, seed=1, scale=0.2)


def private_copy(name: str, parent: Path) -> Path:
    """A copy of a committed model folder in `parent`, which a test may write to."""
    return shutil.copytree(FIXTURES / name, parent / name)
