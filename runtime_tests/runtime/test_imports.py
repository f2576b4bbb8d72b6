"""The edge half runs without the packages of the host half."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import tp_runtime

# Every import of a package of the host half fails as if the package were not installed.
BLOCK = """
import importlib, pkgutil, sys

class Blocked:
    names = {"torch", "transformers", "onnx", "onnxscript", "optimum", "tp_export", "tqdm", "gguf", "accelerate"}

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.names:
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Blocked())
"""
# A room that is an extra of its own is left out where the extra is not installed.
ALL_MODULES = """
from importlib.util import find_spec
import tp_runtime

def needs(name):
    return {"tp_runtime.fleet": "ray", "tp_runtime.serve": "fastapi"}.get(".".join(name.split(".")[:2]), "sys")

def refused(name):
    assert find_spec(needs(name)) is None, name

for module in pkgutil.walk_packages(tp_runtime.__path__, "tp_runtime.", onerror=refused):
    if find_spec(needs(module.name)) is not None:
        importlib.import_module(module.name)
"""
NONE_LOADED = "assert not {name.partition('.')[0] for name in sys.modules} & Blocked.names"


def run(code: str, *args: str) -> str:
    where = str(Path(tp_runtime.__file__).parents[1])
    command = [sys.executable, "-c", f"{BLOCK}sys.path.insert(0, {where!r})\n{code}", *args]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_module_imports_without_the_host_half() -> None:
    run(f"{ALL_MODULES}\n{NONE_LOADED}")


def test_text_is_generated_without_the_host_half(tiny_llama_export: Path) -> None:
    code = f"from tp_runtime.cli import main\ncode = main(sys.argv[1:])\n{NONE_LOADED}\nsys.exit(code)"
    out = run(code, "generate", str(tiny_llama_export), "hello", "--max-new-tokens", "4", "--device", "cpu")
    assert out.strip()


def test_inspect_does_not_load_onnxruntime(tiny_llama_export: Path) -> None:
    check = "assert 'onnxruntime' not in sys.modules"
    run(f"from tp_runtime.cli import main\nassert main(sys.argv[1:]) == 0\n{check}", "inspect", str(tiny_llama_export))


# What the first token of a process may import beyond numpy, onnxruntime and tokenizers: every import delays it. Modules
# of the standard library whose names begin with an underscore come with the others.
FIRST_TOKEN = """
import sys
import numpy, onnxruntime, tokenizers
before = set(sys.modules)
from tp_runtime import PatchedModel
model = PatchedModel.from_pretrained(sys.argv[1], "cpu")
next(iter(model.stream("hello", max_new_tokens=1)))
print(*(sys.modules.keys() - before))
"""
NEEDED = {"atexit", "bisect", "copy", "dataclasses", "encodings", "hashlib", "heapq", "json", "logging"}
NEEDED |= {"mmap", "numpy", "string", "threading", "tp_runtime", "traceback", "unicodedata"}
OF_TEMPLATES = {"bz2", "jinja2", "lzma", "markupsafe", "pprint", "random", "shutil", "tempfile", "zlib"}
SLOW = {
    "concurrent.futures",
    "decimal",
    "importlib.metadata",
    "tp_runtime.grammar",
    "numpy.ma",
    "numpy.random",
    "numpy.testing",
}


@pytest.mark.parametrize(
    ("model", "allowed"), [("tiny_gemma_export", NEEDED), ("tiny_llama_export", NEEDED | OF_TEMPLATES)]
)
def test_the_first_token_imports_only_what_it_needs(
    model: str, allowed: set[str], request: pytest.FixtureRequest
) -> None:
    """A completion needs no templates, so it does not import jinja2 and what jinja2 imports."""
    modules = set(run(FIRST_TOKEN, str(request.getfixturevalue(model))).split())
    assert {name.partition(".")[0] for name in modules if not name.startswith("_")} <= allowed
    assert not modules & SLOW
