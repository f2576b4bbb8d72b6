"""The keywords of JSON Schema that are no constraints, and those that cannot be enforced, with what to write."""

from __future__ import annotations

ANNOTATIONS = frozenset(
    {
        "$comment",
        "$anchor",
        "title",
        "description",
        "default",
        "examples",
        "deprecated",
        "readOnly",
        "writeOnly",
        "contentEncoding",
        "contentMediaType",
        "contentSchema",
        # OpenAPI's, which say nothing about which values are valid
        "example",
        "discriminator",
        "externalDocs",
    }
)
"""The keywords that say nothing about which values are valid; so do all that begin with "x-"."""

DEFINITIONS = frozenset({"$defs", "definitions"})

_ANY_OF = "list what is allowed with anyOf or enum"
_REQUIRED = "list the cases with anyOf, each with its own required properties"
_CHECK = "leave it out, and check the value after the completion"

REFUSED = {
    "not": _ANY_OF,
    "if": "list the cases with anyOf",
    "then": "list the cases with anyOf",
    "else": "list the cases with anyOf",
    "uniqueItems": _CHECK,
    "contains": "place the item with prefixItems",
    "minContains": _CHECK,
    "maxContains": _CHECK,
    "propertyNames": "use patternProperties with additionalProperties: false",
    "dependentRequired": _REQUIRED,
    "dependentSchemas": _REQUIRED,
    "dependencies": _REQUIRED,
    "unevaluatedItems": "use items: false beside prefixItems",
    "unevaluatedProperties": "use additionalProperties: false beside properties",
    "$dynamicRef": "use $ref",
    "$dynamicAnchor": "use $defs and $ref",
    "$recursiveRef": "use $ref",
    "$recursiveAnchor": "use $defs and $ref",
    "nullable": 'use "type": [..., "null"]',
    "disallow": _ANY_OF,
    "extends": "use allOf",
    "divisibleBy": "use multipleOf",
    "x-guidance": "leave it out: white space and strictness are the runtime's",
}
"""The keywords that cannot be enforced, or that JSON Schema does not have, and for each what to do."""

DRAFTS = {
    "https://json-schema.org/draft/2020-12/schema": "2020-12",
    "https://json-schema.org/draft/2019-09/schema": "2019-09",
    "http://json-schema.org/draft-07/schema": "07",
    "http://json-schema.org/draft-06/schema": "06",
    "http://json-schema.org/draft-04/schema": "04",
}
"""The drafts of JSON Schema by the value of $schema, without the "#" that may follow it."""
