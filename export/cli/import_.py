"""`tp-export import`: make a patch from another tool's adapter."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from tp_runtime.errors import PatchFormatError

from .options import check_patch_file, given


def add_parser(subparsers: Any) -> None:
    """Add the subcommand to the parser."""
    parser = subparsers.add_parser(
        "import",
        help="make a patch from a LoRA folder or a GGUF control vector",
        description="Make a patch from an adapter that another tool made: a LoRA folder as peft saves it (for a model "
        "exported with --slots all), or a control vector in the GGUF format. The command prints the path of the file.",
    )
    parser.add_argument("adapter", metavar="ADAPTER", type=Path, help="a LoRA folder, or a .gguf control vector")
    parser.add_argument("out", metavar="OUT.safetensors", type=Path, help="the patch file to write")
    parser.add_argument(
        "--base", required=True, metavar="SRC", help="the adapter's base model: a Hugging Face folder or a hub id"
    )
    parser.add_argument("--name", help="the name of the patch (default: the adapter's name)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Read the adapter, measure the probe, write the patch and print its path."""
    from ..decoder import model_without_weights, site_linears
    from ..formats import imported_patch, is_lora_folder, read_control_vector, read_peft
    from ..progress import clock
    from ..source import load_model, open_source

    check_patch_file(args.out, given(args.adapter, args.base))
    source = open_source(args.base)
    if args.adapter.suffix == ".gguf":
        deltas, base = read_control_vector(args.adapter, source.config), ""
    elif is_lora_folder(args.adapter):
        deltas, base = read_peft(args.adapter, site_linears(model_without_weights(source.config)))
    else:
        raise PatchFormatError(
            "the adapter is neither a LoRA folder nor a control vector",
            field="ADAPTER",
            got=str(args.adapter),
            wanted="a folder with adapter_config.json and adapter_model.safetensors, or a .gguf file",
            fix="pickled adapters (.bin, .pt) are never opened: save them as safetensors",
        )
    if base and Path(base).name.lower() != Path(source.name).name.lower():
        print(f"note: the adapter states the base {base!r}; the patch is made for {source.name!r}", file=sys.stderr)
    with clock("load weights"):
        model = load_model(source)
    with clock("measure the probe"):
        patch = imported_patch(source, model, deltas, args.name or args.adapter.stem)
    patch.save(args.out, dtype="f32")
    print(args.out)
    return 0
