"""Which adapters a request of OpenAI's shape names, in whichever of the customary fields.

`model` alone is OpenAI's way; `adapters` and a recipe in `model` are ours; `merged_adapters` and `adapter_id` are LoRAX's,
`lora_path` is SGLang's. All are read: a field that names an adapter and is passed over would be answered by the base model.
"""

from __future__ import annotations

from dataclasses import dataclass

from attribution.record import Merge
from node.api.fields import Fields
from node.api.generation import Limits, NamedTerm
from node.api.merge_fields import MAX_NAME_CHARS, read_adapters, read_merged_adapters
from node.errors import RequestError

SINGLE = ("adapter_id", "lora_path")


@dataclass(frozen=True, slots=True)
class Named:
    """The adapters by name. `is_listed`: another field than `model` names them, so `model` can only be the base."""

    terms: tuple[NamedTerm, ...]
    merge: Merge | None = None
    is_listed: bool = False


def read_named(fields: Fields, model: str, limits: Limits) -> Named:
    """The adapters of a chat, completion or embedding request.

    Raises:
        RequestError: Two fields name adapters, or see `node.api.merge_fields`.
    """
    given = [key for key in ("adapters", "merged_adapters", *SINGLE) if fields.raw(key) not in (None, "")]
    if len(given) > 1:
        raise RequestError(f"`{given[0]}` and `{given[1]}` both name adapters; use one of them", param=given[1])
    if given and given[0] in SINGLE:
        return _single(fields.label(given[0], MAX_NAME_CHARS) or "", model)
    is_lorax = given == ["merged_adapters"]
    merged = read_merged_adapters(fields, limits) if is_lorax else read_adapters(fields, model, limits)
    if merged is not None:
        return Named(*merged, is_listed=bool(given))
    return Named((NamedTerm(model),) if model else ())


def _single(name: str, model: str) -> Named:
    return Named((NamedTerm(name),), is_listed=name != model)
