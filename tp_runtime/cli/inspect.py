"""`tp-runtime inspect` describes a patch file or a model folder. It opens no session."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..errors import TPError, printable
from ..patch import Patch
from ..session import ModelFolder, Slot, check_prepared, has_prepared, kv_bytes
from .printing import plural, print_fields, size


def add_parser(subparsers: Any) -> None:
    """Add the subcommand to the parser."""
    parser = subparsers.add_parser(
        "inspect",
        help="describe a patch file or a model folder",
        description="Describe a patch file or a model folder. A patch is checked completely when it is read. In a "
        "folder, the sizes of all files and the digests of the small files are checked, and whether this machine uses "
        "its prepared graph.",
    )
    parser.add_argument("path", type=Path, metavar="FILE_OR_MODEL", help="a patch file or an exported model folder")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.add_argument(
        "--verify",
        action="store_true",
        help="also check the digests of a folder's large files (the weights), prepared ones included",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Describe the file or the folder. A damaged one raises."""
    if args.path.is_dir():
        report = describe_folder(ModelFolder.open(args.path, args.verify), args.verify)
        rows = _folder_rows
    else:
        report = describe_patch(Patch.load(args.path), args.path)
        rows = _patch_rows
    if args.json:
        print(json.dumps(report))
    else:
        print_fields(rows(report))
    return 0


def describe_patch(patch: Patch, file: Path) -> dict[str, Any]:
    """Return the description of a patch file, for JSON."""
    config = patch.config
    ranks = patch.ranks
    return {
        "kind": "patch",
        "file": str(file),
        "bytes": patch.nbytes,
        "memory_bytes": patch.memory_bytes,
        "dtype": patch.dtype,
        "name": config.name,
        "identity": patch.identity,
        "method": config.method,
        "base_model": config.base_model,
        "base_digest": config.base_digest,
        "architecture": config.architecture,
        "precision": config.precision,
        "ranks": sorted(set(ranks.values())),
        "sites": sorted({site for _, site in ranks}),
        "layers": sorted({layer for layer, _ in ranks}),
        "slots": len(ranks),
        "prefix": None
        if patch.prefix is None
        else {
            "entries": patch.prefix.longest,
            "counts": list(patch.prefix.counts),
            "replaced_ids": len(patch.prefix.replaces),
            "position": patch.prefix.position,
        },
        "capabilities": asdict(patch.capabilities),
        "stop": list(config.stop),
        "context_digest": config.context_digest or None,
        "holds_context": config.context is not None,
        "ridge": config.ridge,
        "calibration": config.calibration,
        "fidelity": config.fidelity,
        "report": config.report,
        "probe_positions": len(config.probe["token_ids"]) if config.probe else 0,
        "licence": config.licence,
        "created": config.created,
    }


def describe_folder(folder: ModelFolder, verified: bool) -> dict[str, Any]:
    """Return the description of a model folder, for JSON; `verified` states whether the large files were hashed."""
    default = folder.default_patch
    return {
        "kind": "model",
        "path": str(folder.path),
        "base_model": folder.base_model,
        "base_digest": folder.base_digest,
        "digest_change": asdict(folder.digest_change) if folder.digest_change else None,
        "graph_digest": folder.graph_digest,
        "architecture": folder.architecture,
        "precision": folder.precision,
        "style": folder.style,
        "route": folder.route,
        "layers": folder.layers,
        "vocab_size": folder.vocab_size,
        "context_window": folder.context_window,
        "kv": asdict(folder.kv),
        "windowed": asdict(folder.windowed) if folder.windowed else None,
        "kv_bytes": {str(tokens): _kv_bytes(folder, tokens) for tokens in _lengths(folder.context_window)},
        "slots": len(folder.slots),
        "sites": _sites(folder.slots.values()),
        "default_patch": asdict(default) if default else None,
        "prepared": has_prepared(folder),
        "prepared_not_used": _why_not_used(folder),
        "files": {name: asdict(record) for name, record in folder.files.items()},
        "unlisted": list(folder.unlisted),
        "verified": verified,
    }


