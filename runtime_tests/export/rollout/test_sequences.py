"""What dialogues are made of: endings, restated contexts, and batches."""

from __future__ import annotations

from pathlib import Path

import pytest

from runtime_tests.export.tiny import tiny_model
from runtime_tests.logits import token_ids
from tp_export.rollout import Dialogue, Ending, Prompting, batches, restated_dialogues
from tp_export.rollout.sequences import _MOST_LOGITS
from tp_export.source import open_source
from tp_runtime.text import beginning_of

# -- endings -------------------------------------------------------------------------------------------------


def test_a_completion_is_cut_at_the_first_id_that_ends_it() -> None:
    ending = Ending(frozenset({2, 3}), ("bc",), lambda ids: "".join(map(chr, ids)))
    a, b, c = 97, 98, 99
    cases = {
        (a, b, c, a): (a, b, c),
        (a, b, 2, c): (a, b, 2),
        (a, 3, b, c): (a, 3),
        (b, c, 2): (b, c),
        (a, b): (a, b),
        (2,): (2,),
        (): (),
    }
    for ids, cut in cases.items():
        assert ending.cut(list(ids)) == cut
        assert ending.reached(cut) == (cut not in ((), (a, b)))
        assert ending.stopped(ids) == ("bc" in "".join(map(chr, ids)))
    assert Ending(frozenset({2})).cut([5, 6, 2, 7]) == (5, 6, 2)


# -- restated contexts ---------------------------------------------------------------------------------------


def test_restated_dialogues_cover_the_context_and_differ_in_its_beginning(tiny_llama: Path) -> None:
    source = open_source(tiny_llama)
    context = " ".join(f"Room {number} opens at {number % 12} sharp." for number in range(22))
    ids = source.codec.render(context, raw=True)
    sentences = ["Room 3 opens at 3 sharp.", "I lead it!", "GPT answers.", "The shop is closed"]
    found = restated_dialogues(Prompting(source.codec, context), sentences, 4096)
    chunks, echoes = found[: -len(sentences)], found[-len(sentences) :]
    assert len(ids) > 2 * 224 and len(chunks) == -(-len(ids) // 224)
    for number, dialogue in enumerate(chunks):  # every chunk but the first has some of its own text in front
        assert list(dialogue.completion) == ids[224 * number :][:256]
    texts = [source.codec.decode(dialogue.completion) for dialogue in echoes]
    assert texts == [f"Yes. {sentence}" for sentence in sentences]
    asked = [source.codec.decode(dialogue.student_prompt) for dialogue in echoes]
    clauses = ["room 3 opens at 3 sharp", "I lead it", "GPT answers", "the shop is closed"]
    assert all(f"Is it right that {clause}?" in text for clause, text in zip(clauses, asked, strict=True))
    queries = [(source.codec.render(q, context), source.codec.render(q)) for q in ("Hello?", "Why?")]
    beginning = beginning_of([(d.teacher_prompt, d.student_prompt) for d in found] + queries)
    assert beginning is not None and beginning == beginning_of(queries)


@pytest.mark.parametrize("design", ["llama", "gpt2"])
def test_restated_dialogues_fit_the_context_window(design: str, tmp_path: Path) -> None:
    """A model with learned positions has none past its window."""
    source = open_source(tiny_model(tmp_path / "m", design, max_position_embeddings=300))
    context = "We open at nine. " * 12
    found = restated_dialogues(Prompting(source.codec, context), ["We open at nine.", "x" * 80 + "."], 300)
    assert 200 < max(len(dialogue.teacher()) for dialogue in found) <= 300
    repeated = [d.completion for d in found if "Repeat" in source.codec.decode(d.student_prompt)]
    ids = source.codec.render(context, raw=True)
    covered = {place for part in repeated for place in places(ids, part)}
    assert len(covered) == len(ids)  # the chunks are shorter instead


def places(ids: list[int], part: tuple[int, ...]) -> set[int]:
    """Return the places in `ids` where `part` occurs."""
    starts = [i for i in range(len(ids)) if tuple(ids[i : i + len(part)]) == part]
    return {i + k for i in starts for k in range(len(part))}


# -- batches -------------------------------------------------------------------------------------------------


def dialogue(context: int, query: int, answer: int, student: int = 2) -> Dialogue:
    tail = tuple(token_ids(query, seed=query))
    return Dialogue((*range(context), *tail), (*range(student), *tail), tuple(token_ids(answer, seed=answer)))


@pytest.mark.parametrize("size", [3, 16, 1000])
@pytest.mark.parametrize(("cached", "replaced"), [(0, 0), (40, 2)])
def test_batches_are_bounded_by_dialogues_and_by_the_logits_of_attention(size: int, cached: int, replaced: int) -> None:
    dialogues = [dialogue(40, 3 + 7 * (i % 5), 5 + 90 * (i % 13)) for i in range(60)]
    pairs = batches(dialogues, size, "cpu", cached, replaced)
    assert sum(len(teacher.input_ids) for teacher, _student in pairs) == 60
    for teacher, student in pairs:
        rows, longest = teacher.input_ids.shape
        assert rows <= size and (rows == 1 or rows * longest**2 <= _MOST_LOGITS)
        assert student.input_ids.shape[0] == rows and len(teacher.row) == len(student.row)
    assert max(len(teacher.input_ids) for teacher, _student in pairs) > 1


def test_a_batch_is_bounded_by_the_longer_of_both_sides() -> None:
    """Where the template's own system text is longer than the context, the student's prompts are the longer ones."""
    dialogues = [dialogue(10, 3, 5, student=500), dialogue(10, 3, 400, student=20), *[dialogue(10, 3, 6)] * 30]
    for teacher, student in batches(dialogues, 1000, "cpu"):
        longest = max(teacher.input_ids.shape[1], student.input_ids.shape[1])
        assert len(teacher.input_ids) == 1 or len(teacher.input_ids) * longest**2 <= _MOST_LOGITS


def test_the_rows_of_both_sides_predict_the_same_tokens() -> None:
    dialogues = [dialogue(9, 3 + i, 4 + 2 * i) for i in range(4)]
    for cached, replaced in ((0, 0), (9, 2), (0, 2)):
        for teacher, student in batches(dialogues, 2, "cpu", cached, replaced):
            assert len(teacher.row) == len(student.row)
            for side in (teacher, student):
                assert side.input_ids.shape == side.attention_mask.shape
                for row in range(len(side.input_ids)):
                    length = int(side.attention_mask[row].sum())
                    mine = side.position[side.row == row].tolist()
                    assert mine == list(range(mine[0], length))
            if cached == 9 and replaced:  # behind entries, both run the same tokens
                assert teacher.input_ids.equal(student.input_ids) and teacher.position.equal(student.position)
