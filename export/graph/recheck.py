"""Check an exported folder against transformers and against its source.

Earlier versions opened some bases otherwise than transformers does. These checks find the folders that are affected.
"""

from __future__ import annotations

from tp_runtime.errors import ModelFormatError
from tp_runtime.session import Graph, ModelFolder
from tp_runtime.text import TextCodec

from ..source import Difference, Source, compare_ids, load_model
from .parity import measure_parity
from .stored import stored_student

_AGAIN = "export the model again from its source, and fit its patches again"


def check_token_ids(folder: ModelFolder) -> str:
    """Compare the token ids of a folder with those of the tokenizer that transformers loads from the same folder.

    Returns:
        A line that says what was compared.

    Raises:
        ModelFormatError: the ids differ, or a tokenizer file is damaged.
    """
    codec = TextCodec.from_model_folder(folder)
    if (difference := compare_ids(codec, folder.path)) is not None:
        raise _other_ids(folder, difference)
    return "token ids: those of transformers on the sample texts"


def check_against_source(folder: ModelFolder, source: Source) -> list[str]:
    """Check that a folder is an export of a source: the same base, the same token ids, the same predictions.

    Args:
        folder: the exported folder.
        source: the source as this version opens it, which refuses a source that lacks weights.

    Returns:
        One line for each check.

    Raises:
        ModelFormatError: the folder is of another base, or of this base as an earlier version read it; the ids differ;
            the source cannot be loaded; or the graph does not compute what the source computes.
        DeviceUnavailableError: no ONNX Runtime is installed.
    """
    change = source.digest_change
    if folder.base_digest != source.digest:
        earlier = change is not None and change.before == folder.base_digest
        raise ModelFormatError(
            f"an earlier version read the source in another way: {change.reason}"
            if earlier and change is not None
            else "the folder is not an export of this source",
            field="base digest",
            got=folder.base_digest,
            wanted=source.digest,
            fix=_AGAIN if earlier else "give the source that the folder was exported from",
        )
    if (difference := compare_ids(TextCodec.from_model_folder(folder), source.path)) is not None:
        raise _other_ids(folder, difference)
    model = load_model(source)
    parity = measure_parity(source.codec, model, Graph(folder, device="cpu"), stored_student(model, folder))
    parity.require(_AGAIN)
    return [
        "base: the source has the folder's base digest, and all of its weights",
        "token ids: those of transformers on the source",
        f"predictions: {parity}",
    ]


def _other_ids(folder: ModelFolder, difference: Difference) -> ModelFormatError:
    return ModelFormatError(
        "the folder's token ids are not those of transformers",
        field=str(folder.path),
        got=difference,
        wanted="the ids of transformers",
        fix=_AGAIN,
    )
