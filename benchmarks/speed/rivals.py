"""Which runtimes are compared, on which files, and why one is left out."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import util
from pathlib import Path

WEIGHTS = ("*.onnx", "*.onnx_data", "*.onnx.data", "*.safetensors", "*.gguf")


@dataclass(frozen=True)
class Rival:
    """A runtime on a graph.

    Attributes:
        key: names it in the JSON file.
        label: names it in tables and plots.
        module: its worker, in this package.
        package: what must be importable.
        files: its folder or file inside the model's folder (see prepare.py).
        bits: precision of the weights; equal ones are compared with each other.
    """

    key: str
    label: str
    module: str
    package: str
    files: str
    bits: str

    @property
    def takes_patches(self) -> bool:
        """Whether it is measured under patches too: its runtime knows them, and its graph has the usual slots."""
        return self.module == "ours" and not self.key.startswith("slots-")

    def missing(self, models: Path) -> str | None:
        """Why it cannot be measured, or None."""
        if util.find_spec(self.package) is None:
            return f"{self.package} is not installed: pip install 'tp-runtime[bench]'"
        if not (models / self.files).exists():
            return f"there is no {self.files}"
        return None

    def named(self, models: Path) -> str:
        """Its label; a GGUF file says itself what it is."""
        if self.key != "llama-published":
            return self.label
        from gguf import GGUFReader, LlamaFileType

        field = GGUFReader(models / self.files).fields["general.file_type"]
        return f"llama.cpp {LlamaFileType(int(field.contents())).name.removeprefix('MOSTLY_')}"

    def disk_bytes(self, models: Path) -> int:
        """Graph and weights, without tokenizer and configuration."""
        path = models / self.files
        if path.is_file():
            return path.stat().st_size
        return sum({file.resolve(): file.stat().st_size for kind in WEIGHTS for file in path.glob(kind)}.values())


def _at(bits: str) -> tuple[Rival, ...]:
    """Ours, genai on our graph, and genai on its own, at the same bits."""
    ours = f"ours-{bits}"
    return (
        Rival(ours, f"tp-runtime {bits}", "ours", "tp_runtime", ours, bits),
        Rival(f"genai-on-{ours}", f"genai, our graph {bits}", "genai", "onnxruntime_genai", ours, bits),
        Rival(f"genai-{bits}", f"genai, its graph {bits}", "genai", "onnxruntime_genai", f"genai-{bits}", bits),
    )


def _slots(bits: str) -> tuple[Rival, ...]:
    """Ours with other slots than the usual ones, all of them empty."""
    sets = (("none", "no slots"), ("mlp", "slots of the MLP"), ("all", "all slots"))
    keys = ((f"slots-{slots}-{bits}", f"tp-runtime {bits}, {said}") for slots, said in sets)
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
    Rival("ours-int4-head4", "tp-runtime int4, head too", "ours", "tp_runtime", "ours-int4-head4", "int4"),
    _llama("published", "as published", "int4"),
    _llama("q4_0", "Q4_0", "int4"),
)