def _lengths(window: int) -> list[int]:
    """Return the lengths of a text, up to the context window, whose keys and values are counted."""
    return sorted({min(tokens, window) for tokens in (2048, 8192, 32768)})


def _kv_bytes(folder: ModelFolder, tokens: int) -> dict[str, int]:
    """Return the bytes of the keys and values of a text, without and with window caches."""
    return {"whole": kv_bytes(folder, tokens), "window_cache": kv_bytes(folder, tokens, window_cache=True)}


def _why_not_used(folder: ModelFolder) -> str | None:
    """Return why this machine does not use the folder's prepared graph; None if it does, or if there is none."""
    if not has_prepared(folder):
        return None
    try:
        return check_prepared(folder)
    except (TPError, OSError) as error:
        return str(error)


def _sites(slots: Iterable[Slot]) -> dict[str, list[dict[str, Any]]]:
    """Return for each site the shapes of its slots with their layers, because shapes may differ from layer to layer."""
    sites: dict[str, dict[tuple[int, int], list[int]]] = {}
    for slot in slots:
        sites.setdefault(slot.site, {}).setdefault((slot.inputs, slot.outputs), []).append(slot.layer)
    return {
        site: [{"in": inputs, "out": outputs, "layers": sorted(layers)} for (inputs, outputs), layers in shapes.items()]
        for site, shapes in sites.items()
    }


# -- output for people -----------------------------------------------------------------------------------------


def _patch_rows(report: dict[str, Any]) -> list[tuple[str, str]]:
    positions = report["probe_positions"]
    return [
        ("patch", report["name"]),
        ("method", report["method"]),
        ("base model", report["base_model"]),
        ("base digest", report["base_digest"]),
        ("architecture", report["architecture"]),
        ("fitted on", report["precision"]),
        ("rank", _spans(report["ranks"]) or "no weights"),
        ("sites", ", ".join(report["sites"]) or "none"),
        ("layers", f"{_spans(report['layers']) or 'none'} ({plural(report['slots'], 'slot')})"),
        ("KV prefix", _prefix(report["prefix"])),
        ("file", f"{size(report['bytes'])}, {report['dtype']}"),
        ("memory", f"{size(report['memory_bytes'])} while it is loaded"),
        ("identity", report["identity"]),
        ("form", report["capabilities"]["form"]),
        ("strength", report["capabilities"]["strength"]),
        ("sums", report["capabilities"]["sums"]),
        ("system", report["capabilities"]["system"]),
        ("exports", report["capabilities"]["exports"]),
        ("precisions", report["capabilities"]["precision"]),
        ("stop", ", ".join(map(ascii, report["stop"])) or "none: only requests name stop strings"),
        ("ridge", _or_unknown(report["ridge"])),
        ("calibration", _pairs(report["calibration"])),
        ("held out", _pairs(report["fidelity"])),
        ("report", _pairs(report["report"], "none: tp-export report --store makes one")),
        ("context", _context(report)),
        ("probe", plural(positions, "position") if positions else "none: `check` has nothing to compare"),
        ("licence", _or_unknown(report["licence"])),
        ("created", _or_unknown(report["created"])),
    ]


