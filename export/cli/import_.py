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
    from ..formats import (
        Adapter,
        blocks_without_direction,
        imported_patch,
        is_lora_folder,
        read_control_vector,
        read_peft,
    )
    from ..progress import clock
    from ..source import load_model, open_source

    check_patch_file(args.out, given(args.adapter, args.base))
    source = open_source(args.base)
    if args.adapter.suffix == ".gguf":
        deltas = read_control_vector(args.adapter, source.config)
        gaps = blocks_without_direction(deltas, source.config)
        notes = (f"the file has no direction for block {', '.join(map(str, gaps))}",) if gaps else ()
        adapter = Adapter(deltas, "", notes)
    elif is_lora_folder(args.adapter):
        adapter = read_peft(args.adapter, site_linears(model_without_weights(source.config)))
    else:
        raise PatchFormatError(
            "the adapter is neither a LoRA folder nor a control vector",
            field="ADAPTER",
            got=str(args.adapter),
            wanted="a folder with adapter_config.json and adapter_model.safetensors, or a .gguf file",
            fix="pickled adapters (.bin, .pt) are never opened: save them as safetensors",
        )
    if adapter.base and Path(adapter.base).name.lower() != Path(source.name).name.lower():
        note = f"the adapter states the base {adapter.base!r}; the patch is made for {source.name!r}"
        print(f"note: {note}", file=sys.stderr)
    for note in adapter.notes:
        print(f"note: {note}", file=sys.stderr)
    with clock("load weights"):
        model = load_model(source)
    with clock("measure the probe"):
        patch = imported_patch(source, model, adapter.deltas, args.name or args.adapter.stem)
    patch.save(args.out, dtype="f32")
    print(args.out)
    return 0
