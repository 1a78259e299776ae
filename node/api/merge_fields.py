"""Several adapters in one request: LoRAX's `merged_adapters`, the `adapters` of the OpenAI shapes, and `model: "a+b@0.7:0.3"`.

A weight is an exact decimal, because shares of the fee follow from it. Text ("0.7", or inside a model's name) is taken as it is
written; a JSON number is a double (RFC 8259, section 6) and stands for the shortest decimal that reads back as that double.
"""

from __future__ import annotations

import re
from decimal import Decimal, InvalidOperation

from attribution.record import ELECTING, MERGE_STRATEGIES, PRUNING, SIGN_METHODS, Merge
from attribution.shares import WEIGHT_DECIMALS
from node.adapters.locations import is_location
from node.api.fields import Fields, shown
from node.api.generation import Limits, NamedTerm
from node.errors import RequestError

MAX_NAME_CHARS = 1024  # of one adapter, locations in a store included
MAX_WEIGHT = 100
STRATEGIES = ("linear", *MERGE_STRATEGIES)
_DECIMAL = re.compile(r"-?[0-9]{1,9}(\.[0-9]{1,40})?")
_WEIGHTS = re.compile(r"@([^@/]*:[^@/]*)$")
_LONE_WEIGHT = re.compile(r"\+[^+@/]*@" + _DECIMAL.pattern + "$")  # after a name without an owner, which has no revisions

Merged = tuple[tuple[NamedTerm, ...], Merge | None]


def read_merged_adapters(fields: Fields, limits: Limits) -> Merged:
    """LoRAX's `merged_adapters`.

    Raises:
        RequestError: Empty ids, unequal lengths, malformed weights, an unknown strategy, a density that is missing.
    """
    merge = fields.inner("merged_adapters")
    if merge is None:
        return (), None
    ids = merge.items("ids", limits.max_terms) or []
    if not ids or not all(_is_name(name) for name in ids):
        raise merge.error("ids", "must be a list of adapter names, at least one")
    weights = merge.items("weights", limits.max_terms) or []
    if weights and len(weights) != len(ids):
        raise merge.error("weights", f"must have as many values as `ids` ({len(ids)})")
    texts = [read_weight(weight, merge.name(f"weights[{index}]")) for index, weight in enumerate(weights)] or ["1"] * len(ids)
    terms = _terms(list(zip(ids, texts, strict=True)), merge.name("ids"))
    return terms, _read_merge(merge, len(terms))


def read_adapters(fields: Fields, model: str, limits: Limits) -> Merged | None:
    """The `adapters` of an OpenAI request, or a recipe in `model`; None where there is neither.

    Raises:
        RequestError: Both at once, malformed entries, too many of them.
    """
    listed = fields.items("adapters", limits.max_terms)
    in_name = parse_recipe_name(model, limits.max_terms)
    if listed is not None and in_name is not None:
        raise RequestError("`adapters` and a recipe in `model` are given; use one of them", param="adapters")
    if listed is None and in_name is None:
        for key in ("merge_strategy", "density", "majority_sign_method"):
            if fields.raw(key) is not None:
                raise fields.error(key, "needs `adapters`, or several adapters in `model`")
        return None
    if listed is not None and not listed:
        raise fields.error("adapters", "must name at least one adapter")
    terms = in_name if listed is None else _listed_terms(listed)
    return terms or (), _read_merge(fields, len(terms or ()))


def parse_recipe_name(model: str, max_terms: int) -> tuple[NamedTerm, ...] | None:
    """The terms of "a+b@0.7:0.3"; None for the name of a single adapter.

    The weights are the part after the last "@" that has a ":", one for each name, in order. Without it every weight is 1. Neither
    "+" nor ":" can be part of a name; a location (with "://") is always one adapter.

    Raises:
        RequestError: Empty names, unequal counts, malformed weights.
    """
    if "+" not in model or is_location(model):
        return None
    found = _WEIGHTS.search(model)
    names = (model if found is None else model[: found.start()]).split("+")
    if len(names) > max_terms:
        raise RequestError(f"`model` names {len(names)} adapters; the limit is {max_terms}", param="model")
    if not all(_is_name(name) for name in names):
        raise RequestError(f"`model` must be names joined by +, then @ and weights. Given: {shown(model)}", param="model")
    if found is None and _LONE_WEIGHT.search(model):
        raise RequestError(
            f"`model` has {len(names)} names and 1 weight; give every adapter one, as in a+b@0.7:0.3", param="model"
        )
    texts = ["1"] * len(names) if found is None else [read_weight(text, "model") for text in found[1].split(":")]
    if len(texts) != len(names):
        raise RequestError(f"`model` has {len(names)} names and {len(texts)} weights; give every adapter one", param="model")
    return _terms(list(zip(names, texts, strict=True)), "model")


