"""The description of an exported folder, `patch_slots.json`: what it can say, and how it is read.

Every value is checked here, so that the rest of the runtime can rely on it. This module opens no file.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import ModelFormatError, shown
from ..patch import SITES, SlotKey
from ..storage import REEXPORT, SHA256, StrictJSONError, check_name, parse_json_object
from .layer_kinds import Windowed

SLOTS_FILE = "patch_slots.json"
GRAPH_FILE = "model.onnx"
LARGEST_DESCRIPTION = 16 * 2**20  # in bytes
FORMAT = "tp-slots"
VERSION = 1
_INT4 = (
    *("int4-symmetric", "int4-rtn", "int4-k-quant", "int4-hqq", "int4-gptq-symmetric", "int4-gptq"),
    *("int4-symmetric-head4", "int4-rtn-head4", "int4-gptq-symmetric-head4", "int4-gptq-head4"),
)
PRECISIONS = ("fp32", "fp16", "bf16", "int8", *_INT4, *(f"{name}-fp16" for name in _INT4))
_KEYS = {
    *("architecture", "base_model", "base_digest", "precision", "style", "route", "layers", "vocab_size"),
    *("context_window", "kv", "slots", "default_patch", "files"),
}
_OPTIONAL = {"digest_change", "windowed", "best", "weights_digest"}


def past_name(layer: int | str, part: str) -> str:
    """Return the name of the graph input for a layer's cached keys or values (`part` is `key` or `value`)."""
    return f"past_key_values.{layer}.{part}"


def present_name(layer: int | str, part: str) -> str:
    """Return the name of the graph output for the same tensor with the new tokens' entries appended."""
    return f"present.{layer}.{part}"


@dataclass(frozen=True)
class Slot:
    """A place in the graph where a delta is added.

    Attributes:
        layer: the number of the layer.
        site: the kind of place in the layer, such as "mlp_out".
        inputs: the number of inputs of the delta.
        outputs: the number of outputs of the delta.
        scale: what b and bias are multiplied by where a delta is bound; below 1 if the graph computes the values to
            which the delta is added scaled down, so that they fit float16. It is a power of two, so nothing is rounded
            but numbers near the smallest ones of float16.
    """

    layer: int
    site: str
    inputs: int
    outputs: int
    scale: float = 1.0

    @property
    def name(self) -> str:
        """The prefix of the slot's tensors in the graph."""
        return f"tp.{self.layer}.{self.site}"

    @property
    def tensors(self) -> tuple[str, str, str]:
        """The names of the slot's graph inputs: a [rows, in, rank], b [rows, rank, out] and bias [rows, 1, out]."""
        return f"{self.name}.a", f"{self.name}.b", f"{self.name}.bias"


@dataclass(frozen=True)
class KV:
    """The shape and dtype of one layer's keys and values.

    Attributes:
        heads: the number of key/value heads.
        head_dim: the size of a head.
        dtype: "f32" or "f16", the dtype of keys, values and slots.
    """

    heads: int
    head_dim: int
    dtype: str

    @property
    def numpy_dtype(self) -> np.dtype[Any]:
        """The numpy dtype of keys, values and slots."""
        return np.dtype({"f32": np.float32, "f16": np.float16}[self.dtype])


@dataclass(frozen=True)
class DefaultPatch:
    """The patch that was exported as the default values of the slots.

    Attributes:
        name: the name of the patch.
        identity: the identity of the patch; see `Patch.identity`.
        terms: the (identity, strength) pairs of the patches that it was made of.
        repair: whether the patch compensates what the folder's quantisation costs, so that it is part of the base.
    """

    name: str
    identity: str
    terms: tuple[tuple[str, float], ...]
    repair: bool = False


@dataclass(frozen=True)
class DigestChange:
    """A base digest that differs from the one that earlier versions of tp-export gave the same base.

    Attributes:
        before: the earlier digest, 64 hex digits, which patches of that time have.
        reason: a clause with the earlier digest as its subject `it`, such as "it covered files that are not loaded".
    """

    before: str
    reason: str


@dataclass(frozen=True)
class FileRecord:
    """The properties that a listed file must have.

    Attributes:
        sha256: the digest of the file, in lower-case hex.
        bytes: the size of the file.
    """

    sha256: str
    bytes: int


