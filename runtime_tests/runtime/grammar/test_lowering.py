"""What schemas become: the items of older drafts, and recursion in schemas of every size and order."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tp_runtime.errors import RequestError
from tp_runtime.grammar.finite import check_finite
from tp_runtime.grammar.json_schema import lower_schema

INTEGER, TEXT = {"type": "integer"}, {"type": "string"}


@pytest.mark.parametrize("draft", ["draft-04", "draft-06", "draft-07"])
@pytest.mark.parametrize(
    ("keywords", "lowered"),
    [
        ({"items": [INTEGER], "additionalItems": TEXT}, {"prefixItems": [INTEGER], "items": TEXT}),
        ({"items": [INTEGER], "additionalItems": False}, {"prefixItems": [INTEGER], "items": False}),
        ({"items": [INTEGER]}, {"prefixItems": [INTEGER]}),
        ({"items": INTEGER, "additionalItems": False}, {"items": INTEGER}),
        ({"additionalItems": TEXT}, {}),
    ],
    ids=["the rest", "no rest", "any rest", "beside one schema", "alone"],
)
def test_additional_items_are_the_rest_beside_a_list_and_nothing_otherwise(
    draft: str, keywords: dict[str, Any], lowered: dict[str, Any]
) -> None:
    for each in (keywords, dict(reversed(keywords.items()))):  # the order of the keywords says nothing
        schema = {"$schema": f"http://json-schema.org/{draft}/schema#", **each}
        assert lower_schema(json.dumps(schema), "json_schema").root == lowered


def test_additional_items_that_say_nothing_are_still_checked() -> None:
    schema = {"$schema": "http://json-schema.org/draft-07/schema#", "items": {}, "additionalItems": {"minimun": 3}}
    with pytest.raises(RequestError) as refused:
        lower_schema(json.dumps(schema), "json_schema")
    assert refused.value.field == "json_schema.additionalItems.minimun"


def chain(length: int, end: Any) -> dict[str, Any]:
    """Return definitions of which each one needs the next, and one that needs all of them."""

    def must_have(*names: int) -> dict[str, Any]:
        properties = {str(name): {"$ref": f"#/$defs/{name}"} for name in names}
        return {"type": "object", "properties": properties, "required": list(properties)}

    links = {str(at): must_have(at + 1) for at in range(length)}
    return {"all": must_have(*reversed(range(length))), **links, str(length): end}


def test_a_long_chain_of_definitions_is_followed_once() -> None:
    """A pass over all definitions for each link would not end here."""
    definitions = chain(10_000, INTEGER)
    paths = dict.fromkeys(definitions, "json_schema")
    check_finite({"$ref": "#/$defs/all"}, definitions, paths)
    assert definitions == chain(10_000, INTEGER)
    with pytest.raises(RequestError, match="no finite value is valid"):
        check_finite({"$ref": "#/$defs/all"}, chain(10_000, False), paths)


def test_options_without_an_end_are_left_out() -> None:
    endless = {"type": "array", "items": {"$ref": "#/$defs/0"}, "minItems": 1}
    root: dict[str, Any] = {"anyOf": [{"$ref": "#/$defs/0"}, {"$ref": "#/$defs/1"}]}
    definitions: dict[str, Any] = {"0": endless, "1": {"anyOf": [{"type": "array", "items": endless}, endless]}}
    check_finite(root, definitions, {"0": "a", "1": "b"})
    assert root == {"anyOf": [False, {"$ref": "#/$defs/1"}]}
    assert definitions["0"] is False