def read_weight(value: object, name: str) -> str:
    """A weight as the record spells it: a plain decimal without trailing zeros.

    Raises:
        RequestError: Not a number, beyond -100 to 100, more than 18 decimals.
    """
    try:
        number = _decimal(value)
    except InvalidOperation as error:
        raise RequestError(f"`{name}` must be a number. Given: {shown(value)}", param=name) from error
    if number is None and isinstance(value, str):
        raise RequestError(f"`{name}` must be a number in plain decimals, such as 0.25. Given: {shown(value)}", param=name)
    if number is None or not number.is_finite():
        raise RequestError(f"`{name}` must be a number. Given: {shown(value)}", param=name)
    if abs(number) > MAX_WEIGHT:
        raise RequestError(f"`{name}` must be at least -{MAX_WEIGHT} and at most {MAX_WEIGHT}. Given: {shown(value)}", param=name)
    return _plain(number, name, value)


def _decimal(value: object) -> Decimal | None:
    if isinstance(value, str):
        return Decimal(value) if _DECIMAL.fullmatch(value) else None
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return Decimal(repr(value)) if isinstance(value, float) else Decimal(value)


def _plain(number: Decimal, name: str, value: object) -> str:
    text = format(number, "f")
    text = text.rstrip("0").rstrip(".") if "." in text else text
    if len(text.partition(".")[2]) > WEIGHT_DECIMALS:
        raise RequestError(f"`{name}` must have at most {WEIGHT_DECIMALS} decimals. Given: {shown(value)}", param=name)
    return "0" if text in ("-0", "") else text


def _listed_terms(listed: list[object]) -> tuple[NamedTerm, ...]:
    found: list[tuple[str, str]] = []
    for index, item in enumerate(listed):
        if not isinstance(item, dict):
            raise RequestError(f"`adapters[{index}]` must be an object. Given: {shown(item)}", param=f"adapters[{index}]")
        entry = Fields(item, prefix=f"adapters[{index}].")
        name, other = entry.label("model", MAX_NAME_CHARS), entry.label("adapter_id", MAX_NAME_CHARS)
        if (not name and not other) or (name and other):
            raise entry.error("model", "must name the adapter (or `adapter_id` instead)")
        weight = entry.raw("weight")
        found.append((name or other or "", "1" if weight is None else read_weight(weight, entry.name("weight"))))
        unknown = entry.unknown()
        if unknown:
            raise RequestError(f"`{unknown[0]}` is not a field of an adapter; it has `model` and `weight`", param=unknown[0])
    return _terms(found, "adapters")


def _terms(pairs: list[tuple[str, str]], param: str) -> tuple[NamedTerm, ...]:
    if len({name for name, _ in pairs}) != len(pairs):
        raise RequestError(f"`{param}` must not name an adapter twice", param=param)
    if all(weight == "0" for _, weight in pairs):
        raise RequestError(f"every weight of `{param}` is 0; give one adapter a weight", param=param)
    return tuple(NamedTerm(name, weight) for name, weight in pairs)


def _is_name(name: object) -> bool:
    return isinstance(name, str) and 0 < len(name) <= MAX_NAME_CHARS and name.isprintable()


def _read_merge(fields: Fields, count: int) -> Merge | None:
    """How the terms become one. One adapter alone is never merged, whatever the strategy, as in PEFT."""
    strategy = (fields.label("merge_strategy", 32) or "linear").lower()
    if strategy not in STRATEGIES:
        raise fields.error("merge_strategy", f"must be {', '.join(STRATEGIES[:-1])} or {STRATEGIES[-1]}")
    density = fields.number("density", 0, 1)
    method = (fields.label("majority_sign_method", 32) or "total").lower()
    if method not in SIGN_METHODS:
        raise fields.error("majority_sign_method", f"must be {' or '.join(SIGN_METHODS)}")
    if strategy in PRUNING and not density:
        raise fields.error("density", f"must be above 0 and at most 1: the share of values that {strategy} keeps")
    if strategy == "linear" or count < 2:
        return None
    text = _plain(Decimal(repr(density)), fields.name("density"), density) if strategy in PRUNING else None
    return Merge(strategy, text, method if strategy in ELECTING else None)