def parse_description(raw: bytes) -> dict[str, Any]:
    """Parse a `patch_slots.json`, checking every value.

    Returns:
        The attributes of a ModelFolder, without its `path`.

    Raises:
        ModelFormatError: the text is not JSON, or does not describe a model folder of a version that is known.
        UnsafePathError: a listed file has a name that could lead out of the folder.
    """
    try:
        data = parse_json_object(raw)
    except StrictJSONError as error:
        raise ModelFormatError(
            f"the description {error.problem}",
            field=SLOTS_FILE,
            got=error.got,
            wanted=error.wanted,
            fix=REEXPORT,
        ) from error
    # The format and the version are checked first, because another version has other keys and should not be reported as
    # a file with unknown keys.
    if data.pop("format", None) != FORMAT:
        raise _bad("format", "something else", FORMAT)
    version = _integer(data.pop("version", None), "version")
    if version != VERSION:
        raise ModelFormatError(
            "this runtime does not know the version of the description",
            field=f"{SLOTS_FILE} version",
            got=version,
            wanted=VERSION,
            fix="update tp-runtime, or export the model again with this version of tp-export",
        )
    _keys(data, "", _KEYS | (_OPTIONAL & data.keys()))
    layers = _integer(data["layers"], "layers")
    route = _text(data["route"], "route", ("fused", "optimum"))
    kv = _keys(data["kv"], "kv", {"heads", "head_dim", "dtype"})
    return dict(
        architecture=_text(data["architecture"], "architecture"),
        base_model=_text(data["base_model"], "base_model"),
        base_digest=_digest(data["base_digest"], "base_digest"),
        precision=_text(data["precision"], "precision", PRECISIONS),
        style=_text(data["style"], "style", ("chat", "completion")),
        route=route,
        layers=layers,
        vocab_size=_integer(data["vocab_size"], "vocab_size"),
        context_window=_integer(data["context_window"], "context_window"),
        kv=KV(
            heads=_integer(kv["heads"], "kv.heads"),
            head_dim=_integer(kv["head_dim"], "kv.head_dim"),
            dtype=_text(kv["dtype"], "kv.dtype", ("f32", "f16")),
        ),
        slots=_slots(data["slots"], layers),
        default_patch=_default_patch(data["default_patch"]),
        files=_exported_files(data["files"]),
        digest_change=_digest_change(data["digest_change"]) if "digest_change" in data else None,
        windowed=_windowed(data["windowed"], layers, route) if "windowed" in data else None,
        best=_best(data["best"], data["vocab_size"], route) if "best" in data else None,
        weights_digest=_digest(data["weights_digest"], "weights_digest") if "weights_digest" in data else None,
    )


def _slots(value: Any, layers: int) -> dict[SlotKey, Slot]:
    slots: dict[SlotKey, Slot] = {}
    for index, item in enumerate(_list(value, "slots")):
        field = f"slots[{index}]"
        scaled = isinstance(item, dict) and "scale" in item
        _keys(item, field, {"layer", "site", "in", "out", *(("scale",) if scaled else ())})
        slot = Slot(
            layer=_integer(item["layer"], f"{field}.layer", 0, layers - 1),
            site=_text(item["site"], f"{field}.site", SITES),
            inputs=_integer(item["in"], f"{field}.in"),
            outputs=_integer(item["out"], f"{field}.out"),
            scale=_scale(item["scale"], f"{field}.scale") if scaled else 1.0,
        )
        if slots.setdefault((slot.layer, slot.site), slot) is not slot:
            raise _bad(field, f"{slot.name} a second time", "each slot once")
    return slots


def _scale(value: Any, field: str) -> float:
    if type(value) is not float or not 0 < value < 1 or math.frexp(value)[0] != 0.5:
        raise _bad(field, value, "a power of two below 1")
    return value


def _default_patch(value: Any) -> DefaultPatch | None:
    if value is None:
        return None
    _keys(value, "default_patch", {"name", "identity", "terms", "repair"})
    if type(value["repair"]) is not bool:
        raise _bad("default_patch.repair", value["repair"], "true or false")
    terms = []
    for index, item in enumerate(_list(value["terms"], "default_patch.terms")):
        field = f"default_patch.terms[{index}]"
        # An integer is accepted too, because another JSON writer may write the strength 1.0 as 1.
        if len(_list(item, field)) != 2 or type(item[1]) not in (int, float) or not abs(item[1]) < 1e308:
            raise _bad(field, item, "[identity, strength]")
        terms.append((_digest(item[0], field), float(item[1])))
    identity = _digest(value["identity"], "default_patch.identity")
    # A patch that is made of one patch at strength 1 is that patch. Other terms cannot be checked, and select nothing.
    if not terms or (len(terms) == 1 and terms[0][1] == 1.0 and terms[0][0] != identity):
        raise _bad("default_patch.terms", terms, "the patches that the default patch is made of")
    return DefaultPatch(
        name=_text(value["name"], "default_patch.name"),
        identity=identity,
        terms=tuple(terms),
        repair=value["repair"],
    )


