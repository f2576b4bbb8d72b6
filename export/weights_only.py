"""Other forms of a patch carry weights alone: what a patch with a KV prefix would lose there is refused."""

from __future__ import annotations

from tp_runtime.errors import PatchTargetError
from tp_runtime.patch import Patch


def refuse_prefix(patch: Patch, form: str) -> None:
    """Raise PatchTargetError for a patch whose KV prefix another tool's file would leave behind."""
    if patch.prefix is not None:
        raise PatchTargetError(
            f"a {form} has no place for a KV prefix, and without it these weights are wrong",
            field="prefix",
            got=f"{len(patch.prefix)} entries a head",
            wanted="a patch of weights alone",
            fix="fit the patch without --prefix",
        )
