"""Every argument of the public methods, with values of every wrong type: an error of the project or a documented use.

A missing argument or an unknown keyword stays Python's own TypeError.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime_tests.logits import token_ids
from tp_runtime.errors import RequestError, TPError
from tp_runtime.generation import Sampling
from tp_runtime.model import PatchedModel
from tp_runtime.patch import Patch
from tp_runtime.session import Graph, SessionSettings
from tp_runtime.text import Request

IDS = token_ids(6)

# Each value is made anew, because some can be read only once. The names are the ones in ACCEPTED.
VALUES: dict[str, Callable[[], Any]] = {
    "None": lambda: None,
    "5": lambda: 5,
    "-1": lambda: -1,
    "0": lambda: 0,
    "1.5": lambda: 1.5,
    "True": lambda: True,
    "False": lambda: False,
    "nan": lambda: float("nan"),
    "numpy nan": lambda: np.float32("nan"),
    "infinity": lambda: float("inf"),
    "complex": lambda: 1j,
    "10**400": lambda: 10**400,
    "10**5000": lambda: 10**5000,
    "-10**5000": lambda: -(10**5000),
    "empty string": lambda: "",
    "string": lambda: "x",
    "long string": lambda: "x" * 5000,
    "NUL": lambda: "a\0b",
    "surrogate": lambda: "\ud800",
    "bytes": lambda: b"x",
    "path": lambda: Path("x"),
    "empty list": lambda: [],
    "list of strings": lambda: ["x"],
    "list of None": lambda: [None],
    "nested list": lambda: [[[1]]],
    "tuple": lambda: (1, 2),
    "set": lambda: {1},
    "empty dict": lambda: {},
    "dict": lambda: {"a": 1},
    "iterator": lambda: iter([1, 2]),
    "array": lambda: np.array([[1, 2], [3, 4]]),
    "object": lambda: object(),
    "type": lambda: int,
    "function": lambda: len,
}

STRENGTHS = {"5", "-1", "0", "1.5", "True"}  # True equals 1.0 for a patch that a name selects
TEXTS = {"string", "NUL"}
COUNTS = {"5", "10**400", "10**5000"}
FLAGS = {"True", "False"}
OPTIONS = {
    "system": {"None", "empty string", *TEXTS},
    "raw": FLAGS,
    "patch": {"None"},
    "strength": {"True"},
    "max_new_tokens": COUNTS,
    "stop": {"None", "empty list", "list of strings"},
    "top_k": {"0", *COUNTS},
    "top_p": set(),
    "min_p": {"0"},
    "seed": {"None", "0", *COUNTS},
    "frequency_penalty": {"-1", "0", "1.5"},
    "presence_penalty": {"-1", "0", "1.5"},
    "logit_bias": {"empty dict"},
    "min_new_tokens": {"0", *COUNTS},
    "json_schema": {"None", "empty dict"},
    "regex": {"None", "string", "long string", "NUL"},
    "grammar": {"None"},
    "tools": {"None", "empty list"},
    "tool_choice": set(),
    "documents": {"None", "empty list"},
    "template_args": {"None", "empty dict", "dict"},
    "logprobs": {"None", "0", *COUNTS},
    "logprobs_mode": set(),
    "lookup": {"0", "5"},
}


class Calls:
    """The calls of the tables, on one open model and its patch."""

    def __init__(self, model: PatchedModel, patch: Patch, folder: Path) -> None:
        self.model, self.patch, self.folder = model, patch, folder

    def table(self) -> dict[str, tuple[Callable[[Any], Any], set[str]]]:
        """Return for each argument the call with it and the names of the values that it accepts."""
        model, patch, graph, cache = self.model, self.patch, self.model.graph, self.model.new_cache
        one, run = {"max_new_tokens": 1}, graph.forward
        calls: dict[str, tuple[Callable[[Any], Any], set[str]]] = {
            "logits token_ids": (lambda v: model.logits(v), {"tuple", "iterator"}),
            "logits patch": (lambda v: model.logits(IDS, v), {"None"}),
            "logits strength": (lambda v: model.logits(IDS, "p", v), STRENGTHS),
            "new_cache patch": (lambda v: cache(v), {"None"}),
            "new_cache strength": (lambda v: cache("p", v), STRENGTHS),
            "load_patch patch": (lambda v: model.load_patch(v), set()),
            "load_patch name": (
                lambda v: model.unload_patch(model.load_patch(patch, v)),
                {"None", "empty string", "string", "long string", "NUL", "surrogate"},
            ),
            "load_patch check": (lambda v: model.unload_patch(model.load_patch(patch, "q", check=v)), {"False"}),
            "unload_patch name": (lambda v: model.unload_patch(v), set()),
            "patched patch": (lambda v: model.patched(v).__enter__(), {"None"}),
            "patched strength": (lambda v: model.patched("p", v).__enter__(), STRENGTHS),
            "check patch": (lambda v: model.check(v), set()),
            "stream prompt": (lambda v: list(model.stream(v, **one)), TEXTS),
            "stream cache": (lambda v: list(model.stream("Hi", cache=v, **one)), {"None"}),
            "generate prompt": (lambda v: model.generate(v, **one), {*TEXTS, "list of strings"}),
            "generate prompts": (lambda v: model.generate(["Hi", v], **one), TEXTS),
            "generate role": (
                lambda v: model.generate([{"role": v, "content": "Hi"}], **one),
                {"empty string", *TEXTS},
            ),
            "generate content": (lambda v: model.generate([{"role": "user", "content": v}], **one), TEXTS),
            "generate rows": (lambda v: model.generate(["Hi"], rows=v, **one), {"5"}),
            "generate rows, one prompt": (lambda v: model.generate("Hi", rows=v, **one), {"5"}),
            "batch rows": (lambda v: model.batch(v), {"5"}),
            "batch prefill_tokens": (lambda v: model.batch(2, v), COUNTS),
            "batch add": (lambda v: model.batch().add(v), TEXTS),
            "batch cache": (lambda v: model.batch().add("Hi", cache=v), set()),
            "prefill prompt": (lambda v: model.prefill(v), TEXTS),
            "prefill raw": (lambda v: model.prefill("Hi", raw=v), FLAGS),
            "chat system": (lambda v: model.chat(v), {"None", "empty string", *TEXTS}),
            "chat patch": (lambda v: model.chat(patch=v), {"None"}),
            "chat strength": (lambda v: model.chat(patch="p", strength=v), STRENGTHS),
            "chat overflow": (lambda v: model.chat(overflow=v), set()),
            "ChatSession.send message": (lambda v: model.chat(**one).send(v), TEXTS),
            "ChatSession.switch patch": (lambda v: model.chat().switch(v), {"None"}),
            "ChatSession.switch strength": (lambda v: model.chat().switch("p", v), STRENGTHS),
            "ChatSession.set_system system": (
                lambda v: model.chat().set_system(v),
                {"None", "empty string", *TEXTS},
            ),
            "load_chat path": (lambda v: model.load_chat(v), set()),
            "absorb system": (lambda v: model.absorb(v), TEXTS),
            "absorb name": (lambda v: model.absorb("x", v), {"string", "long string"}),
            "absorb patch": (lambda v: model.absorb("x", patch=v), {"None"}),
            "absorb strength": (lambda v: model.absorb("x", patch="p", strength=v), STRENGTHS),
            "absorb dtype": (lambda v: model.absorb("x", dtype=v), {"None"}),
            "save_prefix_cache path": (lambda v: model.save_prefix_cache(v), set()),
            "load_prefix_cache path": (lambda v: model.load_prefix_cache(v), set()),
            "Graph device": (lambda v: Graph(graph.folder, v), set()),
            "Graph defaults": (lambda v: Graph(graph.folder, "cpu", defaults=v), {"None"}),
            "Graph.bind patch": (lambda v: graph.bind(v), {"None"}),
            "Graph.new_cache bound": (lambda v: graph.new_cache(v), set()),
            "Graph.content cache": (lambda v: graph.content(v), set()),
            "Graph.run tokens": (lambda v: graph.run(v, graph.base), {"tuple", "iterator"}),
            "Graph.run bound": (lambda v: graph.run(IDS, v), set()),
            "Graph.forward tokens": (lambda v: run(v, cache(), graph.base), {"tuple", "iterator"}),
            "Graph.forward cache": (lambda v: run(IDS, v, graph.base), set()),
            "Graph.forward bound": (lambda v: run(IDS, cache(), v), set()),
            "Graph.forward held": (lambda v: run(IDS, cache(), graph.base, held=v), {"None"}),
            "KVCache.require_key": (lambda v: cache().require_key(v), set()),
            "KVCache.require_free": (lambda v: cache().require_free(v), {"None"}),
            "LoadedPatches.resolve patch": (lambda v: model._patches.resolve(v, 1.0), {"None"}),
            "LoadedPatches.resolve strength": (lambda v: model._patches.resolve("p", v), STRENGTHS),
            "LoadedPatches.by_name": (lambda v: model._patches.by_name(v), set()),
            "LoadedPatches.add name": (
                lambda v: (model._patches.add(v, patch, graph.base), model.unload_patch(v)),
                {"empty string", "string", "long string", "NUL", "surrogate"},
            ),
        }
        for name, accepted in OPTIONS.items():
            calls[f"stream {name}"] = (lambda v, name=name: list(model.stream("Hi", **{**one, name: v})), accepted)
            calls[f"batch add {name}"] = (lambda v, name=name: model.batch().add("Hi", **{name: v}), accepted)
        opened = {
            "path": set(),
            "device": set(),
            "patch": {"None"},
            "prefix_cache_bytes": {"0", *COUNTS},
            "verify": FLAGS,
            "threads": {"None", "5"},
            "spin": FLAGS,
            "cuda_graphs": {"False"},
            "cuda_options": {"None", "empty dict", "dict"},
            "huge_pages": FLAGS,
            "bound_patch_bytes": {"0", *COUNTS},
            "window_cache": FLAGS,
        }
        for name, accepted in opened.items():
            calls[f"from_pretrained {name}"] = (lambda v, name=name: self._open(name, v), accepted)
        return calls

    def _open(self, name: str, value: Any) -> None:
        PatchedModel.from_pretrained(**{"path": self.folder, "device": "cpu", name: value})


@pytest.fixture(scope="module")
def opened(tiny_llama_export: Path, patch: Patch) -> Iterator[Calls]:
    model = PatchedModel.from_pretrained(tiny_llama_export, "cpu", prefix_cache_bytes=10**6)
    model.load_patch(patch, "p")
    yield Calls(model, patch, tiny_llama_export)


def test_every_wrong_value_of_every_argument_is_refused_by_an_error_of_the_project(opened: Calls) -> None:
    base, wrong = opened.model.logits(IDS), []
    for argument, (call, accepted) in opened.table().items():
        for name, value in VALUES.items():
            try:
                call(value())
                refused = False
            except TPError as error:
                refused = True
                if not str(error) or not error.field:
                    wrong.append(f"{argument} = {name}: the error does not name its field")
            except Exception as error:
                wrong.append(f"{argument} = {name}: {type(error).__name__}: {error}")
                continue
            if refused == (name in accepted):
                wrong.append(f"{argument} = {name} is {'refused' if refused else 'accepted'}")
    assert not wrong, "\n".join(wrong)
    assert list(opened.model.patches) == ["p"] and np.array_equal(opened.model.logits(IDS), base)


def test_the_table_has_every_option_of_a_request_and_of_a_session(opened: Calls) -> None:
    sampling = {"temperature", "repetition_penalty"}  # test_sampling.py has their values
    named = {field.name for setting in (Request, Sampling) for field in fields(setting)}
    assert named - sampling - {"prompt", "sampling", "from_model"} == set(OPTIONS)
    assert {f"from_pretrained {field.name}" for field in fields(SessionSettings)} <= opened.table().keys()


def test_no_stop_strings_is_what_none_means(opened: Calls) -> None:
    model = opened.model
    wanted = model.generate("Hi", max_new_tokens=8)
    assert model.generate("Hi", max_new_tokens=8, stop=None) == wanted
    assert model.generate(["Hi", "Ho"], max_new_tokens=8, stop=None)[0] == wanted
    with pytest.raises(RequestError) as error:
        model.generate("Hi", stop=5)  # type: ignore[call-overload]
    assert error.value.field == "stop"


def test_stop_strings_from_an_iterator_are_not_lost(opened: Calls) -> None:
    """The request is checked before it runs, and an iterator can be read only once."""
    model = opened.model
    whole = model.generate("Hi", max_new_tokens=8)
    stop = whole[len(whole) // 2]
    assert model.generate("Hi", max_new_tokens=8, stop=iter([stop])) == whole[: whole.index(stop)]


def test_a_missing_argument_and_an_unknown_keyword_are_pythons_own_errors(opened: Calls) -> None:
    with pytest.raises(TypeError):
        opened.model.generate()  # type: ignore[call-overload]
    with pytest.raises(TypeError):
        opened.model.generate("Hi", no_such_option=1)
