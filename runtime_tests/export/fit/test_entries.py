"""Entries fitted in lock-step, on every block design: what they reach, and which rows they are fitted to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from runtime_tests.export.entries import all_entries, some_entries
from runtime_tests.export.tiny import VARIANTS, tiny_model
from runtime_tests.logits import token_ids
from runtime_tests.patches import random_config
from tp_export.decoder import TorchPrefix, attending, blocks_of, layer_inputs, layer_windows
from tp_export.decoder.adapters import ADAPTERS
from tp_export.fit import Settings, assemble, fit_lockstep
from tp_export.fit.entries import MOST_ROWS, Compaction, RowChoice, most_rows
from tp_export.fit.lockstep import Behind
from tp_export.measure import TorchStudent, measure_fidelity
from tp_export.quantise import QuantisedStudent, quantised
from tp_export.rollout import Dialogue, batches
from tp_export.source import load_model, open_source

CONTEXT = token_ids(24, seed=99)  # 25 entries, with those of the first token
LAYERS = {"num_hidden_layers": 2}
MIXED = {"gemma2": {"layer_types": ["sliding_attention", "full_attention"]}}
MIXED["gemma3_text"] = MIXED["gemma2"]


@pytest.fixture(scope="module", params=[*ADAPTERS, *VARIANTS])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    options = LAYERS | MIXED.get(request.param, {})
    return load_model(open_source(tiny_model(tmp_path_factory.mktemp("m") / "m", request.param, **options)))


def dialogues(count: int = 40, seed: int = 0) -> list[Dialogue]:
    """Return dialogues whose teacher has the context in place of one id, behind the first token."""
    found = []
    for i in range(count):
        query, answer = token_ids(3 + i % 4, seed=1000 * seed + i), token_ids(6, seed=1000 * seed + 500 + i)
        found.append(Dialogue((1, *CONTEXT, *query), (1, 7, *query), tuple(answer)))
    return found


FITTED, HELD_OUT = dialogues(), dialogues(12, seed=1)


def behind(model: Any, counts: Sequence[int], **settings: Any) -> Behind:
    """Return a fit's surroundings, with a number of entries in each layer."""
    whole = all_entries(model, FITTED)
    teacher = replace(whole, replaces=FITTED[0].teacher_prompt[: whole.position])
    return Behind(teacher, whole, Compaction(tuple(counts), **settings))


def fit(model: Any, surroundings: Behind, method: str | None = None, **options: Any) -> tuple[Any, TorchPrefix]:
    deltas, prefix = fit_lockstep(model, FITTED, method, Settings(rank=4), behind=surroundings, **options)
    assert prefix is not None
    return deltas, prefix


def gap_closed(
    model: Any,
    prefix: TorchPrefix,
    deltas: Any = None,
    student: QuantisedStudent | None = None,
    on: Sequence[Dialogue] = HELD_OUT,
) -> float:
    patch = assemble(deltas or {}, prefix, random_config(), "f16")
    arms = TorchStudent(model, weights=student), TorchStudent(model, patch, student)
    return measure_fidelity(on, TorchStudent(model), *arms).gap_closed


def counts_for(model: Any, full: int = 6, windowed: int = 4) -> tuple[int, ...]:
    return tuple(full if window is None else windowed for window in layer_windows(model))


# -- the entries ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("forward", [False, True])
def test_fitted_entries_close_more_of_the_gap_than_the_contexts_own(model: Any, forward: bool) -> None:
    counts = counts_for(model)
    _deltas, prefix = fit(model, behind(model, counts, forward=forward))
    assert prefix.counts == counts and (prefix.replaces, prefix.position) == ((1, 7), 25)
    assert all(part.isfinite().all() for entry in prefix.entries for part in entry)
    whole = all_entries(model, FITTED)
    gaps = [gap_closed(model, prefix)]
    for start in (0, 25 - max(counts)):
        own = [
            (k[:, start : start + n], v[:, start : start + n]) for n, (k, v) in zip(counts, whole.entries, strict=True)
        ]
        gaps.append(gap_closed(model, replace(whole, entries=own)))
    assert gaps[0] > max(0.3, *gaps[1:])


