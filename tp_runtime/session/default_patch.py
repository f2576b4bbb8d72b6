"""The default patch of a model folder, read from its own file: a session does not give out a graph's initializers.

The identity in the folder's description is a claim. It holds only if the file's values give it, so it is compared with
the identity that is computed from them. `tp-export check` compares the graph's initializers with the same file.
"""

from __future__ import annotations

from ..errors import ModelFormatError
from ..patch import MAX_FILE_BYTES, Patch
from ..storage import REEXPORT
from .model_folder import DEFAULT_FILE, ModelFolder
from .slots import check_patch


def read_default_patch(folder: ModelFolder) -> Patch | None:
    """Return the patch that the folder was exported with, or None if it has none.

    Raises:
        ModelFormatError: the folder lists no file for its default patch, or the file holds another patch.
        PatchError: the file is damaged, or its patch does not fit the folder's base or slots.
    """
    if folder.default_patch is None:
        return None
    if DEFAULT_FILE not in folder.files:
        raise ModelFormatError("the folder has a default patch but no file for it", field=DEFAULT_FILE, fix=REEXPORT)
    content = folder.read(DEFAULT_FILE, MAX_FILE_BYTES)
    patch, wanted = Patch.parse(content, folder.path / DEFAULT_FILE), folder.default_patch.identity
    if patch.identity != wanted:
        raise ModelFormatError(
            "the file does not hold the folder's default patch",
            field=DEFAULT_FILE,
            got=patch.identity,
            wanted=wanted,
            fix=REEXPORT,
        )
    check_patch(patch, folder)
    return patch
