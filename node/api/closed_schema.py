"""An object that lists its properties holds those alone, where its schema does not say otherwise.

JSON Schema lets every object hold more than it lists. Answers that a grammar writes should not: a small model then adds keys
until its tokens are spent, and what LoRAX (outlines) and vLLM (xgrammar, strict) write has never had them. A narrower schema's
answers follow the wider one too. `additionalProperties: true` asks for the wider one.
"""

from __future__ import annotations

from typing import Any

from node.api.schema_limits import schemas_within

_COMBINING = ("if", "then", "else", "not", "dependentSchemas", "unevaluatedProperties", "unevaluatedItems")
_BESIDE_PROPERTIES = ("allOf", "anyOf", "oneOf", "$ref")
_SAID = ("additionalProperties", "patternProperties")


def closed(schema: dict[str, Any]) -> dict[str, Any]:
    """A copy whose objects hold nothing unlisted. One that combines schemas over the same object is returned as it is: closing
    one of them would forbid what the other lists.

    Args:
        schema: Within the limits of `check_schema`.
    """
    if any(_is_combined(part) for part in schemas_within(schema)):
        return schema
    copy: dict[str, Any] = _copied(schema)
    for part in list(schemas_within(copy)):
        if _lists_everything(part):
            part["additionalProperties"] = False
    return copy


def _is_combined(part: dict[str, Any]) -> bool:
    if any(key in part for key in _COMBINING):
        return True
    several = part.get("allOf")
    if isinstance(several, list) and len(several) > 1:
        return True
    return "properties" in part and any(key in part for key in _BESIDE_PROPERTIES)


def _lists_everything(part: dict[str, Any]) -> bool:
    properties = part.get("properties")
    if not isinstance(properties, dict) or any(key in part for key in _SAID):
        return False
    required, least = part.get("required", []), part.get("minProperties", 0)
    is_enough = not isinstance(least, int) or least <= len(properties)
    return is_enough and isinstance(required, list) and all(name in properties for name in required)


def _copied(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()}
    return [_copied(item) for item in value] if isinstance(value, list) else value
