"""Committed patch files of every version stay readable, and the writer still writes them byte for byte."""

from __future__ import annotations

from pathlib import Path

import pytest

from runtime_tests.bad_patches import unpacked
from runtime_tests.committed import VERSIONS
from runtime_tests.patches import version_patches
from tp_runtime.patch import Patch

# Caches and signatures are keyed by the identity, so a change of one of these breaks compatibility.
IDENTITIES = {
    "1": "c5ef01753af26afe60a33045983e424fb13d4ccc505360e7cf67258c3ed2f0e9",
    "2": "307ec282876af674cfeced306ba20778390d2527514fb686e768e3e262bce29d",
    "3": "3846a7055470d7f76bff9eef7c1ff1853eca694feba62f0ed9e372b12da16155",
    "4": "a5ad483d67c4576dd341cb7fb1cd54028d27d06439f8e6bd51aceffc61936173",
}


@pytest.mark.parametrize("version", IDENTITIES)
def test_a_committed_file_of_each_version_is_read(version: str) -> None:
    file = VERSIONS / f"{version}.safetensors"
    assert unpacked(file.read_bytes())[0]["version"] == version
    patch, (made, dtype) = Patch.load(file), version_patches()[version]
    assert patch.identity == IDENTITIES[version] == made.rounded(dtype).identity
    assert (patch.config, patch.dtype, patch.nbytes) == (made.config, dtype, file.stat().st_size)
    assert (patch.prefix is not None) == (version != "1") and patch.config.stop == (("\n", "Q:") * (version == "3"))


@pytest.mark.parametrize("version", IDENTITIES)
def test_the_writer_writes_the_committed_bytes(version: str, tmp_path: Path) -> None:
    file = VERSIONS / f"{version}.safetensors"
    made, dtype = version_patches()[version]
    for patch, chosen in ((made, dtype), (Patch.load(file), None)):
        patch.save(tmp_path / "p.safetensors", chosen)
        assert (tmp_path / "p.safetensors").read_bytes() == file.read_bytes()
