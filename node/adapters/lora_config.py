"""adapter_config.json as PEFT writes it, read as a closed schema: what is not understood is refused by name, never ignored.

Fields that describe how an adapter was trained are accepted and dropped. Fields that change what is computed are either
honoured here (rank, alpha, rsLoRA, patterns) or refused. An unknown field is accepted only while it is switched off (null,
false, empty), because newer versions of PEFT write all their fields.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from node.adapters.name_pattern import MAX_PATTERN_CHARACTERS, NamePattern, PatternSyntaxError, StepBudget
from node.adapters.regular_file import read_whole
from node.adapters.strict_json import parse_strict
from node.errors import AdapterInvalidError

CONFIG_FILE = "adapter_config.json"
MAX_CONFIG_BYTES = 1 << 20
MAX_NAMES = 4096
MAX_PATTERNS = 4096
MAX_ALPHA = 1e6
CODE = "adapter_config_invalid"

# Training and bookkeeping only: any value is fine, none changes what a trained adapter computes.
DESCRIPTIVE = frozenset(
    {
        *("base_model_name_or_path", "corda_config", "ephemeral_gpu_offload", "eva_config", "inference_mode"),
        *("init_lora_weights", "loftq_config", "lora_dropout", "lora_ga_config", "megatron_core"),
        *("peft_version", "qalora_group_size", "revision", "runtime_config", "task_type"),
    }
)
# Honoured here or in `binding`. fan_in_fan_out is how the base stores its weight; A and B have one layout either way.
HONOURED = frozenset(
    {
        *("alpha_pattern", "bias", "exclude_modules", "fan_in_fan_out", "layers_pattern", "layers_to_transform", "lora_alpha"),
        *("lora_bias", "peft_type", "r", "rank_pattern", "target_modules", "use_dora", "use_rslora"),
    }
)
# Would run, or ask for, code of the adapter's author; with what to do instead. PEFT itself writes auto_mapping, the class and the
# module to import, whenever task_type is missing.
CODE_FIELDS = {
    "auto_mapping": 'delete it, and set "task_type": "CAUSAL_LM" (without a task type PEFT names a class to import)',
    "trust_remote_code": "delete it",
    "custom_modules": "delete it",
    "_custom_modules": "delete it",
}
# Of the ways to initialise, those that leave the base model alone. PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA subtract something
# from the base weights, so such an adapter is right only on its own changed base (PEFT can convert it before saving).
PLAIN_INITIALISATIONS = (None, True, False, "true", "gaussian", "eva", "orthogonal")
FEATURE_NAMES = {
    "modules_to_save": "whole modules saved beside LoRA",
    "trainable_token_indices": "trained tokens",
    "alora_invocation_tokens": "activated LoRA",
    "layer_replication": "layers of the base used several times",
    "target_parameters": "LoRA on single parameters",
    "ensure_weight_tying": "one adapter on tied embeddings",
}
PEFT_TYPE_NAMES = {
    "ADALORA": "AdaLoRA",
    "ADAPTION_PROMPT": "LLaMA-Adapter",
    "IA3": "IA3",
    "LOHA": "LoHa",
    "LOKR": "LoKr",
    "PREFIX_TUNING": "prefix tuning",
    "PROMPT_TUNING": "prompt tuning",
    "P_TUNING": "p-tuning",
    "VERA": "VeRA",
    "XLORA": "X-LoRA",
}

_Value = TypeVar("_Value")


@dataclass(frozen=True, slots=True)
class LoraConfig:
    """The part of adapter_config.json that a node computes with.

    Attributes:
        rank: Rank of every module no pattern names.
        alpha: Numerator of the scale, likewise.
        target_modules: Module names or suffixes, or one regular expression.
        exclude_modules: The same, taken away again.
        use_dora: Every adapted module has a magnitude vector.
        has_lora_bias: Every adapted module adds scale * lora_B.bias.
        layers_to_transform: Layer numbers; empty: all layers. layers_pattern: what stands before the number in a module's name.
        raw: The whole parsed file, for the content hash.
    """

    rank: int
    alpha: float
    use_rslora: bool
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    target_modules: tuple[str, ...] | str
    exclude_modules: tuple[str, ...] | str
    layers_to_transform: tuple[int, ...]
    layers_pattern: tuple[str, ...]
    use_dora: bool
    has_lora_bias: bool
    raw: Mapping[str, Any]

    def scale(self, alpha: float, rank: int) -> float:
        """The factor on B A x."""
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)


@dataclass(frozen=True, slots=True)
class ModuleScale:
    """What the configuration says about one module: its rank and the factor on B A x."""

    rank: int
    scale: float


def read_lora_config(directory: Path, max_rank: int) -> LoraConfig:
    """Read `directory`/adapter_config.json.

    Args:
        directory: The adapter's own directory.
        max_rank: The node's limit on ranks.

    Raises:
        AdapterInvalidError: adapter_config_invalid, adapter_rank_unsupported, adapter_feature_unsupported, adapter_code_refused.
    """
    return parse_lora_config(read_whole(directory / CONFIG_FILE, MAX_CONFIG_BYTES, CODE), max_rank)


def parse_lora_config(content: bytes, max_rank: int) -> LoraConfig:
    """The same from the file's bytes."""
    raw = parse_strict(content, CONFIG_FILE, CODE)
    if not isinstance(raw, dict):
        raise _invalid("the file", raw, "a JSON object")
    return check_lora_config(raw, max_rank)


