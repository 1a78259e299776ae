"""Small words for JSON Schema, so that the description of a request reads like the request."""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]

NULL: Schema = {"type": "null"}


def text(
    description: str, *, max_chars: int | None = None, min_chars: int | None = None, choices: tuple[str, ...] = ()
) -> Schema:
    """A string."""
    schema: Schema = {"type": "string", "description": description}
    if max_chars is not None:
        schema["maxLength"] = max_chars
    if min_chars is not None:
        schema["minLength"] = min_chars
    if choices:
        schema["enum"] = list(choices)
    return schema


def integer(description: str, minimum: int | None = None, maximum: int | None = None) -> Schema:
    """A whole number."""
    return _bounded({"type": "integer", "description": description}, minimum, maximum)


def number(
    description: str, minimum: float | None = None, maximum: float | None = None, *, above_minimum: bool = False
) -> Schema:
    """A finite number."""
    schema = _bounded({"type": "number", "description": description}, None if above_minimum else minimum, maximum)
    if above_minimum:
        schema["exclusiveMinimum"] = minimum
    return schema


def boolean(description: str) -> Schema:
    """true or false."""
    return {"type": "boolean", "description": description}


def items(description: str, item: Schema, *, min_items: int = 0, max_items: int | None = None) -> Schema:
    """A list."""
    schema: Schema = {"type": "array", "description": description, "items": item}
    if min_items:
        schema["minItems"] = min_items
    if max_items is not None:
        schema["maxItems"] = max_items
    return schema


def record(description: str, properties: dict[str, Schema], *, required: tuple[str, ...] = (), is_open: bool = True) -> Schema:
    """An object. An open one may hold further fields: they are ignored and named in the `x-openlora-warnings` header."""
    schema: Schema = {"type": "object", "description": description, "properties": properties}
    if required:
        schema["required"] = list(required)
    if not is_open:
        schema["additionalProperties"] = False
    return schema


def optional(schema: Schema) -> Schema:
    """The same, or null, which counts as absent."""
    described = {key: value for key, value in schema.items() if key != "description"}
    result: Schema = {"anyOf": [described, NULL]}
    if "description" in schema:
        result["description"] = schema["description"]
    return result


def optionals(properties: dict[str, Schema]) -> dict[str, Schema]:
    """Every property, or null in its place."""
    return {name: optional(schema) for name, schema in properties.items()}


def reference(name: str) -> Schema:
    """A schema of `components.schemas`."""
    return {"$ref": f"#/components/schemas/{name}"}


def _bounded(schema: Schema, minimum: float | None, maximum: float | None) -> Schema:
    if minimum is not None:
        schema["minimum"] = minimum
    if maximum is not None:
        schema["maximum"] = maximum
    return schema
