"""Which attention backend this machine runs, and why."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal

import torch

from node.errors import ConfigError
from node.kernels.attention.paged import AttentionShape, PagedAttention
from node.kernels.build_cuda import cuda_library_path

BackendName = Literal["native", "fa3", "fa2", "varlen", "triton"]
Setting = Literal["auto", "native", "fa3", "fa2", "varlen", "triton"]

DECODE_ORDER: tuple[BackendName, ...] = ("native", "fa3", "fa2", "varlen", "triton")
PREFILL_ORDER = DECODE_ORDER[1:]  # native leaves long prompts to another
_NO_FA3 = "flash-attn 3 is not installed"
_NO_FA3_HINT = "flash-attn 3 (module flash_attn_interface; PyPI tokenspeed-fa3), for prompts"


@dataclass(frozen=True, slots=True)
class AttentionFacts:
    """What the choice depends on, apart from the model.

    Attributes:
        capability: of the GPU, (9, 0) for an H100.
        has_native: the CUDA library of these sources is built.
        has_fa3, has_fa2, has_triton: whether the module can be found. has_varlen: torch's varlen attention takes block tables.
    """

    capability: tuple[int, int]
    has_native: bool
    has_fa3: bool
    has_fa2: bool
    has_varlen: bool
    has_triton: bool


@dataclass(frozen=True, slots=True)
class Choice:
    """Backends of decode and of prefill, why they and not earlier ones of the order, and what would be faster (or nothing)."""

    decode: BackendName
    prefill: BackendName
    reason: str
    faster: str = ""

    @property
    def name(self) -> str:
        return self.decode if self.decode == self.prefill else f"{self.decode}+{self.prefill}"


def attention_facts(device: torch.device) -> AttentionFacts:
    """Look at this machine. Imports nothing heavy: modules are only looked for."""
    return AttentionFacts(
        capability=torch.cuda.get_device_capability(device),
        has_native=cuda_library_path() is not None,
        has_fa3=find_spec("flash_attn_interface") is not None and find_spec("flash_attn_3") is not None,
        has_fa2=find_spec("flash_attn") is not None,
        has_varlen=_torch_version() >= (2, 12),
        has_triton=find_spec("triton") is not None,
    )


def _torch_version() -> tuple[int, int]:
    major, minor = torch.__version__.split(".")[:2]
    return int(major), int(minor)


def refusal(name: BackendName, shape: AttentionShape, facts: AttentionFacts, *, is_deterministic: bool) -> str:
    """Why a backend cannot run this model here; empty when it can."""
    if name == "triton":
        return "" if facts.has_triton else "the module triton is not installed"
    if is_deterministic:
        return "its splits depend on the batch"
    if shape.dtype == torch.float32:
        return "it has no float32"
    return _LIMITS[name](shape, facts)


def _refuse_native(shape: AttentionShape, facts: AttentionFacts) -> str:
    if not facts.has_native:
        return "the CUDA kernels are not built"
    if not facts.has_triton:
        return "its plan is made with triton, which is not installed"
    if shape.dtype != torch.bfloat16:
        return "it has bfloat16 only"
    if shape.head_dim not in (64, 128):
        return f"it has head sizes 64 and 128, not {shape.head_dim}"
    if shape.heads_per_group > 16:
        return f"it has up to 16 query heads a key/value head, not {shape.heads_per_group}"
    if shape.block_size < 16 or shape.block_size & (shape.block_size - 1):
        return f"its cache blocks are powers of two from 16 on, engine.kv_block_size is {shape.block_size}"
    return ""


def _refuse_fa3(shape: AttentionShape, facts: AttentionFacts) -> str:
    if facts.capability[0] != 9:
        return f"it needs a Hopper GPU, this one has capability {facts.capability[0]}.{facts.capability[1]}"
    if not facts.has_fa3:
        return _NO_FA3
    if shape.block_size % 128 == 0:
        # Whole blocks by bulk copies: values of tokens not yet written, times 0, and NaN stays NaN (seen on an H100).
        return f"in blocks of {shape.block_size} tokens it reads what was never written; 64 is as fast"
    return "" if shape.head_dim <= 256 else f"head size {shape.head_dim} is above its 256"


def _refuse_fa2(shape: AttentionShape, facts: AttentionFacts) -> str:
    if not facts.has_fa2:
        return "flash-attn 2 is not installed"
    if facts.capability[0] < 8:
        return f"it needs capability 8.0, this GPU has {facts.capability[0]}.{facts.capability[1]}"
    if shape.block_size % 256:
        return f"its cache blocks are multiples of 256 tokens, engine.kv_block_size is {shape.block_size}"
    return "" if shape.head_dim <= 256 else f"head size {shape.head_dim} is above its 256"


def _refuse_varlen(shape: AttentionShape, facts: AttentionFacts) -> str:
    if not facts.has_varlen:
        return "torch's varlen attention takes block tables from torch 2.12 on"
    if shape.block_size % 256:
        return f"its cache blocks are multiples of 256 tokens, engine.kv_block_size is {shape.block_size}"
    return "" if shape.head_dim <= 256 else f"head size {shape.head_dim} is above its 256"


_LIMITS: dict[BackendName, Callable[[AttentionShape, AttentionFacts], str]] = {
    "native": _refuse_native,
    "fa3": _refuse_fa3,
    "fa2": _refuse_fa2,
    "varlen": _refuse_varlen,
}


def choose(setting: Setting, shape: AttentionShape, facts: AttentionFacts, *, is_deterministic: bool = False) -> Choice:
    """Take the first backend of each order that can run here, or the one that the setting names.

    Raises:
        ConfigError: the setting names one that cannot, or none can.
    """
    refusals = {name: refusal(name, shape, facts, is_deterministic=is_deterministic) for name in DECODE_ORDER}
    if setting != "auto" and refusals[setting]:
        raise ConfigError(f"engine.attention = {setting!r} cannot run: {refusals[setting]}. Use 'auto'.")
    if setting != "auto" and setting != "native":
        return Choice(setting, setting, "engine.attention names it")
    decode = _first(DECODE_ORDER, refusals)
    prefill = _first(PREFILL_ORDER, refusals)
    passed = [name for name in DECODE_ORDER[: DECODE_ORDER.index(prefill)] if refusals[name]]
    reason = "; ".join(f"{name}: {refusals[name]}" for name in passed) or "the fastest on this GPU"
    return Choice(decode, prefill, reason, _NO_FA3_HINT if refusals["fa3"] == _NO_FA3 else "")


def _first(order: tuple[BackendName, ...], refusals: dict[BackendName, str]) -> BackendName:
    for name in order:
        if not refusals[name]:
            return name
    raise ConfigError("No attention backend can run on this GPU: " + "; ".join(f"{n}: {r}" for n, r in refusals.items()) + ".")


def open_attention(
    setting: Setting, shape: AttentionShape, device: torch.device, *, is_deterministic: bool = False
) -> tuple[PagedAttention, Choice]:
    """Choose and make the backend of this process. See `choose`."""
    choice = choose(setting, shape, attention_facts(device), is_deterministic=is_deterministic)
    prefill = _make(choice.prefill, shape, device, is_deterministic)
    if choice.decode != "native":
        return prefill, choice
    from node.kernels.attention.native import NativeAttention

    return NativeAttention(shape, device, prefill), choice


def _make(name: BackendName, shape: AttentionShape, device: torch.device, is_deterministic: bool) -> PagedAttention:
    """Import a backend's module only where it runs: each needs a package of its own.

    Raises:
        ConfigError: the package is there and cannot be imported, as when it was built for another torch.
    """
    kind: type[PagedAttention]
    try:
        if name == "fa3":
            from node.kernels.attention.fa3 import Fa3Attention as kind  # noqa: N813
        elif name == "fa2":
            from node.kernels.attention.fa2 import Fa2Attention as kind  # noqa: N813
        elif name == "varlen":
            from node.kernels.attention.varlen import VarlenAttention as kind  # noqa: N813
        else:
            from node.kernels.attention.triton_backend import TritonAttention as kind  # noqa: N813
    except ImportError as error:
        raise ConfigError(
            f"The attention backend {name!r} is installed and cannot be imported under torch {torch.__version__}: it may be "
            f"built for another. Install a build for this torch, or set engine.attention to another backend, such as 'triton'."
        ) from error
    return kind(shape, device, is_deterministic=is_deterministic)
