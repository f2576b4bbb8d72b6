"""`tp-runtime serve` answers OpenAI's API and shows a page."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from ..errors import RequestError, shown
from ..model import PatchedModel
from ..patch import Patch
from ..session import BOUND_PATCH_BYTES
from .options import add_model_options, read_text, session_options, split_spec
from .printing import note

_KEY_VARIABLE = "TP_API_KEY"
_MB = 2**20


def add_parser(subparsers: Any) -> None:
    """Add the subcommand to the parser."""
    parser = subparsers.add_parser(
        "serve",
        help="answer OpenAI's API over HTTP, under any of the loaded patches",
        description="Serve a model over HTTP: OpenAI's routes under /v1, where a patch is a model's name, a page at /, "
        "and /health, /ready, /metrics and /docs. Needs the extra serve. SIGTERM lets running requests end.",
    )
    add_model_options(parser, capturable=False)
    parser.add_argument(
        "--patch",
        action="append",
        default=[],
        metavar="NAME=FILE[@STRENGTH]",
        help="load a patch under a name that requests can give as their model; may be repeated",
    )
    parser.add_argument("--patch-dir", type=Path, metavar="DIR", help="load the patch files of DIR, and watch it")
    parser.add_argument(
        "--manage-patches", action="store_true", help="let requests load and unload the patch files of --patch-dir"
    )
    parser.add_argument("--name", metavar="NAME", help="the model's own name in requests (default: its base model's)")
    network = parser.add_argument_group("network")
    network.add_argument("--host", default="127.0.0.1", help="the address to listen on (default %(default)s)")
    network.add_argument("--port", type=int, default=8000, help="the port; 0 takes a free one (default %(default)s)")
    network.add_argument(
        "--api-key-file",
        type=Path,
        metavar="FILE",
        help=f"a file with a key on each line, of which requests must send one (default: the variable {_KEY_VARIABLE})",
    )
    network.add_argument(
        "--cors-origin", action="append", default=[], metavar="URL", help="let pages of this origin call the server"
    )
    network.add_argument(
        "--host-name",
        action="append",
        default=[],
        metavar="NAME",
        help="a further name that clients call the server by",
    )
    limits = parser.add_argument_group("limits")
    limits.add_argument("--rows", type=int, default=8, metavar="N", help="requests that run together (default 8)")
    limits.add_argument("--queue", type=int, default=64, metavar="N", help="requests that may wait (default 64)")
    limits.add_argument(
        "--timeout", type=float, default=300.0, metavar="S", help="seconds that a request may take (default 300)"
    )
    limits.add_argument(
        "--drain", type=float, default=30.0, metavar="S", help="seconds to end requests after SIGTERM (default 30)"
    )
    limits.add_argument(
        "--stall",
        type=float,
        default=30.0,
        metavar="S",
        help="seconds after which a client that does not send or take anything is given up (default 30)",
    )
    limits.add_argument(
        "--max-tokens", type=int, default=1024, metavar="N", help="new tokens of a request (default 1024)"
    )
    limits.add_argument(
        "--max-body", type=int, default=4 * _MB, metavar="BYTES", help="size of a request's body (default 4 MiB)"
    )
    limits.add_argument(
        "--prefix-cache",
        type=int,
        default=256,
        metavar="MIB",
        help="memory for keys and values of earlier prompts; 0 switches it off (default 256)",
    )
    limits.add_argument(
        "--converted-patches",
        type=int,
        default=BOUND_PATCH_BYTES // _MB,
        metavar="MIB",
        help="memory for the patches that ran last, converted for the model (default %(default)s)",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Serve until SIGTERM or Ctrl-C."""
    try:
        from ..serve import ServerSettings, create_app, log_as_json, new_server
    except ImportError as error:
        raise RequestError(
            "the server needs packages that are not installed",
            field="serve",
            got=str(error),
            fix='run: pip install "tp-runtime[serve]"',
        ) from error
    settings = ServerSettings(
        host=args.host,
        port=args.port,
        api_keys=_api_keys(args.api_key_file),
        patch_dir=_folder(args.patch_dir),
        manage_patches=args.manage_patches,
        origins=args.cors_origin,
        host_names=args.host_name,
        rows=args.rows,
        queue=args.queue,
        timeout=args.timeout,
        drain=args.drain,
        stall=args.stall,
        body_bytes=args.max_body,
        max_tokens=args.max_tokens,
    )
    named = [_named(spec) for spec in args.patch]
    for option, given in (("--prefix-cache", args.prefix_cache), ("--converted-patches", args.converted_patches)):
        if given < 0:
            raise RequestError("the size is negative", field=option, got=given, wanted="0 or more")
    model = PatchedModel.from_pretrained(
        args.model,
        args.device,
        prefix_cache_bytes=args.prefix_cache * _MB,
        **session_options(args) | {"bound_patch_bytes": args.converted_patches * _MB},
    )
    for name, patch in named:
        model.load_patch(patch, name)
    log_as_json(sys.stderr)
    app = create_app(model, settings, args.name)

    def started(host: str, port: int) -> None:
        shown_host = f"[{host}]" if ":" in host else host
        note(f"serving {args.model} on http://{shown_host}:{port} (Ctrl-C ends it)")

    server = new_server(app, settings, started)
    server.run()
    return 0 if server.started else 1


def _named(spec: str) -> tuple[str, Patch]:
    name, equals, file = spec.partition("=")
    if not equals or not name:
        raise RequestError("the patch has no name", field="--patch", got=shown(spec), wanted="NAME=FILE[@STRENGTH]")
    path, strength = split_spec(file)
    patch = Patch.load(path)
    return name, patch if strength == 1.0 else strength * patch


def _folder(path: Path | None) -> Path | None:
    if path is not None and not path.is_dir():
        raise RequestError("the path is not a folder", field="--patch-dir", got=str(path), wanted="a folder")
    return path


def _api_keys(path: Path | None) -> tuple[str, ...]:
    if path is None:
        key = os.environ.get(_KEY_VARIABLE)
        return () if key is None else (key,)
    lines = read_text(path, "--api-key-file", _MB).splitlines()
    keys = tuple(line.strip() for line in lines if line.strip())
    if not keys:
        raise RequestError("the file holds no key", field="--api-key-file", got=str(path), wanted="a line for each key")
    return keys