def check_lora_config(raw: Mapping[str, Any], max_rank: int) -> LoraConfig:
    """The same from the parsed file, or from a configuration that another format states in its own way."""
    _refuse_features(raw)
    rank_pattern = _pattern(raw, "rank_pattern")
    alpha_pattern = _pattern(raw, "alpha_pattern")
    return LoraConfig(
        rank=_rank(raw.get("r", 8), "r", max_rank),
        alpha=_alpha(raw.get("lora_alpha", 8), "lora_alpha"),
        use_rslora=_flag(raw, "use_rslora"),
        rank_pattern={name: _rank(value, f"rank_pattern[{name[:80]!r}]", max_rank) for name, value in rank_pattern.items()},
        alpha_pattern={name: _alpha(value, f"alpha_pattern[{name[:80]!r}]") for name, value in alpha_pattern.items()},
        target_modules=_names(raw, "target_modules"),
        exclude_modules=_names(raw, "exclude_modules"),
        layers_to_transform=_layers(raw.get("layers_to_transform")),
        layers_pattern=_layer_names(raw),
        use_dora=_flag(raw, "use_dora"),
        has_lora_bias=_flag(raw, "lora_bias"),
        raw=raw,
    )


class ScaleTable:
    """Rank and scale of any module, as PEFT computes them. Patterns are compiled once and share one budget of work.

    Semantics:
        r and alpha are those of the first pattern, in the file's order, that matches the module's name as
        `re.match(rf"(.*\\.)?({pattern})$", name)` would; else the file's own. scale = alpha / r, or alpha / sqrt(r) for rsLoRA.

    Raises:
        AdapterInvalidError: adapter_feature_unsupported, when a pattern uses syntax that is not understood.
    """

    def __init__(self, config: LoraConfig) -> None:
        self._config = config
        self._budget = StepBudget()
        self._ranks = [(_suffix_pattern(key, "rank_pattern"), rank) for key, rank in config.rank_pattern.items()]
        self._alphas = [(_suffix_pattern(key, "alpha_pattern"), alpha) for key, alpha in config.alpha_pattern.items()]

    def of(self, module: str) -> ModuleScale:
        """Rank and scale of `module`, for example "model.layers.3.self_attn.q_proj"."""
        rank = self._first(self._ranks, module, self._config.rank)
        alpha = self._first(self._alphas, module, self._config.alpha)
        return ModuleScale(rank, self._config.scale(alpha, rank))

    def _first(self, patterns: list[tuple[str | NamePattern, _Value]], module: str, default: _Value) -> _Value:
        for pattern, value in patterns:
            if isinstance(pattern, str):
                if _ends_with(module, pattern, self._budget):
                    return value
            elif pattern.matches_start(module, self._budget):
                return value
        return default


def compile_targets(targets: str) -> NamePattern | None:
    """`target_modules` or `exclude_modules` as one expression; None where it uses syntax that is not understood.

    Unlike the patterns of ranks, nothing is lost then: the names of the tensors say which modules were trained.
    """
    try:
        return NamePattern.compile(targets)
    except PatternSyntaxError:
        return None


def _suffix_pattern(key: str, field: str) -> str | NamePattern:
    """Plain names stay text, whose comparison is cheap: PEFT writes one for every module of a model."""
    if all(char.isalnum() or char in "_-." for char in key):
        return key
    try:
        return NamePattern.compile(rf"(.*\.)?({key})$")
    except PatternSyntaxError as error:
        raise AdapterInvalidError(
            f"{CONFIG_FILE}: {field} has the pattern {key[:80]!r}: {error}; write plain module names",
            code="adapter_feature_unsupported",
        ) from error


def _ends_with(module: str, suffix: str, budget: StepBudget) -> bool:
    """Whether `module` ends with `suffix` at a dot. As in the regular expression it is, a dot of `suffix` is any character."""
    budget.spend(1)
    start = len(module) - len(suffix)
    if start < 0 or (start > 0 and module[start - 1] != "."):
        return False
    return all(wanted in (".", found) for wanted, found in zip(suffix, module[start:], strict=True))


