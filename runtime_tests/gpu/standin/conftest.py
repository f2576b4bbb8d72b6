"""The environment of the stand-in, as a fixture."""

from __future__ import annotations

import pytest

from runtime_tests.gpu.standin.environment import StandIn, Unavailable, make_standin


@pytest.fixture(scope="session")
def standin() -> StandIn:
    try:
        return make_standin()
    except Unavailable as reason:
        pytest.skip(str(reason))
