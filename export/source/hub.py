"""Base models from the Hugging Face hub: downloading one, and the name of a folder in the hub's cache."""

from __future__ import annotations

from pathlib import Path

from tp_runtime.errors import ModelFormatError

from .licences import licence_patterns

_FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", *licence_patterns()]
_PREFIX = "models--"


def download(name: str) -> Path:
    """Return the folder of a hub model. huggingface_hub downloads what is missing, with the user's own configuration.

    Args:
        name: the model's id, owner/name.

    Raises:
        ModelFormatError: the hub has no such model, or cannot be reached.
    """
    problem = ModelFormatError(
        "there is no such folder, and the hub has no such model or cannot be reached",
        field="SRC",
        got=name,
        wanted="a Hugging Face folder, or owner/name of a hub model",
        fix="choose a model that needs no hub: tp-export fetch --list shows them",
    )
    if name.count("/") > 1 or name.startswith((".", "/", "~")):
        raise problem
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    from requests.exceptions import RequestException

    try:
        return Path(snapshot_download(name, allow_patterns=_FILES))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, RequestException) as error:
        raise problem from error


def hub_id(folder: Path) -> str | None:
    """Return the id of the hub model whose snapshot a folder is, or None for any other folder.

    Args:
        folder: a resolved path; the hub's cache calls a snapshot models--<owner>--<name>/snapshots/<revision>.
    """
    model = folder.parent.parent.name
    if folder.parent.name != "snapshots" or not model.startswith(_PREFIX):
        return None
    return model.removeprefix(_PREFIX).replace("--", "/")