def test_entries_that_are_kept_whole_are_the_contexts_own(model: Any) -> None:
    whole = all_entries(model, FITTED)
    _deltas, prefix = fit(model, behind(model, (25, counts_for(model)[1])))
    assert all(torch.equal(one, other) for one, other in zip(prefix.entries[0], whole.entries[0], strict=True))
    assert prefix.counts[1] < 25
    _deltas, exact = fit_lockstep(model, FITTED, None, Settings(), behind=replace(behind(model, ()), compaction=None))
    assert exact is not None and gap_closed(model, exact) > 0.999


def test_weights_are_fitted_behind_the_entries(model: Any) -> None:
    surroundings = behind(model, counts_for(model, 4, 3))
    deltas, prefix = fit(model, surroundings, "output")
    alone = fit(model, surroundings)[1]
    for one, other in zip(prefix.entries[0], alone.entries[0], strict=True):  # there are no weights below layer 0
        assert torch.allclose(one, other, atol=1e-5)
    assert gap_closed(model, prefix, deltas, on=FITTED) > gap_closed(model, prefix, on=FITTED)


def test_the_batch_size_does_not_matter(model: Any) -> None:
    one, other = (fit(model, behind(model, counts_for(model)), batch_size=size)[1] for size in (3, 16))
    for ours, theirs in zip(one.entries, other.entries, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            assert float((a - b).abs().max()) < 2e-2 * float(b.abs().max())


@torch.no_grad()
def test_what_heads_add_to_the_residual_stream_is_what_the_block_adds(model: Any) -> None:
    """gain * (W_O heads + bias) / rms, as the fit computes it from the names of the modules."""
    ids = torch.tensor([token_ids(9, seed=5)])
    heads: list[torch.Tensor] = []
    whole = all_entries(model, FITTED)
    with attending(model, whole.entries, after=lambda _layer, out: heads.append(out)):
        hidden, kwargs = layer_inputs(model, ids, whole.model_inputs(ids))
        for block in blocks_of(model):
            split = block.attention_half(hidden, kwargs[block.index])
            output = block.attention_output()
            branch = heads.pop().flatten(2) @ output.weight.T
            branch = branch if output.bias is None else branch + output.bias
            if output.gain is not None:
                branch = output.gain * branch / (branch.square().mean(-1, keepdim=True) + output.eps).sqrt()
            wanted = block.residual(split) - hidden
            assert float((branch - wanted).abs().max()) < 1e-4 * float(wanted.abs().max())
            hidden = block.mlp_half(split)


# -- one design ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A model with both kinds of layers, and widths that are multiples of a quantised block."""
    options = LAYERS | MIXED["gemma3_text"] | {"hidden_size": 64, "intermediate_size": 128}
    return load_model(open_source(tiny_model(tmp_path_factory.mktemp("m") / "m", "gemma3_text", **options)))


def test_layers_above_see_the_entries_as_the_file_stores_them(gemma: Any) -> None:
    """Those that are kept whole too."""

    def coarse(lines: Tensor) -> Tensor:
        return lines.mul(2).round().div(2)

    def first_coarse(lines: Tensor) -> Tensor:
        return coarse(lines) if 25 in lines.shape else lines

    for counts in ((4, 6), (25, 6)):
        prefix = fit(gemma, behind(gemma, counts, stored=coarse))[1]
        for entry in prefix.entries:
            assert all(torch.equal(part, coarse(part)) for part in entry)
        exact = fit(gemma, behind(gemma, counts))[1]
        rounded_after = replace(exact, entries=[(coarse(key), coarse(value)) for key, value in exact.entries])
        assert gap_closed(gemma, prefix) > gap_closed(gemma, rounded_after) - 0.02
    prefix = fit(gemma, behind(gemma, (25, 6), stored=first_coarse))[1]
    for seen, unseen in zip(prefix.entries[1], exact.entries[1], strict=True):
        assert float((seen - unseen).abs().max()) > 0.1


def test_entries_for_a_quantised_student_are_fitted_to_its_weights(gemma: Any) -> None:
    before = {name: weight.clone() for name, weight in gemma.named_parameters()}
    student = QuantisedStudent.of(gemma, quantised("int4-rtn"))
    surroundings = behind(gemma, (4, 6))
    own, other = fit(gemma, surroundings, student=student)[1], fit(gemma, surroundings)[1]
    first = some_entries(gemma, FITTED, 4)
    gaps = [gap_closed(gemma, prefix, student=student) for prefix in (own, other, first)]
    assert gaps[0] > gaps[1] and gaps[0] > gaps[2] + 0.05
    # All entries are exact for the teacher's weights only.
    fitted, exact = (fit(gemma, behind(gemma, (25, 25), exact=exact), student=student)[1] for exact in (False, True))
    assert gap_closed(gemma, fitted, student=student) > gap_closed(gemma, exact, student=student)
    whole = all_entries(gemma, FITTED)
    assert all(torch.equal(one[0], other[0]) for one, other in zip(exact.entries, whole.entries, strict=True))
    assert all(torch.equal(weight, before[name]) for name, weight in gemma.named_parameters())


def test_answers_count_by_their_weight(gemma: Any) -> None:
    """With a large weight the rows of answers are closer to the teacher, at the cost of those of queries."""

    def kl(prefix: TorchPrefix) -> float:
        patch = assemble({}, prefix, random_config(), "f16")
        students = TorchStudent(gemma), TorchStudent(gemma), TorchStudent(gemma, patch)
        return measure_fidelity(FITTED, *students).kl_patched

    little, much = (fit(gemma, behind(gemma, (4, 4), answer_weight=weight))[1] for weight in (0.1, 20.0))
    assert kl(much) < kl(little)


# -- rows ----------------------------------------------------------------------------------------------------


def student_batches() -> list[Any]:
    return [student for _teacher, student in batches(FITTED, 7, "cpu", 25, 2)]


def test_all_tokens_are_rows_and_answers_have_their_weight() -> None:
    parts = student_batches()
    choice = RowChoice(parts, MOST_ROWS, 5.0)
    total = sum(len(dialogue.student()) - 2 for dialogue in FITTED)
    assert len(choice.weight) == len(choice.place) == total
    assert int((choice.weight == 5).sum()) == sum(len(dialogue.completion) for dialogue in FITTED)
    assert set(choice.weight.tolist()) == {1.0, 5.0}
    check_rows(choice, parts)


@pytest.mark.parametrize("most", [1, 17, 100])
def test_no_more_rows_are_taken_than_allowed(most: int) -> None:
    parts = student_batches()
    choice = RowChoice(parts, most, 5.0)
    assert len(choice.weight) == len(choice.place) == most
    check_rows(choice, parts)
    again, other = RowChoice(parts, most, 5.0), RowChoice(parts, most, 5.0, seed=1)
    assert torch.equal(again.place, choice.place) and torch.equal(again.weight, choice.weight)
    if most == 100:
        assert not (torch.equal(other.place, choice.place) and torch.equal(other.weight, choice.weight))


def check_rows(choice: RowChoice, parts: list[Any]) -> None:
    """Check that weights and places are those of the tokens that are taken from each batch."""
    weights, places = [], []
    for number, batch in enumerate(parts):
        rows, length = batch.input_ids.shape
        answers = torch.ones(rows, length)
        answers[batch.row, batch.position] = 5
        at = torch.arange(length).expand(rows, length)
        assert choice.of(number, batch.attention_mask).all()  # no padding
        weights.append(choice.of(number, answers))
        places.append(choice.of(number, at))
        taken = choice.of(number, torch.arange(rows * length).view(rows, length))
        assert len(taken.unique()) == len(taken)
    assert torch.equal(torch.cat(weights), choice.weight) and torch.equal(torch.cat(places), choice.place)


def test_the_shares_of_all_rows_fit_a_quarter_of_a_gigabyte(gemma: Any) -> None:
    for kv_heads, context in ((1, 10), (2, 5_000), (4, 100_000)):
        rows = most_rows(gemma.config, context, kv_heads)
        assert 256 <= rows <= MOST_ROWS
        assert rows == 256 or rows * (4 // kv_heads) * context * 4 <= 2**28
