"""JSON schemas: every part is checked, and written down again in the words that llguidance enforces exactly.

llguidance drops keywords that it does not know, takes the names of definitions literally, and computes with rounded
numbers. So it gets a schema that was made here: each keyword has been understood and is enforced, or the schema is
refused with the path of the part. References become short names in `$defs`, and annotations are left out.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote

from ..errors import RequestError, shown
from ..storage import StrictJSONError, parse_json
from .budget import MOST_PARTS, MOST_PATTERNS, Budget
from .finite import check_finite
from .formats import BUILT_IN, PATTERNS
from .keywords import ANNOTATIONS, DEFINITIONS, DRAFTS, REFUSED
from .numbers import Multiples, beside, count, exact_number
from .pattern import translate

_DEEPEST = 128  # parts inside parts, references followed; llguidance recurses, and 5,000 levels overflow the stack
_MOST_PROPERTIES = 1_000  # of one object
_MOST_OPTIONAL = 400  # of one object: all of them can come next, and llguidance follows at most 2,000 ways at once
_MOST_ONE_OF = 500  # llguidance compares every two of them
_NESTED_LITERAL = 10  # what a list or an object in enum counts for: each becomes rules of its own
_MOST_PLACES = 300  # parts that are compiled one by one to find a problem

_TYPES = frozenset({"null", "boolean", "integer", "number", "string", "array", "object"})

# Free white space lets a small model write blanks to the end of its budget, so a value has one line and one form. No
# \u escapes: with them one name has many spellings, and a property could come twice under another schema.
_FORM = {
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
    "json_allowed_escapes": 'nrbtf\\"',
}


def schema_text(schema: object, path: str) -> str:
    """Return a schema as JSON text, which is the key under which its grammar is kept.

    Raises:
        RequestError: the schema is neither an object nor JSON text.
    """
    if isinstance(schema, str):
        return schema
    try:
        if not isinstance(schema, Mapping):
            raise TypeError(f"{type(schema).__name__} is no object")
        return json.dumps(dict(schema), allow_nan=False, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        wanted = "an object of strings, numbers, lists and objects, or JSON text"
        raise RequestError("the schema is not JSON", field=path, got=shown(str(error)), wanted=wanted) from None


def check_schema(schema: Mapping[str, Any], path: str) -> None:
    """Check that every part of a schema can be enforced.

    Raises:
        RequestError: a part cannot; the error's field is its place behind `path`.
    """
    lower_schema(schema_text(schema, path), path)


@dataclass
class LoweredSchema:
    """A schema in the words that llguidance enforces.

    Attributes:
        root: the schema itself, without definitions.
        definitions: the parts that are referred to, by name.
        places: every part and its path in the original schema; a part comes after the parts inside it.
    """

    root: dict[str, Any]
    definitions: dict[str, Any] = field(default_factory=dict)
    places: list[tuple[str, dict[str, Any]]] = field(default_factory=list)

    def text(self) -> str:
        """Return the schema for llguidance, as JSON text."""
        return self._text(self.root)

    def parts(self) -> Iterator[tuple[str, dict[str, Any], str]]:
        """Yield the paths, the keywords and the JSON texts of the parts, each as a schema: small parts come first."""
        for path, part in self.places[:_MOST_PLACES]:
            yield path, part, self._text(part)

    def _text(self, part: dict[str, Any]) -> str:
        return json.dumps({"x-guidance": _FORM, "$defs": self.definitions, **part}, ensure_ascii=False)


def lower_schema(text: str, path: str, budget: Budget | None = None) -> LoweredSchema:
    """Check a schema and write it down for llguidance.

    Args:
        text: the schema as JSON text.
        path: the name of the argument, which begins every path in an error.
        budget: what the grammar that holds the schema may still hold; None if the schema is the whole grammar.

    Raises:
        RequestError: the text is no JSON object, or a part is malformed, not supported, too large, or excludes every
            finite value; the error's field is the path of the part.
    """
    try:
        schema = parse_json(text)
    except StrictJSONError as error:
        raise RequestError(f"the schema {error.problem}", field=path, got=error.got, wanted=error.wanted) from error
    if not isinstance(schema, dict):
        raise RequestError(
            "the schema is not an object", field=path, got=shown(schema), wanted='such as {"type": "object"}'
        )
    lowering = _Lowering(schema, path, budget or Budget())
    lowered = LoweredSchema(lowering.lower_root(), lowering.definitions, lowering.places)
    check_finite(lowered.root, lowered.definitions, lowering.paths)
    return lowered


class _Lowering:
    """One pass over a schema. Each method `_lower_...` takes a value, its path and the depth."""

    def __init__(self, root: dict[str, Any], path: str, budget: Budget) -> None:
        self._root = root
        self._path = path
        self.definitions: dict[str, Any] = {}
        self.paths: dict[str, str] = {}  # for each definition the path of the part
        self.places: list[tuple[str, dict[str, Any]]] = []
        self._names: dict[tuple[str, ...], str] = {}
        self._budget = budget
        self._multiples = Multiples(budget)
        self._draft = self._read_draft()

    def lower_root(self) -> dict[str, Any]:
        """Return the lowered schema, without its definitions."""
        lowered = self._lower(self._root, self._path, 0)
        assert isinstance(lowered, dict)
        return lowered

    def _read_draft(self) -> str:
        value = self._root.get("$schema", "https://json-schema.org/draft/2020-12/schema")
        draft = DRAFTS.get(value.rstrip("#")) if isinstance(value, str) else None
        if draft is None:
            raise self._refused("the draft of JSON Schema is not known", "$schema", value, ", ".join(DRAFTS))
        return draft

    def _refused(self, problem: str, path: str, got: object, wanted: str, fix: str = "") -> RequestError:
        field = path if path.startswith(self._path) else f"{self._path}.{path}"
        return RequestError(problem, field=field, got=shown(got), wanted=wanted, fix=fix)

    def _lower(self, schema: Any, path: str, depth: int) -> dict[str, Any] | bool:
        """Return one part in the words of llguidance."""
        if isinstance(schema, bool):
            return schema
        if not isinstance(schema, dict):
            raise self._refused("the value is not a schema", path, schema, "an object, true or false")
        self._count(path)
        if depth > _DEEPEST:
            fix = "use fewer levels, or fewer references from one definition to the next"
            raise self._refused("the schema is nested too deep", path, f"more than {_DEEPEST} levels", "fewer", fix)
        out: dict[str, Any] = {}
        for key, value in schema.items():
            where = _join(path, key)
            if key in REFUSED:
                if key == "uniqueItems" and value is False:
                    continue
                raise self._refused("the keyword cannot be enforced", where, value, "a schema without it", REFUSED[key])
            if key in ANNOTATIONS or key.startswith("x-"):
                continue
            if key in DEFINITIONS:
                if not isinstance(value, dict):
                    raise self._refused("the definitions are malformed", where, value, "an object of schemas")
            elif key in ("$schema", "$id", "id") and schema is self._root and (key != "id" or self._draft == "04"):
                continue
            elif key in _HANDLERS:
                _HANDLERS[key](self, out, key, value, where, depth)
            else:
                fix = 'correct the name; a note of your own may begin with "x-"'
                raise self._refused("the keyword is not known", where, value, "a keyword of JSON Schema", fix)
        rest = out.pop("additionalItems", None)
        if rest is not None and "prefixItems" in out:  # beside one schema for all items, or none, it says nothing
            out["items"] = rest
        self._check_object(schema, path)
        self.places.append((path, out))
        return out

    def _count(self, path: str, parts: int = 1) -> None:
        if not self._budget.take_parts(parts):
            got, wanted = f"more than {MOST_PARTS} parts", "fewer schemas, properties and values"
            raise self._refused("the schema is too large", path, got, wanted)

    def _check_object(self, schema: dict[str, Any], path: str) -> None:
        """Check what several keywords of an object say together."""
        required = set(schema.get("required", ()))
        optional = len(schema.get("properties", {}).keys() - required)
        if optional > _MOST_OPTIONAL:
            where, wanted = _join(path, "properties"), f"at most {_MOST_OPTIONAL} properties that are not required"
            raise self._refused("the object has too many optional properties", where, optional, wanted)
        closed = schema.get("additionalProperties") is False and not schema.get("patternProperties")
        if not closed and schema.get("minProperties", 0) > len(required) + 1:
            raise self._refused(
                "minProperties cannot be enforced where names are free: the same name could come twice",
                _join(path, "minProperties"),
                schema["minProperties"],
                f"at most {len(required) + 1}, one more than the required properties",
                "name the properties in required, or use additionalProperties: false",
            )

    def _lower_type(self, out: dict[str, Any], key: str, value: Any, path: str, depth: int) -> None:
        names = value if isinstance(value, list) else [value]
        if not names or not all(isinstance(name, str) and name in _TYPES for name in names):
            raise self._refused("the type is not known", path, value, f"one of {', '.join(sorted(_TYPES))}, or a list")
        out[key] = value

    def _lower_literals(self, out: dict[str, Any], key: str, value: Any, path: str, depth: int) -> None:
        if key == "enum" and (not isinstance(value, list) or not value):
            raise self._refused("the value is not a list of values", path, value, "a list, not empty")
        out[key] = self._literal(value, path, depth)

    def _literal(self, value: Any, path: str, depth: int) -> Any:
        """Return a value of enum or const, after the check that it can be written exactly."""
        self._count(path, _NESTED_LITERAL if isinstance(value, dict | list) else 1)
        if isinstance(value, dict):
            if depth > _DEEPEST:
                raise self._refused("the value is nested too deep", path, f"more than {_DEEPEST} levels", "fewer")
            return {key: self._literal(each, _join(path, key), depth + 1) for key, each in value.items()}
        if isinstance(value, list):
            if depth > _DEEPEST:
                raise self._refused("the value is nested too deep", path, f"more than {_DEEPEST} levels", "fewer")
            return [self._literal(each, f"{path}[{at}]", depth + 1) for at, each in enumerate(value)]
        if isinstance(value, str):
            if any((char < " " and char not in "\n\r\t\b\f") or char == "\x7f" for char in value):
                raise self._refused("the value holds a control character", path, value, "no control characters")
            return value
        return value if value is None or isinstance(value, bool) else exact_number(value, path)

    def _lower_ref(self, out: dict[str, Any], key: str, value: Any, path: str, depth: int) -> None:
        if not isinstance(value, str):
            raise self._refused("the reference is not a text", path, value, 'such as "#/$defs/name"')
        out[key] = f"#/$defs/{self._define(value, path, depth)}"

    def _define(self, reference: str, path: str, depth: int) -> str:
        """Return the name of the definition that a reference points to. At its first use the part is lowered."""
        own = self._root.get("$id")
        pointer = reference.removeprefix(own.rstrip("#")) if isinstance(own, str) else reference
        if pointer != "#" and not pointer.startswith("#/"):
            fix = "copy what it refers to into $defs"
            raise self._refused("the reference leaves the schema", path, reference, '"#" or "#/..."', fix)
        steps = tuple(unquote(step).replace("~1", "/").replace("~0", "~") for step in pointer[1:].split("/")[1:])
        if steps in self._names:
            return self._names[steps]
        part: Any = self._root
        where = self._path
        for step in steps:
            if isinstance(part, dict) and step in part:
                part, where = part[step], _join(where, step)
            elif isinstance(part, list) and _is_index(step, part):
                part, where = part[int(step)], f"{where}[{step}]"
            else:
                raise self._refused("the reference points to nothing", path, reference, "the path of a part")
        name = self._names[steps] = str(len(self._names))
        self.paths[name] = where
        self.definitions[name] = self._lower(part, where, depth + 1)
        return name

    def _lower_list(self, out: dict[str, Any], key: str, value: Any, path: str, depth: int) -> None:
        if not isinstance(value, list) or not value:
            raise self._refused("the value is not a list of schemas", path, value, "a list, not empty")
        if key == "prefixItems" and self._draft != "2020-12":
            raise self._refused(
                "the draft does not have this keyword", path, value, "draft 2020-12", "leave $schema out"
            )
        if key == "oneOf" and len(value) > _MOST_ONE_OF:
            got, wanted = f"{len(value)} options", f"at most {_MOST_ONE_OF}"
            raise self._refused("oneOf has too many options", path, got, wanted, "use anyOf")
        parts = [self._lower(each, f"{path}[{at}]", depth + 1) for at, each in enumerate(value)]
        out[key] = out[key] + parts if key in out else parts  # a format can have made an allOf

    def _lower_map(self, out: dict[str, Any], key: str, value: Any, path: str, depth: int) -> None:
        if not isinstance(value, dict):
            raise self._refused("the value is not an object of schemas", path, value, "an object")
        within = self._budget.take_patterns(len(value) if key == "patternProperties" else 0)
        if len(value) > _MOST_PROPERTIES or not within:
            wanted = f"at most {_MOST_PROPERTIES} properties of an object, and {MOST_PATTERNS} patterns in the grammar"
            raise self._refused("the object has too many properties", path, f"{len(value)} names", wanted)
        parts: dict[str, Any] = {}
        for name, each in value.items():
            where = _join(path, name)
            written = translate(name, where) if key == "patternProperties" else name
            if written in parts:
                raise self._refused("two patterns mean the same", where, name, "patterns that do not overlap")
            parts[written] = self._lower(each, where, depth + 1)
        out[key] = parts

    def _lower_part(self, out: dict[str, Any], key: str, value: Any, path: str, depth: int) -> None:
        out[key] = self._lower(value, path, depth + 1)

    def _lower_items(self, out: dict[str, Any], key: str, value: Any, path: str, depth: int) -> None:
        if not isinstance(value, list):
            self._lower_part(out, key, value, path, depth)
        elif self._draft == "2020-12":
            raise self._refused(
                "a list of schemas has another name in draft 2020-12", path, value, "a schema", "use prefixItems"
            )
        else:
            places: dict[str, Any] = {}
            self._lower_list(places, key, value, path, depth)
            out["prefixItems"] = places[key]

    def _lower_additional_items(self, out: dict[str, Any], key: str, value: Any, path: str, depth: int) -> None:
        if self._draft == "2020-12":
            raise self._refused(
                "draft 2020-12 does not have this keyword", path, value, "items", "use items beside prefixItems"
            )
        self._lower_part(out, key, value, path, depth)

    def _lower_required(self, out: dict[str, Any], key: str, value: Any, path: str, depth: int) -> None:
        if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
            raise self._refused("the value is not a list of names", path, value, "a list of strings")
        out[key] = value

    def _lower_count(self, out: dict[str, Any], key: str, value: Any, path: str, depth: int) -> None:
        out[key] = count(value, path)

    def _lower_number(self, out: dict[str, Any], key: str, value: Any, path: str, depth: int) -> None:
        if not key.startswith("exclusive"):
            out[key] = self._tightest(out, key, exact_number(value, path))
            return
        bound = "minimum" if key == "exclusiveMinimum" else "maximum"
        out[bound] = self._tightest(out, bound, beside(value, path, 1 if bound == "minimum" else -1))

    def _tightest(self, out: dict[str, Any], bound: str, value: int | float) -> int | float:
        """Return the tighter one of a bound that is there already and another one."""
        if bound not in out:
            return value
        return max(out[bound], value) if bound == "minimum" else min(out[bound], value)

    def _lower_multiple(self, out: dict[str, Any], key: str, value: Any, path: str, depth: int) -> None:
        out[key] = self._multiples.add(value, path)

    def _lower_pattern(self, out: dict[str, Any], key: str, value: Any, path: str, depth: int) -> None:
        if not isinstance(value, str):
            raise self._refused("the pattern is not a text", path, value, "str")
        out[key] = translate(value, path)

    def _lower_format(self, out: dict[str, Any], key: str, value: Any, path: str, depth: int) -> None:
        if isinstance(value, str) and value in PATTERNS:
            out.setdefault("allOf", []).append({"pattern": PATTERNS[value]})
        elif isinstance(value, str) and value in BUILT_IN:
            out[key] = value
        else:
            wanted = ", ".join(sorted(BUILT_IN | PATTERNS.keys()))
            raise self._refused("the format cannot be enforced", path, value, wanted, "use pattern")


def _is_index(step: str, items: list[Any]) -> bool:
    """Return whether a step of a reference is the place of an item. Nine digits are more than any list needs."""
    return len(step) <= 9 and step.isascii() and step.isdigit() and int(step) < len(items)


def _join(path: str, key: str) -> str:
    """Return the path of what a key holds. A key that is not a plain word is quoted."""
    plain = key.removeprefix("$").replace("-", "_").isidentifier()
    return f"{path}.{key}" if plain else f"{path}[{json.dumps(key, ensure_ascii=False)}]"


_Handler = Callable[[_Lowering, dict[str, Any], str, Any, str, int], None]

_HANDLERS: dict[str, _Handler] = {
    "type": _Lowering._lower_type,
    "enum": _Lowering._lower_literals,
    "const": _Lowering._lower_literals,
    "$ref": _Lowering._lower_ref,
    "allOf": _Lowering._lower_list,
    "anyOf": _Lowering._lower_list,
    "oneOf": _Lowering._lower_list,
    "prefixItems": _Lowering._lower_list,
    "properties": _Lowering._lower_map,
    "patternProperties": _Lowering._lower_map,
    "additionalProperties": _Lowering._lower_part,
    "items": _Lowering._lower_items,
    "additionalItems": _Lowering._lower_additional_items,
    "required": _Lowering._lower_required,
    **dict.fromkeys(
        ("minItems", "maxItems", "minProperties", "maxProperties", "minLength", "maxLength"), _Lowering._lower_count
    ),
    **dict.fromkeys(("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"), _Lowering._lower_number),
    "multipleOf": _Lowering._lower_multiple,
    "pattern": _Lowering._lower_pattern,
    "format": _Lowering._lower_format,
}
