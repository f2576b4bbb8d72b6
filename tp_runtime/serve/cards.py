"""What the entries of /v1/models add to OpenAI's form, so that a client knows what a model and a patch cost."""

from __future__ import annotations

from ..patch import Patch
from ..session import ModelFolder
from .schema import Json
from .settings import ServerSettings


def model_facts(folder: ModelFolder, settings: ServerSettings, keeps_prompts: bool) -> Json:
    """Return what the entry of the model itself says under `model`.

    Args:
        folder: the model's folder.
        settings: the server's settings.
        keeps_prompts: whether the server keeps keys and values of earlier prompts, whose first token then comes sooner.

    Returns:
        `style` (chat or completion), `precision`, `context_window` (tokens), `max_tokens` (new tokens of a request),
        `kv_bytes_per_token` (keys and values of one token in every layer) and `keeps_prompts`.
    """
    kv = folder.kv
    return {
        "style": folder.style,
        "precision": folder.precision,
        "context_window": folder.context_window,
        "max_tokens": settings.max_tokens,
        "kv_bytes_per_token": 2 * kv.heads * kv.head_dim * kv.numpy_dtype.itemsize * folder.layers,
        "keeps_prompts": keeps_prompts,
    }


def patch_facts(patch: Patch) -> Json:
    """Return what the entry of a patch says about its context, its last report and its entries, if it has any.

    Of the entries this is `mean`, their number in each head on average over the layers, and `replaces`, the number of
    a prompt's first ids in whose place they stand. A session holds `mean - replaces` tokens more than the usage counts.
    """
    prefix = patch.prefix
    return {
        "context_digest": patch.config.context_digest or None,
        "report": patch.config.report,
        "entries": None
        if prefix is None
        else {"mean": sum(prefix.counts) / prefix.layers, "replaces": len(prefix.replaces)},
    }
