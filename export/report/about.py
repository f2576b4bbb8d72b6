"""The description of a report: the base model, graph, device and versions that its figures belong to."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from .figures import Composed, PatchReport, Report
from .setup import Setup


def describe_report(setup: Setup, patches: Sequence[PatchReport], composition: Sequence[Composed]) -> Report:
    """Combine the measured parts with a description of the setup that they were measured with.

    Args:
        setup: the source, the model and the graph that were measured with.
        patches: the figures of each patch.
        composition: the figures of the sum of the patches; empty for a single patch.

    Returns:
        The whole report.
    """
    versions = {name: _version(name) for name in ("tp-runtime", "torch", "transformers")}
    runtime = None
    if setup.graph is not None:
        folder = setup.graph.folder
        runtime = f"{folder.path.name}, {folder.precision}, on {setup.graph.device.provider}"
        # The module states its version. A vendor's build need not be a distribution of either name.
        name = "onnxruntime-gpu" if setup.graph.device.kind == "cuda" else "onnxruntime"
        versions[name] = setup.graph.ort.__version__
    return Report(
        base_model=setup.source.name,
        architecture=setup.source.architecture,
        runtime=runtime,
        device=str(setup.model.device),
        versions=versions,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        command=shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        patches=list(patches),
        composition=list(composition),
    )


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # only its source folder is on the path
        return "unknown"
