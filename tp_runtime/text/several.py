"""Several completions at once: several prompts, or several answers to one prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..errors import RequestError
from ..generation import PrefixCache, Sampling
from ..session import Graph
from .batch import Completion, TextBatch
from .encoder import RequestEncoder
from .request import Request

_SPARE_TOKENS = 64  # of a prefix cache for several answers to one prompt

_One = tuple[Any, dict[str, Any]]  # a prompt and its options


def is_several(prompt: Any) -> bool:
    """Return whether `prompt` holds several prompts. A list of messages is one prompt: one conversation."""
    return isinstance(prompt, list | tuple) and bool(prompt) and isinstance(prompt[0], str | list | tuple)


def run_prompts(
    graph: Graph,
    encoder: RequestEncoder,
    prompts: Sequence[Any],
    options: dict[str, Any],
    rows: int,
    prefix_cache: PrefixCache | None,
) -> list[Completion]:
    """Run several prompts in one batch.

    Args:
        graph: the graph that runs the steps.
        encoder: encodes the requests.
        prompts: the prompts.
        options: the options, of which a list holds one value for each prompt.
        rows: the largest number of prompts that run at the same time.
        prefix_cache: the cache from which prompts take the keys and values of earlier runs.

    Returns:
        The completions, in the order of the prompts.

    Raises:
        RequestError: a list does not have one value for each prompt, or a request is not valid; nothing was run.
        Exception: the error of the first request that failed.
    """
    return _run_together(graph, encoder, _each_prompt(prompts, options), rows, prefix_cache)


def run_answers(
    graph: Graph,
    encoder: RequestEncoder,
    prompt: Any,
    n: int,
    options: dict[str, Any],
    rows: int,
    prefix_cache: PrefixCache | None,
) -> list[Completion]:
    """Give several answers to one prompt, which run in one batch and share the run of the prompt.

    Args:
        graph: the graph that runs the steps.
        encoder: encodes the requests.
        prompt: the prompt.
        n: the number of answers. Answer i has the seed `seed` + i.
        options: the options.
        rows: the largest number of answers that run at the same time.
        prefix_cache: the model's prefix cache; the prompt is shared through it if it is large enough.

    Returns:
        The completions, in the order of the answers.

    Raises:
        RequestError: `prompt` holds several prompts, there is a KV cache, or the request is not valid; nothing was run.
        Exception: the error of the first answer that failed.
    """
    requests = _each_answer(prompt, n, options)
    return _run_together(graph, encoder, requests, rows, _shared_cache(graph, encoder, prompt, options, prefix_cache))


def _each_prompt(prompts: Sequence[Any], options: dict[str, Any]) -> list[_One]:
    """Return each prompt with its options: from a list the prompt's own item, and any other value unchanged.

    Raises:
        RequestError: a list does not have one value for each prompt.
    """
    count = len(prompts)
    each: list[dict[str, Any]] = [{} for _ in prompts]
    for name, value in options.items():
        values = value if _is_for_each(name, value) else [value] * count
        if len(values) != count:
            raise RequestError(
                "the list does not have one value for each prompt",
                field=name,
                got=f"{len(values)} values",
                wanted=f"{count} values, or one value for all prompts",
            )
        for own, item in zip(each, values, strict=True):
            own[name] = item
    return list(zip(prompts, each, strict=True))


def _each_answer(prompt: Any, n: int, options: dict[str, Any]) -> list[_One]:
    """Return `n` times the same prompt; answer i has the seed `seed` + i.

    Raises:
        RequestError: `prompt` holds several prompts, there is a cache, or the seed is not valid.
    """
    if options.get("cache") is not None:
        raise RequestError(
            "several answers have caches of their own", field="cache", got="a cache", wanted="None", fix="leave it out"
        )
    if is_several(prompt):
        raise RequestError("n is for one prompt", field="n", got=n, wanted="None", fix="repeat the prompts")
    seed = Sampling(seed=options.get("seed")).seed
    return [(prompt, {**options, "seed": None if seed is None else seed + answer}) for answer in range(n)]


def _run_together(
    graph: Graph, encoder: RequestEncoder, requests: Sequence[_One], rows: int, prefix_cache: PrefixCache | None
) -> list[Completion]:
    """Run requests in one batch.

    Args:
        graph: the graph that runs the steps.
        encoder: encodes the requests.
        requests: the prompts and their options; all are checked before one runs.
        rows: the largest number of requests that run at the same time.
        prefix_cache: the cache from which prompts take the keys and values of earlier runs.

    Returns:
        The completions, in the order of the requests.

    Raises:
        Exception: the error of the first request that failed.
    """
    with TextBatch(graph, encoder, min(rows, len(requests)), prefix_cache) as batch:
        completions = [batch.add(prompt, **options) for prompt, options in requests]
        while batch.step():
            pass
    for completion in completions:
        if completion.error is not None:
            raise completion.error
    return completions


def _shared_cache(
    graph: Graph, encoder: RequestEncoder, prompt: Any, options: dict[str, Any], own: PrefixCache | None
) -> PrefixCache:
    """Return a prefix cache that can hold a prompt, so that several answers to it run it once.

    Args:
        graph: the graph.
        encoder: encodes the request.
        prompt: the prompt.
        options: its options.
        own: the model's prefix cache, which is taken if it is large enough.
    """
    request, folder = encoder.encode(Request.of(prompt, **options)), graph.folder
    prefix = request.patch.bound.prefix
    tokens = len(request.tokens) + (0 if prefix is None else prefix.longest) + _SPARE_TOKENS
    needed = 2 * folder.layers * folder.kv.heads * folder.kv.head_dim * folder.kv.numpy_dtype.itemsize * tokens
    return own if own is not None and own.budget >= needed else PrefixCache(needed)


def _is_for_each(name: str, value: object) -> bool:
    """Return whether the value of an option is a list with a value for each prompt."""
    if name == "stop" or not isinstance(value, list | tuple):
        return False
    if name in ("tools", "documents"):  # these are lists themselves
        return bool(value) and all(item is None or isinstance(item, list | tuple) for item in value)
    return True
