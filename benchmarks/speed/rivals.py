"""Lists the runtimes that are compared and the files they run on, and finds why one is left out."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import util
from pathlib import Path

WEIGHTS = ("*.onnx", "*.onnx_data", "*.onnx.data", "*.safetensors", "*.gguf")


@dataclass(frozen=True)
class Rival:
    """A runtime on a graph.

    Attributes:
        key: the name in the JSON file.
        label: the name in tables and plots.
        module: the worker's module in this package.
        package: the package that must be importable.
        files: the folder or file inside the model's folder (see prepare.py).
        bits: the precision of the weights. Runtimes of the same precision are compared with each other.
    """

    key: str
    label: str
    module: str
    package: str
    files: str
    bits: str

    @property
    def takes_patches(self) -> bool:
        """Whether it is also measured with patches: its runtime supports them, and its graph has the default slots."""
        return self.module in ("ours", "ours_cuda", "ours_captured") and not self.key.startswith("slots-")

    def missing(self, models: Path) -> str | None:
        """Return the reason why it cannot be measured, or None."""
        if util.find_spec(self.package) is None:
            return f"{self.package} is not installed: pip install 'tp-runtime[bench]'"
        if not (models / self.files).exists():
            return f"there is no {self.files}"
        if self.module == "ours_window" and '"windowed"' not in (models / self.files / "patch_slots.json").read_text():
            return "the model has no layers with a sliding window"
        return None

    def named(self, models: Path) -> str:
        """Return the label. The published GGUF file contains the name of its own format."""
        if self.key != "llama-published":
            return self.label
        from gguf import GGUFReader, LlamaFileType

        field = GGUFReader(models / self.files).fields["general.file_type"]
        return f"llama.cpp {LlamaFileType(int(field.contents())).name.removeprefix('MOSTLY_')}"

    def disk_bytes(self, models: Path) -> int:
        """Return the bytes of graph and weights, without tokenizer and configuration."""
        path = models / self.files
        if path.is_file():
            return path.stat().st_size
        return sum({file.resolve(): file.stat().st_size for kind in WEIGHTS for file in path.glob(kind)}.values())


def found_on(models: Path, rivals: tuple[Rival, ...]) -> tuple[list[Rival], dict[str, str]]:
    """Return the runtimes that can be measured, and for each other one's key the reason why it is left out."""
    left_out = {rival.key: reason for rival in rivals if (reason := rival.missing(models))}
    return [rival for rival in rivals if rival.key not in left_out], left_out


def _at(bits: str) -> tuple[Rival, ...]:
    """Return tp-runtime, genai on tp-runtime's graph, and genai on its own graph, at the same bits."""
    ours = f"ours-{bits}"
    return (
        Rival(ours, f"tp-runtime {bits}", "ours", "tp_runtime", ours, bits),
        Rival(f"genai-on-{ours}", f"genai, our graph {bits}", "genai", "onnxruntime_genai", ours, bits),
        Rival(f"genai-{bits}", f"genai, its graph {bits}", "genai", "onnxruntime_genai", f"genai-{bits}", bits),
    )


def _slots(bits: str) -> tuple[Rival, ...]:
    """Return tp-runtime with other slots than the default ones, all of them empty."""
    sets = (("none", "no slots"), ("mlp", "slots of the MLP"), ("all", "all slots"))
    keys = ((f"slots-{slots}-{bits}", f"tp-runtime {bits}, {text}") for slots, text in sets)
    return tuple(Rival(key, label, "ours", "tp_runtime", key, bits) for key, label in keys)


def _llama(name: str, label: str, bits: str) -> Rival:
    return Rival(f"llama-{name}", f"llama.cpp {label}", "llama_cpp", "llama_cpp", f"{name}.gguf", bits)


RIVALS = (
    Rival("transformers", "transformers eager fp32", "transformers_eager", "transformers", "source", "fp32"),
    Rival("optimum", "optimum fp32", "optimum_ort", "optimum.onnxruntime", "optimum", "fp32"),
    *_at("fp32"),
    *_slots("fp32"),
    Rival("prepared-fp32", "tp-runtime fp32, prepared", "ours", "tp_runtime", "prepared-fp32", "fp32"),
    *_at("int8"),
    _llama("q8_0", "Q8_0", "int8"),
    *_at("int4"),
    *_slots("int4"),
    Rival("prepared-int4", "tp-runtime int4, prepared", "ours", "tp_runtime", "prepared-int4", "int4"),
    Rival("ours-int4-head4", "tp-runtime int4, 4-bit head", "ours", "tp_runtime", "ours-int4-head4", "int4"),
    Rival(
        *("ours-int4-head4-window", "tp-runtime int4, 4-bit head, window caches", "ours_window", "tp_runtime"),
        *("ours-int4-head4", "int4"),
    ),
    _llama("published", "as published", "int4"),
    _llama("q4_0", "Q4_0", "int4"),
)

# The runtimes that also read the contexts of --long, for which several of the others take minutes.
LONG_RIVALS = ("ours-int4-head4-window", "genai-int4")

# What `python -m benchmarks.speed.cuda` compares on a GPU. `graphs` stands for captured decode steps.
_CUDA_BITS = {"fp16": "fp16", "int4-fp16": "int4"}
CUDA_RIVALS = (
    Rival("transformers", "transformers eager, 16 bits", "transformers_cuda", "transformers", "source", "fp16"),
    *(
        rival
        for bits, genai in _CUDA_BITS.items()
        for rival in (
            Rival(f"ours-{bits}", f"tp-runtime {bits}", "ours_cuda", "tp_runtime", f"ours-{bits}", bits),
            Rival(
                f"ours-{bits}-graphs", f"tp-runtime {bits}, graphs", "ours_captured", "tp_runtime", f"ours-{bits}", bits
            ),
            Rival(f"genai-{bits}", f"genai {genai}", "genai", "onnxruntime_genai", f"genai-cuda-{genai}", bits),
            Rival(
                *(f"genai-{bits}-graphs", f"genai {genai}, graphs", "genai_captured", "onnxruntime_genai"),
                *(f"genai-cuda-{genai}", bits),
            ),
        )
    ),
)
