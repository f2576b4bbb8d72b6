"""This module finds the committed fixtures: exported tiny models and small graphs, so the edge tests need no exporter.

Run `python -m runtime_tests.export.fixtures` to write the fixtures again.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from runtime_tests.patches import patch_for
from tp_runtime.patch import Patch
from tp_runtime.session import ModelFolder, describe_files, write_slots_file

FIXTURES = Path(__file__).parent / "fixtures"
GRAPHS = FIXTURES / "graphs"
VERSIONS = FIXTURES / "versions"  # a patch file of each version
DIGESTS = FIXTURES / "digests.json"
FIGURES = FIXTURES / "torch.json"


def digests() -> dict[str, str]:
    """Return the SHA-256 of each small graph, of each version's patch file and of each patch_slots.json, by path.

    A folder's patch_slots.json lists the digests of every other file in the folder.
    """
    return json.loads(DIGESTS.read_text(encoding="utf-8"))


def torch_figures() -> dict[str, dict[str, dict[str, list[Any]]]]:
    """Return the figures that torch computed for a few tokens with the weights of each model folder.

    The figures of a folder are `default`, with nothing bound, and `patched`. Each has the format of a patch's probe.
    """
    return json.loads(FIGURES.read_text(encoding="utf-8"))


def figure_patch(folder: ModelFolder) -> Patch:
    """Return the patch of the `patched` figures: a delta in every slot, instead of the folder's default patch."""
    return patch_for(folder, seed=1, scale=0.2)


def private_copy(name: str, parent: Path) -> Path:
    """Copy a committed model folder into `parent`, so that a test may write to it."""
    return shutil.copytree(FIXTURES / name, parent / name)


def with_settings(folder: Path, name: str, **values: Any) -> None:
    """Change keys of a JSON file of a private copy, and the digest of the file that the folder states."""
    described, file = ModelFolder.open(folder), folder / name
    file.write_text(json.dumps({**json.loads(file.read_text(encoding="utf-8")), **values}), encoding="utf-8")
    write_slots_file(replace(described, files=describe_files(folder, list(described.files))))
