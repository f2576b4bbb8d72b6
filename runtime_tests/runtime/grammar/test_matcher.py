"""The state of a constraint: it follows a completion forwards and backwards, and its answers agree with each other."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from tokenizers import Tokenizer

from benchmarks.random_schemas import random_schema
from runtime_tests.runtime.grammar.walks import Walker, all_follow, bit
from tp_runtime.errors import RequestError
from tp_runtime.generation import Constraint
from tp_runtime.grammar import GrammarConstraint, Grammars


def ids_of(tokenizer: Tokenizer, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False).ids)


def as_protocol(constraint: Constraint) -> Constraint:
    """Checks, for mypy as well, that the object satisfies the protocol of the sampler."""
    return constraint


@pytest.fixture
def constraint(grammars: Grammars) -> GrammarConstraint:
    schema = {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]}
    return grammars.compile(json_schema=schema | {"additionalProperties": False}).constraint()


def test_the_mask_and_the_single_questions_agree_unless_the_text_is_forced(
    constraint: GrammarConstraint, tokenizer: Tokenizer, width: int
) -> None:
    ids = ids_of(tokenizer, '{"name": "a"}')
    for length in range(len(ids) + 1):
        as_protocol(constraint).follow(ids[:length])
        bits = constraint.allowed()
        assert bits.dtype == np.uint32 and bits.shape == (-(-width // 32),)
        masked = {token for token in range(width) if bit(bits, token)}
        accepted = {token for token in range(width) if constraint.allows(token)}
        assert masked == accepted or (constraint.forced() and masked < accepted)


def test_ids_that_only_the_logits_have_are_never_allowed(
    constraint: GrammarConstraint, tokenizer: Tokenizer, width: int
) -> None:
    for token in (-1, tokenizer.get_vocab_size(), width - 1, width, 2**31):
        assert not constraint.allows(token)
    bits = np.unpackbits(constraint.allowed().view(np.uint8), bitorder="little")
    assert not bits[tokenizer.get_vocab_size() :].any()


def test_ids_that_only_the_tokenizer_has_are_never_allowed(tokenizer: Tokenizer, eos_ids: tuple[int, ...]) -> None:
    width = tokenizer.get_vocab_size() - 20  # not a multiple of 32, and above it are words such as "}"
    constraint = Grammars(tokenizer, eos_ids, width).compile(regex="(?:.|\n)*").constraint()
    bits = constraint.allowed()
    assert bits.shape == (-(-width // 32),)
    assert not np.unpackbits(bits.view(np.uint8), bitorder="little")[width:].any()
    assert not constraint.allows(width)
    forced = Grammars(tokenizer, eos_ids, 2).compile(regex="abc").constraint()
    assert forced.forced() == []


def test_where_nothing_else_may_come_every_id_that_ends_may(
    constraint: GrammarConstraint, tokenizer: Tokenizer, eos_ids: tuple[int, ...]
) -> None:
    ids = ids_of(tokenizer, '{"name": ""}')
    constraint.follow(ids)
    assert constraint.forced() == [min(eos_ids)]
    allowed = np.flatnonzero(np.unpackbits(constraint.allowed().view(np.uint8), bitorder="little"))
    assert set(allowed) == set(eos_ids)
    for eos in eos_ids:
        assert constraint.allows(eos)
        constraint.follow([*ids, eos])
        assert not constraint.allows(eos) and constraint.forced() == []
        constraint.follow(ids)


def test_a_text_may_end_where_it_could_also_go_on(
    grammars: Grammars, tokenizer: Tokenizer, eos_ids: tuple[int, ...]
) -> None:
    constraint = grammars.compile(regex="[0-9]+").constraint()
    assert not any(constraint.allows(eos) for eos in eos_ids)
    ids = ids_of(tokenizer, "12")
    constraint.follow(ids)
    assert all(constraint.allows(eos) and bit(constraint.allowed(), eos) for eos in eos_ids)
    constraint.follow([*ids, eos_ids[1]])
    assert constraint.forced() == [min(eos_ids)] or constraint.forced() == []
    constraint.follow([*ids, *ids])
    assert constraint.allows(ids[0])


def test_the_state_depends_on_the_completion_alone(
    grammars: Grammars, tokenizer: Tokenizer, eos_ids: tuple[int, ...], width: int
) -> None:
    """Whatever it followed before, a constraint answers as a new one that followed the same ids."""
    walker = Walker(tokenizer, width, eos_ids, seed=3)
    grammar = grammars.compile(json_schema=random_schema("objects", 7))
    ids, _ = walker.walk(grammar.constraint())
    used = grammar.constraint()
    for length in walker.random.integers(len(ids) + 1, size=40):
        used.follow(ids[:length])
        new = grammar.constraint()
        new.follow(ids[:length])
        assert np.array_equal(used.allowed(), new.allowed())
        assert used.forced() == new.forced()


def test_a_completion_that_is_not_allowed_is_refused_and_the_state_stays_usable(
    constraint: GrammarConstraint, tokenizer: Tokenizer, width: int
) -> None:
    good, bad = ids_of(tokenizer, '{"'), ids_of(tokenizer, "x")
    with pytest.raises(RequestError, match="does not allow an id"):
        constraint.follow([*good, *bad])
    with pytest.raises(RequestError, match="does not allow an id"):
        constraint.follow([*good, width])
    constraint.follow(good)
    assert all_follow(constraint, good, constraint.forced())


def test_forced_ids_spell_what_leaves_no_choice(constraint: GrammarConstraint, tokenizer: Tokenizer) -> None:
    forced = constraint.forced()
    assert tokenizer.decode(forced).startswith('{"name":')
    assert all_follow(constraint, [], forced)


def test_a_long_run_is_forced_in_pieces(grammars: Grammars, tokenizer: Tokenizer) -> None:
    constraint = grammars.compile(json_schema={"type": "array", "items": {"const": 1}, "minItems": 2000}).constraint()
    ids: list[int] = []
    while len(ids) < 600:
        forced = constraint.forced()
        assert 0 < len(forced) <= 256
        ids += forced
        constraint.follow(ids)
    assert tokenizer.decode(ids).startswith("[1, 1, 1")


def test_a_run_without_an_end_fails_the_request(grammars: Grammars) -> None:
    constraint = grammars.compile(grammar='start: "x" a\na: "b" a').constraint()
    ids: list[int] = []
    with pytest.raises(RequestError, match="too complex"):
        while len(ids) < 2_000:
            ids += constraint.forced()
            constraint.follow(ids)


def test_completions_of_one_grammar_do_not_disturb_each_other(
    grammars: Grammars, tokenizer: Tokenizer, eos_ids: tuple[int, ...], width: int
) -> None:
    """Threads that compile the same and other schemas and walk get what one thread alone gets."""
    schemas = [random_schema("bounds", seed) for seed in range(4)]

    def walks(seed: int) -> list[list[int]]:
        shared = [grammars.compile(json_schema=schema) for schema in schemas]
        return [Walker(tokenizer, width, eos_ids, seed).walk(grammar.constraint())[0] for grammar in shared]

    alone = [walks(seed) for seed in range(4)]
    together: list[list[list[int]]] = [[]] * 4
    threads = [
        threading.Thread(target=lambda seed=seed: together.__setitem__(seed, walks(seed)))  # type: ignore[misc]
        for seed in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == alone


def test_a_constraint_is_compiled_once_and_old_ones_are_forgotten(grammars: Grammars) -> None:
    first = grammars.compile(regex="first")
    assert grammars.compile(regex="first") is first
    assert grammars.compile(json_schema={"const": 1}) is grammars.compile(json_schema='{"const": 1}')
    for number in range(40):
        grammars.compile(regex=f"other {number}")
    assert grammars.compile(regex="first") is not first


def test_a_constraint_that_no_token_can_spell_says_so() -> None:
    tokenizer = Tokenizer.from_str(
        '{"version":"1.0","truncation":null,"padding":null,"added_tokens":[],"normalizer":null,"pre_tokenizer":null,'
        '"post_processor":null,"decoder":{"type":"ByteLevel","add_prefix_space":false,"trim_offsets":true,'
        '"use_regex":false},"model":{"type":"BPE","dropout":null,"unk_token":null,"continuing_subword_prefix":null,'
        '"end_of_word_suffix":null,"fuse_unk":false,"byte_fallback":false,"vocab":{"</s>":0,"a":1},"merges":[]}}'
    )
    grammars = Grammars(tokenizer, [0], 2)
    with pytest.raises(RequestError):
        grammars.compile(regex="ab").constraint().follow([1, 1])
    constraint = grammars.compile(regex="ab|a{3}b").constraint()
    constraint.follow([1])
    constraint.follow([1, 1, 1])
    with pytest.raises(RequestError, match="no id of the vocabulary"):
        constraint.allowed()
