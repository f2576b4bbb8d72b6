"""The edge side of `make demo`: one live session without torch answers the same inputs in several ways.

python demo/edge.py MODEL_DIR PATCH PROMPT_FILE HELD_OUT.jsonl

HELD_OUT has lines of {"query", "answer"} that the patch was not fitted on. Five are shown, and twenty are counted.
"""

from __future__ import annotations

import importlib
import json
import re
import statistics
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


class NoTorch:
    """Blocks imports of the host side's packages, as on a machine that has only the runtime."""

    BLOCKED = frozenset({"torch", "transformers", "onnx", "onnxscript", "optimum", "tp_export"})

    def find_spec(self, name: str, *_: Any) -> None:
        """Raise for a blocked package. `import` calls this before every other finder."""
        if name.partition(".")[0] in self.BLOCKED:
            raise ModuleNotFoundError(f"{name} is blocked in this process", name=name)


sys.meta_path.insert(0, NoTorch())

from tp_runtime import PatchedModel  # noqa: E402  (after the block, because this import must work under it)

SHOWN, COUNTED = 5, 20
NO_PROMPT, PROMPT, CACHED, SHORT, PATCH = "no prompt", "prompt", "prompt, cached", "short prompt", "patch"


@dataclass
class Way:
    """One way to ask, and what came of it.

    Attributes:
        name: its name in the table.
        options: the keyword arguments of `PatchedModel.stream`.
        context: the keys and values for each head that it puts in front of every input, on average over the layers.
        memory: what it keeps in memory or on disk, for people.
        answers: the answers, in the order of the inputs.
        streams: the finished streams, for their times.
    """

    name: str
    options: dict[str, Any]
    context: int = 0
    memory: str = "-"
    answers: list[str] = field(default_factory=list)
    streams: list[Any] = field(default_factory=list)

    def ask(self, model: PatchedModel, query: str, limits: dict[str, Any]) -> str:
        """Answer one input."""
        stream = model.stream(query, **limits, **self.options)
        self.answers.append(" ".join("".join(stream).split()))
        self.streams.append(stream)
        return self.answers[-1]

    def row(self, right: int | None) -> str:
        """Return the line of the table."""
        first = statistics.median(stream.seconds_to_first_token for stream in self.streams)
        later = [
            (stream.seconds - stream.seconds_to_first_token) / (len(stream.token_ids) - 1)
            for stream in self.streams
            if len(stream.token_ids) > 1
        ]
        step = f"{statistics.median(later) * 1e3:.1f} ms" if later else "-"
        counted = "-" if right is None else f"{right} of {COUNTED}"
        return f"{self.name:28}{counted:>10}{first * 1e3:>12.0f} ms{step:>12}{self.context:>10}   {self.memory}"


def importable(name: str) -> bool:
    """Try to import a package, and return whether that succeeds."""
    try:
        importlib.import_module(name)
    except ModuleNotFoundError:
        return False
    return True


def is_right(answer: str, wanted: str, exact: bool) -> bool:
    """Return whether an answer equals the wanted text, or contains it as whole words."""
    if exact:
        return answer == " ".join(wanted.split())
    return re.search(rf"(?<!\w){re.escape(wanted)}(?!\w)", answer, re.IGNORECASE) is not None


def shorter(prompt: str, examples: int) -> str | None:
    """Return the prompt with its first paragraph and `examples` lines after it; None if that is all of it."""
    lines = prompt.splitlines()
    head = lines.index("") + 1 if "" in lines else 0
    return "\n".join(lines[: head + examples]) if head + examples < len(lines) else None


