"""The edge side of `make demo`: one live session without torch answers the same questions in four variants.

python demo/edge.py MODEL_DIR PATCH PROMPT_FILE
"""

from __future__ import annotations

import importlib
import statistics
import sys
import time
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

QUESTIONS = (
    "What should I have for breakfast?",
    "How do I learn to swim?",
    "Can you recommend a film for tonight?",
    "What is the moon made of?",
)
VARIANTS = ("no prompt", "prompt", "prompt, prefix cached", "patch")
# Without the penalty a model of this size soon repeats itself, in all four variants.
SAMPLING: dict[str, Any] = {"max_new_tokens": 40, "repetition_penalty": 1.15}


def importable(name: str) -> bool:
    """Try to import a package, and return whether that succeeds."""
    try:
        importlib.import_module(name)
    except ModuleNotFoundError:
        return False
    return True


def main(model_dir: str, patch_file: str, prompt_file: str) -> None:
    """Load the model once, ask the questions in every variant, and compare texts and costs."""
    prompt = Path(prompt_file).read_text(encoding="utf-8").rstrip("\r\n")
    start = time.perf_counter()
    model = PatchedModel.from_pretrained(model_dir)
    print(f"\ngraph loaded once in {time.perf_counter() - start:.1f} s on {model.graph.device.provider}")
    print(f"torch importable here: {'yes' if importable('torch') else 'no'}")
    start = time.perf_counter()
    name = model.load_patch(patch_file, check=True)
    took = (time.perf_counter() - start) * 1e3
    print(f"patch '{name}' loaded in {took:.0f} ms, and its probe is reproduced: the patch acts as on the host")
    print(f"the prompt: {prompt}\n")

    prefix = model.new_cache(patch=None)
    "".join(model.stream("Hello", system=prompt, patch=None, max_new_tokens=1, cache=prefix))
    options: dict[str, dict[str, Any]] = {
        "no prompt": {"patch": None},
        "prompt": {"patch": None, "system": prompt},
        "prompt, prefix cached": {"patch": None, "system": prompt, "cache": prefix},
        "patch": {"patch": name},
    }
    streams: dict[str, list[Any]] = {variant: [] for variant in VARIANTS}
    for question in QUESTIONS:
        print(f"Q: {question}")
        for variant in VARIANTS:
            stream = model.stream(question, **SAMPLING, **options[variant])
            text = "".join(stream)
            streams[variant].append(stream)
            if variant != "prompt, prefix cached":  # its text is word for word the same as for `prompt`
                print(f"   {variant:10} {' '.join(text.split())}")
        print()

    kv = model.graph.folder.kv
    per_token = 2 * kv.heads * kv.head_dim * 4 * model.graph.folder.layers
    shared = streams["prompt"][0].prompt_tokens - streams["no prompt"][0].prompt_tokens
    size = Path(patch_file).stat().st_size
    costs = {
        "no prompt": "-",
        "prompt": f"{shared * per_token / 1e6:.1f} MB of keys and values for each session ({shared:+d} tokens)",
        "prompt, prefix cached": f"the same, and the keys and values of {len(prefix)} tokens kept once",
        "patch": f"a file of {size / 1e6:.2f} MB, once for any number of sessions",
    }
    print(f"{'':24}{'first token':>12}{'per token':>12}   memory")
    for variant in VARIANTS:
        first = statistics.median(stream.seconds_to_first_token for stream in streams[variant])
        later = [
            (stream.seconds - stream.seconds_to_first_token) / (len(stream.token_ids) - 1)
            for stream in streams[variant]
            if len(stream.token_ids) > 1
        ]
        print(f"{variant:24}{first * 1e3:9.0f} ms{statistics.median(later) * 1e3:9.1f} ms   {costs[variant]}")
    figures = model.patches[name].config.fidelity or {}
    print(
        f"\non {figures.get('queries', 0):.0f} held-out questions the patch closes {figures.get('gap_closed', 0):.1%} "
        f"of the gap to the prompted model (KL {figures.get('kl_unpatched', 0):.3f} -> "
        f"{figures.get('kl_patched', 0):.3f} nats per token)"
    )


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    main(*sys.argv[1:])