def _folder_rows(report: dict[str, Any]) -> list[tuple[str, str]]:
    kv, default = report["kv"], report["default_patch"]
    checked = (
        "all digests match"
        if report["verified"]
        else "sizes match; --verify also checks the digests of the large files"
    )
    width = max(map(len, report["files"]))
    files = [f"{name:<{width}}  {size(record['bytes'])}" for name, record in report["files"].items()]
    rows = [
        ("model", report["base_model"]),
        ("base digest", _digest(report["base_digest"], report["digest_change"])),
        ("architecture", report["architecture"]),
        ("precision", report["precision"]),
        ("style", report["style"]),
        ("route", report["route"]),
        ("layers", str(report["layers"])),
        ("vocabulary", str(report["vocab_size"])),
        ("context window", plural(report["context_window"], "token")),
        ("KV cache", f"{kv['heads']} heads of {kv['head_dim']}, {kv['dtype']}{_windowed(report['windowed'])}"),
        ("KV bytes", "\n".join(map(_kv_line, report["kv_bytes"].items()))),
        ("slots", "\n".join([str(report["slots"]), *_site_lines(report["sites"])])),
        ("default patch", "none" if default is None else _default(default)),
        ("files", "\n".join([*files, checked])),
        ("prepared", _prepared(report)),
    ]
    if report["unlisted"]:
        names = ", ".join(ascii(name) for name in report["unlisted"])
        rows.append(("unlisted", f"{names}: nothing reads them"))
    return rows


def _windowed(windowed: dict[str, Any] | None) -> str:
    return "" if windowed is None else f"; a window of {windowed['window']} in layers {_spans(windowed['layers'])}"


def _kv_line(entry: tuple[str, dict[str, int]]) -> str:
    tokens, found = entry
    line = f"{size(found['whole'])} for a text of {plural(int(tokens), 'token')}"
    bounded = found["window_cache"]
    return line if bounded == found["whole"] else f"{line}, {size(bounded)} with --window-cache"


def _prepared(report: dict[str, Any]) -> str:
    if not report["prepared"]:
        return "no; tp-runtime prepare packs the weights for this machine"
    reason = report["prepared_not_used"]
    return "yes" if reason is None else f"there, but not used: {printable(reason)}"


def _digest(digest: str, change: dict[str, str] | None) -> str:
    if change is None:
        return digest
    return f"{digest}\nbefore this version: {change['before']}, because {change['reason']}"


def _site_lines(sites: dict[str, list[dict[str, Any]]]) -> list[str]:
    return [
        f"{site} [{shape['in']} -> {shape['out']}] in layers {_spans(shape['layers'])}"
        for site, shapes in sites.items()
        for shape in shapes
    ]


def _default(default: dict[str, Any]) -> str:
    terms = [f"{strength:g} * {identity}" for identity, strength in default["terms"]]
    repair = ["compensates what quantisation costs, and is part of the base"] if default["repair"] else []
    return "\n".join([default["name"], *terms, *repair])


def _context(report: dict[str, Any]) -> str:
    digest = report["context_digest"]
    held = "the text is in the file" if report["holds_context"] else "the text is not in the file"
    return f"{held}; SHA-256 {digest}" if digest else f"{held}; no digest"


def _prefix(prefix: dict[str, Any] | None) -> str:
    if prefix is None:
        return "none"
    layers: dict[int, list[int]] = {}
    for layer, count in enumerate(prefix["counts"]):
        layers.setdefault(count, []).append(layer)
    counts = [
        (f"{count} entries" if count != 1 else "1 entry") + (f" in layers {_spans(where)}" if len(layers) > 1 else "")
        for count, where in layers.items()
    ]
    return (
        f"{' and '.join(counts)} for each head, in place of the prompt's first "
        f"{plural(prefix['replaced_ids'], 'id')}; the text continues at position {prefix['position']}"
    )


def _spans(numbers: Sequence[int]) -> str:
    """Return sorted whole numbers in a short form, such as "0-3, 7"."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number == spans[-1][-1] + 1:
            spans[-1][1:] = [number]
        else:
            spans.append([number])
    return ", ".join("-".join(map(str, span)) for span in spans)


def _pairs(values: dict[str, Any] | None, nothing: str = "unknown") -> str:
    if not values:
        return nothing
    return ", ".join(f"{printable(key)} {_number(value)}" for key, value in values.items())


def _number(value: Any) -> str:
    if isinstance(value, list):
        return f"({len(value)})"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _or_unknown(value: Any) -> str:
    return "unknown" if value is None else printable(_number(value))