class Demo:
    """The open model and the inputs.

    Args:
        model: the model.
        patch: the name of the loaded patch.
        prompt: the prompt that the patch stands in for.
        inputs: pairs of a query and the wanted answer.
    """

    def __init__(self, model: PatchedModel, patch: str, prompt: str, inputs: list[tuple[str, str]]) -> None:
        self.model, self.patch, self.prompt, self.inputs = model, patch, prompt, inputs
        stop = list(model.patches[patch].config.stop)
        self.exact = bool(stop)
        self.limits: dict[str, Any] = {"max_new_tokens": 56, "stop": stop}
        kv = model.graph.folder.kv
        self._per_token = 2 * kv.heads * kv.head_dim * 4 * model.graph.folder.layers

    def prompted(self, name: str, prompt: str, cached: bool) -> Way:
        """Return the way of asking with a prompt; with `cached` its keys and values are computed once, here."""
        options: dict[str, Any] = {"patch": None, "system": prompt}
        if cached:
            options["cache"] = self.model.new_cache(patch=None)
            "".join(self.model.stream(self.inputs[0][0], **options, max_new_tokens=1))
        tokens = self._tokens(system=prompt) - self._tokens()
        size = f"{tokens * self._per_token / 1e6:.1f} MB of keys and values"
        return Way(name, options, tokens, f"{size}, kept once" if cached else f"{size} in every session")

    def entries(self, size: int) -> tuple[int, str]:
        """Return what the patch puts in front of an input, and what that and its file of `size` bytes take."""
        prefix = self.model.patches[self.patch].prefix
        mean = 0 if prefix is None else round(sum(prefix.counts) / len(prefix.counts))
        memory = f"{mean * self._per_token / 1e6:.1f} MB of keys and values in every session"
        return mean, f"{memory}, from a file of {size / 1e6:.2f} MB"

    def _tokens(self, **options: Any) -> int:
        stream = self.model.stream(self.inputs[0][0], patch=None, max_new_tokens=1, **options)
        "".join(stream)
        return int(stream.prompt_tokens)

    def count(self, way: Way) -> int:
        """Answer all inputs that a way has not answered yet, and return the number of right answers."""
        for query, _wanted in self.inputs[len(way.answers) :]:
            way.ask(self.model, query, self.limits)
        return sum(is_right(a, w, self.exact) for a, (_q, w) in zip(way.answers, self.inputs, strict=True))

    def show(self, ways: list[Way]) -> None:
        """Answer the first inputs in every way, side by side."""
        for query, wanted in self.inputs[:SHOWN]:
            print(f"  {query}")
            for way in ways:
                answer = way.ask(self.model, query, self.limits)
                mark = "right" if is_right(answer, wanted, self.exact) else "     "
                print(f"    {way.name:10} {mark}  {answer[:110]}")
            print()

    def short_prompt(self, right: int) -> tuple[Way, int] | None:
        """Return the shortest prompt, by doubling its examples, that gets as many answers right as the patch does."""
        examples = 1
        while (text := shorter(self.prompt, examples)) is not None:
            way = self.prompted(f"{SHORT}, {examples} lines", text, cached=True)
            print(f"  counting with the first {examples} lines of the prompt ...", file=sys.stderr)
            found = self.count(way)
            if found >= right:
                fresh = self.prompted(way.name, text, cached=False)
                for query, _wanted in self.inputs[:SHOWN]:  # its times are those of a prompt that is not cached
                    fresh.ask(self.model, query, self.limits)
                return fresh, found
            examples *= 2
        return None


def main(model_dir: str, patch_file: str, prompt_file: str, held_out: str) -> None:
    """Load the model once, ask in every way, and compare answers and costs."""
    prompt = Path(prompt_file).read_text(encoding="utf-8").rstrip("\r\n")
    lines = Path(held_out).read_text(encoding="utf-8").splitlines()[:COUNTED]
    inputs = [(item["query"], item["answer"]) for item in map(json.loads, lines)]
    start = time.perf_counter()
    model = PatchedModel.from_pretrained(model_dir)
    print(f"\ngraph loaded once in {time.perf_counter() - start:.1f} s on {model.graph.device.provider}")
    print(f"torch importable here: {'yes' if importable('torch') else 'no'}")
    start = time.perf_counter()
    name = model.load_patch(patch_file, check=True)
    took = (time.perf_counter() - start) * 1e3
    print(f"patch '{name}' loaded in {took:.0f} ms, and its probe is reproduced: the patch acts as on the host")
    demo = Demo(model, name, prompt, inputs)
    size = Path(patch_file).stat().st_size
    nothing = Way(NO_PROMPT, {"patch": None})
    whole = demo.prompted(PROMPT, prompt, cached=False)
    patch = Way(PATCH, {"patch": name}, *demo.entries(size))
    first, last = prompt.splitlines()[0], prompt.splitlines()[-1]
    print(f"the prompt, {whole.context} tokens: {first[:70]} ... {last[-70:]}\n")
    demo.show([nothing, whole, patch])

    print(f"counting {COUNTED} held-out inputs in every way ...", file=sys.stderr)
    cached = demo.prompted(CACHED, prompt, cached=True)
    rows = [(nothing, demo.count(nothing)), (whole, demo.count(cached)), (cached, demo.count(cached))]
    assert cached.answers[:SHOWN] == whole.answers, "a cached prompt changed an answer"
    patched = demo.count(patch)
    short = demo.short_prompt(patched)
    rows += [short] if short is not None else []
    rows.append((patch, patched))
    what = "exactly right" if demo.exact else "right"
    print(f"{'':28}{what:>10}{'first token':>15}{'per token':>12}{'in front':>10}   memory")
    for way, right in rows:
        print(way.row(right))
    if short is None:
        print("no part of the prompt (1, 2, 4, ... lines) gets as many answers right as the patch")
    figures = model.patches[name].config.fidelity or {}
    print(
        f"\nheld out, measured at the fit: the patch closes {figures.get('gap_closed', 0):.1%} of the gap to the "
        f"prompted model over {figures.get('completion_tokens', 0):.0f} tokens of {figures.get('queries', 0):.0f} "
        f"answers, and {figures.get('gap_closed_first', 0):.1%} at the first token"
    )


if __name__ == "__main__":
    if len(sys.argv) != 5:
        sys.exit(__doc__)
    main(*sys.argv[1:])
