"""Random requests from the OpenAPI document: no answer is a 500, and none is undocumented."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.checks import CHECKS, load_all_checks

from tp_runtime.model import PatchedModel
from tp_runtime.serve import ServerSettings

from .conftest import Running, running

load_all_checks()
_SKIPPED = {
    "positive_data_acceptance",  # the document cannot say which patches are loaded, or what a prompt may hold
    "unsupported_method",
}


@pytest.fixture(scope="module")
def server(model: PatchedModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder: Path = tmp_path_factory.mktemp("patches")
    with running(model, ServerSettings(port=0, patch_dir=folder, manage_patches=True, max_tokens=4)) as made:
        yield made


@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.value)
def test_no_answer_is_a_failure_or_undocumented(server: Running, mode: GenerationMode) -> None:
    checks = [check for check in CHECKS.get_all() if check.__name__ not in _SKIPPED]
    document = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    operations = [found.ok() for found in document.get_all_operations()]
    assert len(operations) > 8
    for operation in operations:
        try:
            cases = operation.as_strategy(generation_mode=mode)

            @settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
            @given(case=cases)
            def check(case: schemathesis.Case) -> None:
                if mode is GenerationMode.POSITIVE and isinstance(case.body, dict) and "model" in case.body:
                    case.body["model"] = "pirate"  # otherwise nearly every answer is 404
                    case.body.pop("patch", None)
                case.call_and_validate(checks=checks)

            check()
        except Unsatisfiable:  # nothing of a route without parameters can be wrong
            assert mode is GenerationMode.NEGATIVE
