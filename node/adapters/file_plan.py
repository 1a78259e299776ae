"""What the header and the configuration of an adapter say, in the form that loading needs: where each tensor goes, and how the
content hash is put together.

Both are pure functions of two small pieces of bytes, and most adapters of a base differ in neither, or only in their alpha and in
what describes them. So plans are shared: the first adapter of a shape takes about 7 ms of Python (448 tensors), which delays the
step loop by holding the interpreter lock; the next one takes 0.1 ms, a read and a hash of 60 kB, and with another alpha 0.6 ms.
"""

from __future__ import annotations

import hashlib
import math
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from attribution import canonical, identity
from node.adapters.binding import Binding, BoundModule, LinearTable, bind
from node.adapters.formats.layout import locate
from node.adapters.formats.opening import open_adapter
from node.adapters.lora_config import LoraConfig, parse_lora_config
from node.adapters.plan_keys import plan_keys
from node.adapters.safetensors_file import TensorEntry
from node.adapters.side import side_bytes
from node.errors import AdapterChangedError
from node.kernels.layout import PageLayout

REMEMBERED_PLANS = 64  # of different shapes; one takes about 200 kB
SIDE_ITEM_BYTES = 4  # of a number beside the pages, at most
DTYPE_CODES = {"F32": 0, "F16": 1, "BF16": 2}
# Equal to `OpenloraTensor` and `OpenloraPlacement` in csrc/adapters/reader.h.
TENSOR_RECORD = np.dtype(
    [
        *((name, np.int64) for name in ("file_offset", "rows", "columns", "first_placement")),
        *((name, np.int32) for name in ("placement_count", "dtype")),
    ]
)
PLACEMENT_RECORD = np.dtype([(name, np.int64) for name in ("page_offset", "first_row", "row_count", "is_transposed")])


@dataclass(frozen=True, slots=True)
class FilePlan:
    """Everything about an adapter but its weights.

    Attributes:
        binding: What each tensor is.
        is_plain: A safetensors file whose pages say everything; such files are read by their tables, below.
        rank: The largest rank of a linear module; it decides the number of pages.
        extent: Elements of a page up to the end of the last module it touches; nothing behind is ever read.
        side_bytes: What it takes beside its pages, on the same device (see `side`); 0 when plain.
        tensors: [tensors] TENSOR_RECORD in file order: places in the file, and which placements are theirs.
        placements: [placements] PLACEMENT_RECORD. Where rows of a tensor go inside the pages.
        module_indices: [modules] int64. Row of each bound module in the rank and scale tables.
        ranks: [modules] int32. scales: [modules] float32.
        hash_parts: Canonical JSON around the tensors' roots; hash_order: the file's tensors in the order of those gaps.
        head_bytes: How much of the first part is the configuration's.
    """

    binding: Binding
    is_plain: bool
    rank: int
    extent: int
    side_bytes: int
    tensors: npt.NDArray[Any]
    placements: npt.NDArray[Any]
    module_indices: npt.NDArray[np.int64]
    ranks: npt.NDArray[np.int32]
    scales: npt.NDArray[np.float32]
    hash_parts: tuple[bytes, ...]
    hash_order: tuple[int, ...]
    head_bytes: int = 0

    def adapter_id(self, roots: Sequence[str]) -> str:
        """The content hash (`attribution.identity.adapter_id`) of tensors with these roots, 64 hex digits each, in file order."""
        state = hashlib.sha256(self.hash_parts[0])
        for index, part in zip(self.hash_order, self.hash_parts[1:], strict=True):
            state.update(roots[index].encode("ascii"))
            state.update(part)
        return state.hexdigest()


