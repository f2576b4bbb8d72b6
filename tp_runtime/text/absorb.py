"""A system prompt as a patch of entries alone: its own keys and values, made by the session that will use them.

The exporter makes the same patch with torch (`tp-export patch --prefix all`). All entries together are exact: behind
them the model answers as behind the prompt itself. The patch belongs to everything that the keys and values depend on.
So it names the precision of the folder, and holds the weights under which they were computed: those of an active
patch, of the folder's default patch, and of its repair.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime

from ..errors import PatchValueError, RequestError, shown
from ..generation import prompt_entries
from ..loaded_patches import ResolvedPatch
from ..patch import ADDS_TO_WEIGHTS, Patch, PatchConfig, check_dtype, context_digest, fitted_precision
from ..session import Graph, measure_probe
from .beginning import Beginning, beginning_of, beginnings_of, in_front_of, writes_the_date
from .codec import TextCodec

Progress = Callable[[int, int], object]
"""Takes the number of tokens that have run, and that of all tokens."""

# Different first and last characters, because a tokenizer may join those of a query with what the template writes.
_QUERIES = ("Hello", "What is it?", "is tea better than coffee", "7 times 8 =", "(aside) Why not!", "«Où?» «Là.»")
_SYSTEMS = ("Answer in one sentence.", "be kind", "7 o'clock", "- no lists", "«Bonjour»", "(aside)")
_PROBE = (
    "Please answer in two or three full sentences: who are you, what may I ask you about, which rules do you follow "
    "when you answer, and what would you never do, even if somebody asked you politely?"
)
_PROBE_TOKENS = 48  # as in the exporter: the logits of this many positions tell two patches apart


def absorb_prompt(
    graph: Graph,
    codec: TextCodec,
    system: str,
    weights: ResolvedPatch,
    name: str,
    *,
    dtype: str | None = None,
    before_system: bool = False,
    progress: Progress | None = None,
) -> Patch:
    """Compute the patch that stands in for a system prompt.

    Args:
        graph: the session.
        codec: the tokenizer and the chat template of the same folder.
        system: the system message; in completion style, the text in front of every prompt.
        weights: the patch that is active; the result holds its weights.
        name: the name of the patch.
        dtype: the dtype that the patch is stored in, a key of `DTYPES`; the values are rounded to it. None takes that
            of the session's keys and values, which rounds nothing.
        before_system: whether the prompt is to stand in front of a system message that every request under the patch
            has of its own, with a blank line between them; otherwise it stands in place of one.
        progress: a function that is called with the number of tokens that have run and that of all tokens.

    Raises:
        RequestError: the prompt is empty, the template refuses a system message or does not put it in front of every
            query, or the prompt does not fit the context window.
        PatchValueError: the active patch has entries, or a value does not fit `dtype`.
        PatchFormatError: the name or the dtype is not valid.
    """
    if weights.bound.prefix is not None:
        raise PatchValueError(
            f"the active patch has entries, and a patch with entries adds {ADDS_TO_WEIGHTS}",
            field="patch",
            got=None if weights.patch is None else weights.patch.name,
            wanted="the base, or a patch of weights alone",
            fix="absorb both prompts as one text, with patch=None",
        )
    stored = graph.folder.kv.dtype if dtype is None else dtype
    check_dtype(stored)
    beginning = _beginning(codec, system, before_system)
    folder = graph.folder
    length = len(beginning.teacher)
    if length >= folder.context_window:
        raise RequestError(
            "the prompt leaves no room in the context window",
            field="system",
            got=f"{length} tokens",
            wanted=f"at most {folder.context_window - 1}",
            fix="shorten the prompt",
        )
    config = PatchConfig(
        name=name,
        method="composed" if weights.bound.deltas else "prefix",
        base_model=folder.base_model,
        base_digest=folder.base_digest,
        architecture=folder.architecture,
        precision=fitted_precision(folder.precision),
        context_digest=context_digest(system),
        licence=None if weights.patch is None else weights.patch.config.licence,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        stop=() if weights.patch is None else weights.patch.config.stop,
        weights_digest=folder.weights_digest,
    )
    prefix = prompt_entries(graph, beginning.teacher, beginning.student, weights.bound, progress, before_system)
    patch = Patch(weights.bound.deltas, config, prefix).rounded(stored)
    most = len(beginning.student) + min(_PROBE_TOKENS, folder.context_window - length)
    ids = codec.render(_PROBE, _SYSTEMS[0] if before_system else None)[:most]
    probe = measure_probe(ids, graph.run(ids, graph.bind(patch)))
    return replace(patch, config=replace(config, probe=probe))


def _beginning(codec: TextCodec, system: str, before_system: bool) -> Beginning:
    """Return the ids of every prompt with the system prompt that entries replace, and the ids without it.

    Raises:
        RequestError: the prompt is empty, or entries cannot stand in for it in this model's prompts.
    """
    if not isinstance(system, str) or not system.strip():
        raise RequestError("the prompt to absorb is empty", field="system", got=shown(system), wanted="text")
    if before_system:
        asked = [(query, own) for query in _QUERIES for own in _SYSTEMS]
        prompts = [(codec.render(query, in_front_of(own, system)), codec.render(query, own)) for query, own in asked]
    else:
        prompts = [(codec.render(query, system), codec.render(query)) for query in _QUERIES]
    beginning = beginning_of(prompts)
    if beginning is None:
        found = beginnings_of(prompts)
        nothing = len(found) == 1 and not next(iter(found)).teacher
        raise RequestError(
            "the chat template does not write the system message"
            if nothing
            else "the chat template does not put the system message in front of every query",
            field="system",
            got="prompts that are the same without it" if nothing else f"{len(found)} different beginnings of prompts",
            wanted="a template that writes it in front of the first message, and the rest as without it",
            fix="send the text in the first user message instead",
        )
    if writes_the_date(codec.template_source):
        raise RequestError(
            "the chat template writes the date, so tomorrow's prompts would begin differently",
            field="system",
            got="strftime_now in the template",
            wanted="a template whose beginning is the same every day",
            fix="keep the prompt in a prefix cache instead (docs/serving.md)",
        )
    return beginning
