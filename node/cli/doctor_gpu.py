"""What `openlora-node doctor` says of the GPU: which one, whether the CUDA kernels are built, which attention runs and why."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from node.cli.finding import Finding
from node.config import Settings
from node.engine.sizing import step_sizes
from node.errors import NodeError
from node.kernels.attention.paged import AttentionShape
from node.kernels.attention.registry import AttentionFacts, attention_facts, choose
from node.kernels.build_cuda import cuda_library_path, nvcc
from node.models.model_config import read_spec
from node.models.source import resolve

_LEAST_CAPABILITY = (8, 0)
_DRIVER_VERSION = Path("/sys/module/nvidia/version")
_BUILD = "python -m node.kernels.build"


@dataclass(frozen=True, slots=True)
class GpuFacts:
    """One machine, as far as a GPU concerns it.

    Attributes:
        driver: Version of NVIDIA's kernel module; empty where there is none.
        torch_cuda: CUDA version that torch is built for; None for a CPU build.
        name, memory_bytes, capability: of the GPU; `name` is empty where torch sees none.
        has_kernels: the CUDA library is built from exactly these sources. has_nvcc: it could be.
        attention: what the choice of an attention backend depends on; None without a GPU.
    """

    driver: str = ""
    torch_cuda: str | None = None
    name: str = ""
    memory_bytes: int = 0
    capability: tuple[int, int] = (0, 0)
    has_kernels: bool = False
    has_nvcc: bool = False
    attention: AttentionFacts | None = None


def gpu_facts() -> GpuFacts:
    """Look at this machine."""
    driver = _DRIVER_VERSION.read_text().strip() if _DRIVER_VERSION.is_file() else ""
    if not torch.cuda.is_available():
        return GpuFacts(driver=driver, torch_cuda=torch.version.cuda)
    device = torch.device("cuda", 0)
    found = torch.cuda.get_device_properties(device)
    return GpuFacts(
        driver=driver,
        torch_cuda=torch.version.cuda,
        name=found.name,
        memory_bytes=found.total_memory,
        capability=(found.major, found.minor),
        has_kernels=cuda_library_path() is not None,
        has_nvcc=nvcc() is not None,
        attention=attention_facts(device),
    )


def gpu_findings(settings: Settings, facts: GpuFacts) -> Iterator[Finding]:
    """The GPU's part of the checks; one line where the node runs on the CPU."""
    if settings.model.device == "cpu":
        yield Finding("gpu", "ok", "not used: model.device is cpu")
        return
    device = _device(settings, facts)
    yield device
    if device.state == "fail" or facts.attention is None or facts.capability < _LEAST_CAPABILITY:
        return
    kernels = _cuda_kernels(settings, facts)
    yield kernels
    if kernels.state == "ok":
        yield _attention(settings, facts.attention)


def _device(settings: Settings, facts: GpuFacts) -> Finding:
    is_required = settings.model.device == "cuda"
    if not facts.name:
        if not facts.driver:
            return Finding("gpu", "fail" if is_required else "ok", "none; the node runs on the CPU", _use_cpu(is_required))
        if facts.torch_cuda is None:
            detail = f"driver {facts.driver}, but this torch is built without CUDA"
            return Finding("gpu", "fail" if is_required else "warn", detail, "install a CUDA build of torch")
        detail = f"driver {facts.driver}, but torch (CUDA {facts.torch_cuda}) sees no GPU"
        return Finding(
            "gpu", "fail" if is_required else "warn", detail, "see what nvidia-smi says; CUDA_VISIBLE_DEVICES may hide it"
        )
    major, minor = facts.capability
    detail = (
        f"{facts.name}, {facts.memory_bytes / (1 << 30):.0f} GiB, capability {major}.{minor}, driver {facts.driver or 'unknown'}"
    )
    if facts.capability < _LEAST_CAPABILITY:
        return Finding("gpu", "fail" if is_required else "warn", f"{detail}: older than 8.0, not used", _use_cpu(is_required))
    return Finding("gpu", "ok", f"{detail}, CUDA {facts.torch_cuda}")


def _use_cpu(is_required: bool) -> str:
    return 'set model.device = "cpu" or "auto"' if is_required else ""


def _cuda_kernels(settings: Settings, facts: GpuFacts) -> Finding:
    """As `node.engine.device.open_kernels` decides: without the library "auto" runs plain torch, and "cpp" refuses."""
    if settings.engine.kernels == "reference":
        return Finding(
            "cuda kernels",
            "warn",
            "not used: engine.kernels names the torch reference, many times slower",
            'engine.kernels = "auto"',
        )
    if facts.has_kernels:
        return Finding("cuda kernels", "ok", "built")
    remedy = _BUILD if facts.has_nvcc else f"install the CUDA toolkit (nvcc on the PATH), then: {_BUILD}"
    if settings.engine.kernels == "cpp":
        return Finding("cuda kernels", "fail", 'not built, and engine.kernels is "cpp"', remedy)
    return Finding("cuda kernels", "warn", "not built: plain torch runs on the GPU, many times slower", remedy)


def _attention(settings: Settings, facts: AttentionFacts) -> Finding:
    try:
        shape = _shape(settings)
    except NodeError:  # the check of the model says why
        return Finding("attention", "warn", "not known before the model is there", "set model.path")
    try:
        choice = choose(settings.engine.attention, shape, facts, is_deterministic=settings.engine.deterministic)
    except NodeError as error:
        return Finding("attention", "fail", error.message, 'engine.attention = "auto"')
    detail = f"{choice.name} ({choice.reason})"
    if choice.faster:
        return Finding("attention", "warn", detail, f"faster here: {choice.faster}")
    return Finding("attention", "ok", detail)


def _shape(settings: Settings) -> AttentionShape:
    """The configured model's attention; reads its configuration, no weights.

    Raises:
        ModelLoadError: there is no such model.
    """
    spec = read_spec(resolve(settings.model.path, settings.model.revision), settings.model.max_model_len)
    sizes = step_sizes(settings.engine, settings.adapters, "cuda")
    return AttentionShape(
        heads=spec.head_count,
        groups=spec.kv_head_count,
        head_dim=spec.head_dim,
        block_size=sizes.kv_block_size,
        dtype=torch.float32 if settings.model.dtype == "float32" else torch.bfloat16,
        scale=spec.head_dim**-0.5,
        max_batch=sizes.max_sequences,
        max_context=spec.max_model_len,
        windows=tuple(set(spec.windows)),
    )