class FilePlans:
    """Reads plans, and remembers them by the very bytes they were made of. Safe to use from several threads.

    Args:
        layout: The model's pages. table: the model's linear modules.
        max_rank: Limit on ranks. max_bytes: limit on an adapter's file.
    """

    def __init__(self, layout: PageLayout, table: LinearTable, *, max_rank: int, max_bytes: int) -> None:
        self._layout = layout
        self._table = table
        self._max_rank = max_rank
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._plans: OrderedDict[bytes, FilePlan] = OrderedDict()  # by the very bytes
        self._shapes: OrderedDict[bytes, FilePlan] = OrderedDict()  # by what decides all but the scales

    def read(self, directory: Path) -> FilePlan:
        """The plan of the adapter in `directory`.

        Raises:
            AdapterInvalidError: As `open_adapter` and `bind` say.
            AdapterChangedError: The files were replaced meanwhile.
        """
        files = locate(directory)
        keys = plan_keys(files, self._max_bytes)
        known = None if keys is None else self._known(self._plans, keys.exact)
        if known is not None:
            return known
        like = None if keys is None or not keys.shape else self._known(self._shapes, keys.shape)
        if keys is not None and like is not None:
            plan = _rescaled(like, parse_lora_config(keys.config, self._max_rank))
        else:
            plan = self._parse(directory, files.is_gguf)
        if keys is not None:
            if plan_keys(files, self._max_bytes) != keys:
                raise AdapterChangedError("the adapter's files changed while they were read; ask again")
            self._remember(self._plans, keys.exact, plan)
            if plan.is_plain and keys.shape:
                self._remember(self._shapes, keys.shape, plan)
        return plan

    def _known(self, plans: OrderedDict[bytes, FilePlan], key: bytes) -> FilePlan | None:
        with self._lock:
            if key in plans:
                plans.move_to_end(key)
            return plans.get(key)

    def _remember(self, plans: OrderedDict[bytes, FilePlan], key: bytes, plan: FilePlan) -> None:
        with self._lock:
            plans[key] = plan
            while len(plans) > REMEMBERED_PLANS:
                plans.popitem(last=False)

    def _parse(self, directory: Path, is_gguf: bool) -> FilePlan:
        with open_adapter(directory, self._table.shapes, max_rank=self._max_rank, max_bytes=self._max_bytes) as opened:
            entries = list(opened.file.entries.values())
            binding = bind(opened.file.entries, opened.config, self._table)
        modules = binding.modules
        tensors, placements = _records(entries, modules, self._layout)
        parts, order = _hash_frame(entries, opened.config)
        needs_side = bool(binding.copies) or binding.embedding is not None or any(module.needs_side for module in modules)
        return FilePlan(
            binding=binding,
            is_plain=not is_gguf and not needs_side,
            rank=binding.page_rank_needed,
            extent=max((_end(self._layout, module.name) for module in modules), default=0),
            side_bytes=side_bytes(binding, SIDE_ITEM_BYTES),
            tensors=tensors,
            placements=placements,
            module_indices=np.array([self._layout.spans[module.name].index for module in modules], np.int64),
            ranks=np.array([module.rank for module in modules], np.int32),
            scales=np.array([module.scale for module in modules], np.float32),
            hash_parts=parts,
            hash_order=order,
            head_bytes=len(_hash_head(opened.config)),
        )


def _rescaled(plan: FilePlan, config: LoraConfig) -> FilePlan:
    """The plan of an adapter that differs from a plain one without patterns of alphas in its alpha alone."""
    modules = tuple(replace(module, scale=config.scale(config.alpha, module.rank)) for module in plan.binding.modules)
    head = _hash_head(config)
    return replace(
        plan,
        binding=replace(plan.binding, modules=modules),
        scales=np.array([module.scale for module in modules], np.float32),
        hash_parts=(head + plan.hash_parts[0][plan.head_bytes :], *plan.hash_parts[1:]),
        head_bytes=len(head),
    )


def _end(layout: PageLayout, name: str) -> int:
    span = layout.spans[name]
    return span.b_offset + layout.page_rank * span.out_features


def _records(
    entries: Sequence[TensorEntry], modules: Sequence[BoundModule], layout: PageLayout
) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """The tensors in file order, and their placements side by side in the same order."""
    places: dict[str, list[tuple[int, int, int, int]]] = {}
    for module in modules:
        span = layout.spans[module.name]
        places.setdefault(module.a_tensor, []).append((span.a_offset, 0, module.rank, 0))
        # Pages are rank-major; the file has B as [out_features, rank].
        places.setdefault(module.b_tensor, []).append((span.b_offset, module.first_row, module.out_features, 1))
    tensors: list[tuple[int, ...]] = []
    placements: list[tuple[int, ...]] = []
    for entry in entries:
        rows, columns = entry.shape if entry.name in places else (1, math.prod(entry.shape))
        own = places.get(entry.name, [])
        tensors.append((entry.offset, rows, columns, len(placements), len(own), DTYPE_CODES[entry.dtype]))
        placements.extend(own)
    return np.array(tensors, TENSOR_RECORD), np.array(placements, PLACEMENT_RECORD)


def _hash_frame(entries: Sequence[TensorEntry], config: LoraConfig) -> tuple[tuple[bytes, ...], tuple[int, ...]]:
    """The canonical JSON that `attribution.identity.adapter_id` hashes, cut open where the roots of the tensors stand."""
    names = [identity.normal_name(entry.name) for entry in entries]
    order = sorted(range(len(entries)), key=names.__getitem__)
    described = [[names[index], entries[index].dtype, list(entries[index].shape), "\x00"] for index in order]
    # Inside a name a quotation mark is escaped, so this cut occurs at the end of a description only.
    first, *others = canonical.dumps(described).split(b'\\u0000"]')
    parts = [_hash_head(config) + b',"tensors":' + first, *(b'"]' + other for other in others)]
    parts[-1] += b"}"
    return tuple(parts), tuple(order)


def _hash_head(config: LoraConfig) -> bytes:
    """The hashed JSON's beginning, up to where the tensors follow."""
    return canonical.dumps({"schema": identity.ADAPTER_SCHEMA, "config": identity.arithmetic_config(config.raw)})[:-1]
