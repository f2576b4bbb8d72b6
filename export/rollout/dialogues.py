"""The dialogues that a patch is fitted and measured on: the teacher's answers to queries, with the context in front."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tp_runtime.errors import CalibrationError, RequestError

from ..decoder import TorchPrefix
from ..progress import bar
from .completions import complete
from .context import check_text
from .ending import Ending
from .prompting import Prompting
from .sequences import Dialogue
from .store import RolloutStore

_SAMPLE_TEMPERATURE = 0.7


def dialogues_for(
    model: Any,
    prompting: Prompting,
    queries: Sequence[str],
    max_new_tokens: int,
    *,
    samples: int = 1,
    stop: Sequence[str] = (),
    cached: TorchPrefix | None = None,
    store: RolloutStore | None = None,
) -> list[Dialogue]:
    """Let the teacher answer `queries` with the context in front.

    If the context is None, teacher and student get the same prompts, and only the student's precision makes a
    difference between them.

    Args:
        model: the base model, loaded.
        prompting: how queries are asked with the prompt that the patch is to replace, and without it.
        queries: the queries.
        max_new_tokens: the largest number of tokens of an answer.
        samples: the number of answers to each query; the first is greedy, the others are sampled.
        stop: the texts that end an answer.
        cached: the keys and values of the beginning of the teacher's prompts, so that it is not run for every query.
        store: a store of completions; answers that it has are not generated again.

    Returns:
        The greedy answer to every query, then `samples` - 1 further rounds of sampled answers. Every round has the
        order of the queries.

    Raises:
        CalibrationError: there are no queries, the context is empty, every completion is empty, or no completion holds
            a stop string.
        RequestError: a query cannot be rendered or does not fit the context window.
    """
    if prompting.context is not None:
        check_text(prompting.context)
    if not queries:
        raise CalibrationError(
            "there are no queries", field="queries", got=0, wanted="at least one", fix="pass more queries"
        )
    teacher = [prompting.teacher(query) for query in queries]
    student = [prompting.student(query) for query in queries]
    check_prompts([*teacher, *student], max_new_tokens, model)
    ending = Ending.of(prompting.codec, stop)
    completions = []
    with bar("teacher completions", samples * len(queries), "answer") as shown:
        for sample in range(samples):
            temperature = _SAMPLE_TEMPERATURE if sample else 0.0
            completions += complete(
                model,
                teacher,
                max_new_tokens,
                ending,
                temperature=temperature,
                seed=sample,
                store=store,
                prefix=cached,
                progress=shown.update,
            )
    if all(set(completion) <= ending.eos_ids for completion in completions):
        raise CalibrationError(
            "every completion is empty",
            field="queries",
            got=f"{len(queries)} queries, no answer",
            wanted="queries that the prompted model answers",
            fix="change the prompt: the model ends its answer at once",
        )
    if stop and not any(ending.stopped(completion) for completion in completions):
        raise CalibrationError(
            "no answer of the prompted model holds a stop string",
            field="--stop",
            got=", ".join(map(repr, stop)),
            wanted=f"a text that ends the answers, within {max_new_tokens} tokens",
            fix="pass the text that ends an answer, raise --max-new-tokens, or leave --stop out",
        )
    prompts = [(tuple(t), tuple(s)) for t, s in zip(teacher, student, strict=True)]
    return [Dialogue(*pair, answer) for pair, answer in zip(prompts * samples, completions, strict=True)]


def check_prompts(prompts: Sequence[Sequence[int]], new_tokens: int, model: Any) -> None:
    """Check that a model can run prompts and answer them.

    Past the context window some models would answer with noise, and GPT-2 would crash. An id without a row in the
    embeddings comes from a token that transformers appended to the tokenizer, such as a padding token.

    Args:
        prompts: the ids of each prompt.
        new_tokens: the largest number of tokens of an answer.
        model: the transformers model.

    Raises:
        RequestError: a prompt and its answer do not fit the context window, or an id is outside the vocabulary.
    """
    window = model.config.max_position_embeddings
    longest = max(map(len, prompts)) + new_tokens
    if longest > window:
        raise RequestError(
            "the prompt, the query and the answer together do not fit the context window",
            field="prompt",
            got=f"{longest} tokens",
            wanted=f"at most {window}",
            fix="shorten the prompt, or lower --max-new-tokens",
        )
    size = model.get_input_embeddings().num_embeddings
    if (highest := max(max(ids) for ids in prompts)) >= size:
        raise RequestError(
            "a token id is outside the vocabulary of the model",
            field="prompt",
            got=highest,
            wanted=f"an id below {size}",
            fix="leave out the added token that has this id in tokenizer.json or tokenizer_config.json",
        )
