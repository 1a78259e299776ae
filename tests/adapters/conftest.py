"""A tiny base model and a writer of adapters, good and bad."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from node.adapters.catalog import AdapterCatalog
from node.adapters.fetching.door import FetchedAdapter
from node.adapters.fetching.work import FetchWork
from node.adapters.sources.web import resolve_host
from node.adapters.staging import Progress
from node.adapters.verify import VerifiedAdapter
from node.config import AdapterSettings, Settings
from node.request import LinearShape

BASE_ID = "ab" * 32
LAYERS = 2
SHAPES = {"self_attn.q_proj": (8, 8), "self_attn.v_proj": (8, 4), "mlp.down_proj": (16, 8)}
ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2, "I8": 1, "I64": 8, "F64": 8, "F8_E4M3": 1}

Tensors = dict[str, tuple[str, list[int], bytes]]


class Clock:
    """Monotonic seconds that move only when told."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


class AdapterWriter:
    """Writes PEFT adapters for the tiny base below a directory."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def tensors(self, rank: int = 2, dtype: str = "F32", seed: int = 0, layers: int = LAYERS) -> Tensors:
        generator = np.random.default_rng(seed)
        result: Tensors = {}
        for layer in range(layers):
            for module, (inputs, outputs) in SHAPES.items():
                for side, shape in (("A", (rank, inputs)), ("B", (outputs, rank))):
                    values = generator.standard_normal(shape).astype(np.float32)
                    name = f"base_model.model.model.layers.{layer}.{module}.lora_{side}.weight"
                    result[name] = (dtype, list(shape), _encode(values, dtype))
        return result

    def config(self, **changes: Any) -> dict[str, Any]:
        return {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "r": 2,
            "lora_alpha": 4,
            "target_modules": ["q_proj", "v_proj", "down_proj"],
            "bias": "none",
            "auto_mapping": None,
        } | changes

    def write(self, name: str, tensors: Tensors | None = None, **config: Any) -> Path:
        directory = self.root / name
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "adapter_config.json").write_text(json.dumps(self.config(**config)))
        (directory / "adapter_model.safetensors").write_bytes(encode_file(self.tensors() if tensors is None else tensors))
        return directory


def encode_file(tensors: Tensors, changes: dict[str, dict[str, Any]] | None = None) -> bytes:
    """A safetensors file; `changes` overrides fields of single header entries."""
    header: dict[str, Any] = {}
    data = b""
    for name, (dtype, shape, raw) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(raw)]}
        header[name] |= (changes or {}).get(name, {})
        data += raw
    return encode_raw(json.dumps(header).encode(), data)


def encode_raw(header: bytes, data: bytes = b"") -> bytes:
    """Length, header, data: whatever they say."""
    return len(header).to_bytes(8, "little") + header + data


def _encode(values: np.ndarray, dtype: str) -> bytes:
    if dtype == "BF16":
        return (values.view(np.uint32) >> 16).astype(np.uint16).tobytes()
    return values.astype({"F32": np.float32, "F16": np.float16}[dtype]).tobytes()


class ThreadFetcher:
    """The fetching process's work on threads of this one, so that a test can hold it up and look inside."""

    def __init__(self, work: FetchWork) -> None:
        self._work = work

    async def resolve(self, source: str, name: str, token: str | None, *, is_known: bool = False) -> FetchedAdapter:
        return await asyncio.to_thread(self._work.resolve, source, name, token)

    async def verify(self, directory: Path) -> VerifiedAdapter:
        return await asyncio.to_thread(self._work.verify, directory)

    async def progress(self) -> tuple[Progress, ...]:
        return self._work.progress()


@pytest.fixture
def linears() -> tuple[LinearShape, ...]:
    return tuple(LinearShape(f"model.layers.{{layer}}.{name}", *shape, LAYERS) for name, shape in SHAPES.items())


@pytest.fixture
def writer(tmp_path: Path) -> AdapterWriter:
    (tmp_path / "adapters").mkdir()
    return AdapterWriter(tmp_path / "adapters")


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def make_catalog(
    tmp_path: Path, writer: AdapterWriter, linears: tuple[LinearShape, ...], clock: Clock
) -> Callable[..., AdapterCatalog]:
    def make(*, endpoint: str | None = None, resolve: Any = resolve_host, names: Any = None, **changes: Any) -> AdapterCatalog:
        adapters = AdapterSettings(directory=writer.root, **({"allow_hub": False, "max_rank": 64} | changes))
        settings = Settings(data_dir=tmp_path / "data", adapters=adapters)
        work = FetchWork(settings, linears, BASE_ID, hub_endpoint=endpoint, resolve_host=resolve)
        return AdapterCatalog(settings, ThreadFetcher(work), clock, names=names)

    return make


@pytest.fixture
async def catalog(make_catalog: Callable[..., AdapterCatalog]) -> AsyncIterator[AdapterCatalog]:
    made = make_catalog()
    yield made
    await made.close()


@pytest.fixture
def base_id() -> str:
    return BASE_ID


@pytest.fixture
def encode() -> Callable[..., bytes]:
    return encode_file


@pytest.fixture
def encode_header() -> Callable[..., bytes]:
    return encode_raw