def _digest_change(value: Any) -> DigestChange:
    _keys(value, "digest_change", {"before", "reason"})
    return DigestChange(
        before=_digest(value["before"], "digest_change.before"), reason=_text(value["reason"], "digest_change.reason")
    )


def _windowed(value: Any, layers: int, route: str) -> Windowed:
    _keys(value, "windowed", {"layers", "window"})
    field = "windowed.layers"
    if route != "fused":
        raise _bad("windowed", f"an object, on the route {route}", "nothing: only graphs of the route fused have it")
    found = tuple(_integer(layer, field, 0, layers - 1) for layer in _list(value["layers"], field))
    if list(found) != sorted(set(found)) or not 0 < len(found) < layers:
        raise _bad(field, list(found), "ascending numbers of some of the layers, and not of all")
    return Windowed(found, _integer(value["window"], "windowed.window"))


def _best(value: Any, vocab_size: int, route: str) -> int:
    if route != "fused":
        raise _bad("best", f"a number, on the route {route}", "nothing: only graphs of the route fused have it")
    return _integer(value, "best", 1, vocab_size)


def _exported_files(value: Any) -> dict[str, FileRecord]:
    if not isinstance(value, dict) or GRAPH_FILE not in value:
        raise _bad("files", value, "an object that lists " + GRAPH_FILE)
    return parse_files(value, SLOTS_FILE)


def parse_files(value: Any, file: str) -> dict[str, FileRecord]:
    """Check and return the parsed records of files by name, as patch_slots.json and prepared.json have them.

    Args:
        value: the value of the key `files`.
        file: the name of the file that it is from, for errors.

    Raises:
        ModelFormatError: the value has another form.
        UnsafePathError: a name could lead out of the folder.
    """
    if not isinstance(value, dict):
        raise _bad("files", value, "an object", file)
    files = {}
    for name, item in value.items():
        check_name(name, f"{file} files")
        _keys(item, f"files.{name}", {"sha256", "bytes"}, file)
        files[name] = FileRecord(
            sha256=_digest(item["sha256"], f"files.{name}.sha256", file),
            bytes=_integer(item["bytes"], f"files.{name}.bytes", 0, 2**63 - 1, file),
        )
    return files


def _keys(value: Any, field: str, wanted: set[str], file: str = SLOTS_FILE) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _bad(field, value, "an object", file)
    if value.keys() != wanted:
        missing, unknown = sorted(wanted - value.keys()), sorted(value.keys() - wanted)
        raise _bad(field, f"missing {missing}, unknown {unknown}", f"the keys {sorted(wanted)}", file)
    return value


def _list(value: Any, field: str) -> list[Any]:
    if not isinstance(value, list):
        raise _bad(field, value, "a list")
    return value


def _text(value: Any, field: str, choices: tuple[str, ...] = ()) -> str:
    # The text must be printable, because it goes to terminals and logs.
    if not isinstance(value, str) or not value.isprintable() or not value:
        raise _bad(field, value, "printable text, not empty")
    if choices and value not in choices:
        raise _bad(field, value, "one of " + ", ".join(choices))
    return value


def _digest(value: Any, field: str, file: str = SLOTS_FILE) -> str:
    if not isinstance(value, str) or not SHA256.fullmatch(value):
        raise _bad(field, value, "a SHA-256 in 64 lower-case hex digits", file)
    return value


def _integer(value: Any, field: str, low: int = 1, high: int = 2**31 - 1, file: str = SLOTS_FILE) -> int:
    if type(value) is not int or not low <= value <= high:  # a bool is an int in Python, but not in this format
        raise _bad(field, value, f"an integer from {low} to {high}", file)
    return value


def _bad(field: str, got: object, wanted: object, file: str = SLOTS_FILE) -> ModelFormatError:
    return ModelFormatError(
        "the description has a value that is not valid",
        field=f"{file} {field}".rstrip(),
        got=shown(got),
        wanted=wanted,
        fix=REEXPORT,
    )