def _refuse_features(raw: Mapping[str, Any]) -> None:
    for field, value in raw.items():
        if field in CODE_FIELDS and not _is_off(value):
            raise AdapterInvalidError(
                f"{CONFIG_FILE} sets {field}, which asks for code to be run; {CODE_FIELDS[field]}", code="adapter_code_refused"
            )
        if field not in DESCRIPTIVE | HONOURED and not _is_off(value):
            known_as = f" ({FEATURE_NAMES[field]})" if field in FEATURE_NAMES else ""
            raise _unsupported(f"{field[:80]} = {str(value)[:80]}{known_as}")
    if raw.get("peft_type") != "LORA":
        kind = str(raw.get("peft_type"))[:40]
        known_as = f" ({PEFT_TYPE_NAMES[kind]})" if kind in PEFT_TYPE_NAMES else ""
        raise _unsupported(f"peft_type = {kind}{known_as}")
    if raw.get("bias", "none") not in ("none", None):
        raise _unsupported(f"bias = {str(raw['bias'])[:40]}")
    initialisation = raw.get("init_lora_weights")
    if initialisation not in PLAIN_INITIALISATIONS:
        raise _unsupported(f"init_lora_weights = {str(initialisation)[:40]} (it changes the base model's own weights)")
    _flag(raw, "fan_in_fan_out")


def _is_off(value: Any) -> bool:
    return value is None or value is False or value in ({}, [], "")


def _unsupported(setting: str) -> AdapterInvalidError:
    return AdapterInvalidError(
        f"{CONFIG_FILE} has {setting}; this node serves LoRA and DoRA on linear modules and the embedding",
        code="adapter_feature_unsupported",
    )


def _invalid(field: str, value: Any, allowed: str) -> AdapterInvalidError:
    return AdapterInvalidError(f"{CONFIG_FILE}: {field} is {_shown(value)}; it must be {allowed}", code=CODE)


def _shown(value: Any) -> str:
    """A short text of any value. Integers of thousands of digits have none in Python, so long ones are described."""
    if isinstance(value, int) and value.bit_length() > 128:
        return f"an integer of {value.bit_length()} bits"
    return f"{type(value).__name__} {str(value)[:80]!r}" if isinstance(value, str | dict | list) else str(value)[:80]


def _flag(raw: Mapping[str, Any], field: str) -> bool:
    value = raw.get(field)
    if value is not None and not isinstance(value, bool):
        raise _invalid(field, value, "true or false")
    return bool(value)


def _rank(value: Any, field: str, max_rank: int) -> int:
    if type(value) is not int:
        raise _invalid(field, value, "a whole number")
    if not 1 <= value <= max_rank:
        limit = "below 1" if value < 1 else f"> max {max_rank}"
        raise AdapterInvalidError(f"{CONFIG_FILE}: {field}: rank {_shown(value)} {limit}", code="adapter_rank_unsupported")
    return value


def _alpha(value: Any, field: str) -> float:
    if type(value) not in (int, float) or not 0 < value <= MAX_ALPHA:
        raise _invalid(field, value, f"a number above 0 and at most {MAX_ALPHA:.0f}")
    return float(value)


def _pattern(raw: Mapping[str, Any], field: str) -> dict[str, Any]:
    value = raw.get(field)
    if value is None:
        return {}
    if not isinstance(value, dict) or len(value) > MAX_PATTERNS:
        raise _invalid(field, value, f"an object of at most {MAX_PATTERNS} patterns")
    return value


def _names(raw: Mapping[str, Any], field: str) -> tuple[str, ...] | str:
    value = raw.get(field)
    if value is None:
        return ()
    if isinstance(value, str) and len(value) <= MAX_PATTERN_CHARACTERS:
        return value
    if not isinstance(value, list) or len(value) > MAX_NAMES or not all(isinstance(name, str) for name in value):
        raise _invalid(field, value, f"up to {MAX_NAMES} names or one expression of up to {MAX_PATTERN_CHARACTERS} characters")
    return tuple(value)


def _layer_names(raw: Mapping[str, Any]) -> tuple[str, ...]:
    stated = _names(raw, "layers_pattern")
    return (stated,) if isinstance(stated, str) and stated else tuple(stated)


def _layers(value: Any) -> tuple[int, ...]:
    layers = [value] if type(value) is int else ([] if value is None else value)
    if not isinstance(layers, list) or len(layers) > MAX_NAMES or not all(type(layer) is int for layer in layers):
        raise _invalid("layers_to_transform", value, "a layer number or a list of them")
    return tuple(layers)
