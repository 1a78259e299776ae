"""The compiled reader against numpy's, bit for bit, and against the hash of the API process."""

import ctypes
import hashlib
import json
import os

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from attribution.treehash import tree_hash
from node.adapters.binding import LinearTable
from node.adapters.file_plan import FilePlans
from node.adapters.page_filler import PageFiller
from node.adapters.page_reader import PageReader
from node.adapters.verify import AdapterVerifier
from node.errors import AdapterChangedError, AdapterInvalidError
from node.kernels.build import build
from node.kernels.layout import PageLayout
from node.request import LinearShape

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
MAX_BYTES = 1 << 26


@pytest.fixture(scope="module")
def library():
    return build()


class Base:
    """A base of q, k, v and down projections, and adapters for it."""

    def __init__(self, hidden=24, small=10, wide=40, page_rank=8, layers=2):
        names = {"self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (hidden, small), "self_attn.v_proj": (hidden, small)}
        names["mlp.down_proj"] = (wide, hidden)
        self.linears = tuple(LinearShape(f"model.layers.{{layer}}.{name}", *shape, layers) for name, shape in names.items())
        self.table = LinearTable(self.linears)
        shapes = self.table.shapes.items()
        self.layout = PageLayout([(name, shape.in_features, shape.out_features) for name, shape in shapes], page_rank)
        self.plans = FilePlans(self.layout, self.table, max_rank=256, max_bytes=MAX_BYTES)
        self.filler = PageFiller(self.layout, self.table, max_rank=256, max_bytes=MAX_BYTES)

    def write(self, directory, rank, dtype=torch.bfloat16, is_fused=False, seed=0, **config):
        generator = torch.Generator().manual_seed(seed)
        modules = {name: (shape.in_features, shape.out_features) for name, shape in self.table.shapes.items()}
        if is_fused:
            modules = {name: sizes for name, sizes in modules.items() if "self_attn" not in name}
            for name in self.table.names():
                if name.endswith("qkv_proj"):
                    modules[name] = self.table.features(name)
        tensors = {}
        for name, (inputs, outputs) in modules.items():
            for side, shape in (("A", (rank, inputs)), ("B", (outputs, rank))):
                values = torch.randn(shape, generator=generator).to(dtype)
                tensors[f"base_model.model.{name}.lora_{side}.weight"] = values.contiguous()
        directory.mkdir(parents=True, exist_ok=True)
        save_file(tensors, directory / "adapter_model.safetensors")
        targets = sorted({name.rpartition(".")[2] for name in modules})
        settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": 7, "target_modules": targets}
        (directory / "adapter_config.json").write_text(json.dumps({**settings, "bias": "none", **config}))
        return directory

    def pages(self, plan, dtype, fill):
        number = np.float32 if dtype == torch.float32 else np.uint16
        count = self.layout.pages_for_rank(plan.rank)
        return [np.full(self.layout.page_elements, fill, number) for _ in range(count)]

    def verified_id(self, directory):
        return AdapterVerifier(self.table, "b" * 64, max_rank=256, max_bytes=MAX_BYTES).verify(directory).adapter_id


def assert_same(base, library, directory, page_dtype, thread_count=2):
    """All ways into poisoned pages: the same bits where the adapter has numbers, untouched elsewhere, one hash."""
    plan = base.plans.read(directory)
    reader = PageReader(library, base.layout, thread_count=thread_count, urgent_count=thread_count + 1, max_bytes=MAX_BYTES)
    ours, theirs, placed = (base.pages(plan, page_dtype, 77) for _ in range(3))
    kept = []
    roots = reader.place_then_hash(directory, plan, placed, lambda: kept.append([page.copy() for page in placed]))
    assert len(kept) == 1
    assert reader.can_place(plan)
    found = plan.adapter_id(reader.read(directory, plan, ours))
    assert plan.adapter_id(roots) == found
    for page, early, our in zip(placed, kept[0], ours, strict=True):
        assert np.array_equal(page.view(np.uint8), our.view(np.uint8))
        assert np.array_equal(early.view(np.uint8), our.view(np.uint8))
    expected, _ = base.filler.fill(directory, plan.binding, theirs)
    assert found == expected == base.verified_id(directory)
    for our, their in zip(ours, theirs, strict=True):
        assert np.array_equal(our.view(np.uint8), their.view(np.uint8))
    assert any(np.any(page != 77) for page in ours)


@pytest.mark.parametrize("page_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [1, 3, 8, 20])
def test_pages_equal_numpys(library, tmp_path, rank, dtype, page_dtype):
    base = Base()
    assert_same(base, library, base.write(tmp_path / "a", rank, DTYPES[dtype]), page_dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_tensors_of_several_leaves_equal_numpys(library, tmp_path, dtype):
    base = Base(hidden=72, small=16, wide=9001, page_rank=16, layers=1)
    assert_same(base, library, base.write(tmp_path / "a", 65, DTYPES[dtype]), torch.bfloat16, thread_count=4)


def test_fused_modules_are_placed_in_each_of_their_parts(library, tmp_path):
    base = Base()
    assert_same(base, library, base.write(tmp_path / "a", 11, is_fused=True), torch.bfloat16)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    hidden=st.integers(1, 40),
    small=st.integers(1, 40),
    wide=st.integers(1, 300),
    rank=st.integers(1, 40),
    page_rank=st.sampled_from([1, 3, 4, 8, 16]),
    dtype=st.sampled_from(sorted(DTYPES)),
    threads=st.integers(1, 4),
)
def test_any_shape_equals_numpys(library, tmp_path, hidden, small, wide, rank, page_rank, dtype, threads):
    base = Base(hidden, small, wide, page_rank, layers=1)
    directory = base.write(tmp_path / "a", rank, DTYPES[dtype], seed=rank)
    assert_same(base, library, directory, torch.bfloat16, threads)


def test_half_precision_converts_every_number_as_numpy_does(library, tmp_path):
    bits = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.float16)
    finite = torch.where(torch.isfinite(bits), bits, torch.zeros_like(bits))
    base = Base(hidden=256, small=256, wide=256, page_rank=16, layers=1)
    directory = base.write(tmp_path / "a", 256, torch.float16)
    name = "base_model.model.model.layers.0.self_attn.k_proj.lora_A.weight"
    from safetensors.torch import load_file

    save_file(
        {**load_file(directory / "adapter_model.safetensors"), name: finite.view(256, 256)},
        directory / "adapter_model.safetensors",
    )
    for page_dtype in (torch.float32, torch.bfloat16):
        assert_same(base, library, directory, page_dtype)


def test_changed_byte_changes_the_hash(library, tmp_path):
    base = Base()
    directory = base.write(tmp_path / "a", 4)
    plan, before = base.plans.read(directory), base.verified_id(directory)
    reader = PageReader(library, base.layout, thread_count=1, max_bytes=MAX_BYTES)
    with (directory / "adapter_model.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)[0]
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last ^ 1]))
    assert plan.adapter_id(reader.read(directory, plan, base.pages(plan, torch.bfloat16, 0))) != before


def test_file_that_became_shorter_is_an_error_of_the_adapter(library, tmp_path):
    base = Base()
    directory = base.write(tmp_path / "a", 4)
    plan = base.plans.read(directory)
    os.truncate(directory / "adapter_model.safetensors", 2000)
    reader = PageReader(library, base.layout, thread_count=2, max_bytes=MAX_BYTES)
    pages, placed = base.pages(plan, torch.bfloat16, 0), []
    for read in (reader.read, lambda *where: reader.place_then_hash(*where, lambda: placed.append(1))):
        with pytest.raises(AdapterChangedError, match="shorter"):
            read(directory, plan, pages)
    assert not placed


def test_bytes_are_hashed_as_they_were_placed(library, tmp_path):
    base = Base(hidden=256)
    directory = base.write(tmp_path / "a", 40)
    plan, before = base.plans.read(directory), base.verified_id(directory)
    reader = PageReader(library, base.layout, thread_count=2, max_bytes=MAX_BYTES)
    pages = base.pages(plan, torch.bfloat16, 0)
    weights = directory / "adapter_model.safetensors"
    replaced = bytes(weights.stat().st_size)
    assert plan.adapter_id(reader.place_then_hash(directory, plan, pages, lambda: weights.write_bytes(replaced))) == before
    assert plan.adapter_id(reader.place_then_hash(directory, plan, pages, lambda: None)) != before


def test_adapter_too_large_to_be_kept_is_read_in_one_pass(library, tmp_path, monkeypatch):
    base = Base()
    plan = base.plans.read(base.write(tmp_path / "a", 4))
    reader = PageReader(library, base.layout, thread_count=1, max_bytes=MAX_BYTES)
    byte_count = sum(int(record["rows"] * record["columns"]) * 2 for record in plan.tensors)
    monkeypatch.setattr("node.adapters.page_reader.KEPT_BYTES", byte_count)
    assert reader.can_place(plan)
    monkeypatch.setattr("node.adapters.page_reader.KEPT_BYTES", byte_count - 1)
    assert not reader.can_place(plan)


def test_missing_file_is_an_error_of_the_adapter(library, tmp_path):
    base = Base()
    directory = base.write(tmp_path / "a", 4)
    plan = base.plans.read(directory)
    (directory / "adapter_model.safetensors").unlink()
    reader = PageReader(library, base.layout, thread_count=2, max_bytes=MAX_BYTES)
    with pytest.raises(AdapterInvalidError):
        reader.read(directory, plan, base.pages(plan, torch.bfloat16, 0))


def test_pages_too_few_for_the_plan_are_never_written(library, tmp_path):
    base = Base()
    directory = base.write(tmp_path / "a", 20)
    plan = base.plans.read(directory)
    pages = base.pages(plan, torch.bfloat16, 77)[:2]
    reader = PageReader(library, base.layout, thread_count=2, max_bytes=MAX_BYTES)
    with pytest.raises(ValueError, match="rank 20"):
        reader.read(directory, plan, pages)
    assert all(np.all(page == 77) for page in pages)


def sha256(library, prefix, data, is_portable):
    function = ctypes.CDLL(str(library)).openlora_sha256
    function.argtypes = (ctypes.c_uint8, ctypes.c_char_p, ctypes.c_int64, ctypes.c_int, ctypes.c_void_p)
    digest = ctypes.create_string_buffer(32)
    function(prefix, data, len(data), is_portable, digest)
    return digest.raw


@pytest.mark.parametrize("is_portable", [0, 1])
def test_sha256_equals_hashlib_at_every_length_around_a_block(library, is_portable):
    data = np.random.default_rng(0).bytes(4097)
    for size in [*range(260), 1023, 4096, 4097]:
        assert sha256(library, 1, data[:size], is_portable) == hashlib.sha256(b"\x01" + data[:size]).digest()


def test_root_equals_the_tree_hash_of_an_odd_number_of_leaves(library, tmp_path):
    base = Base(hidden=1 << 15, small=1, wide=1, page_rank=16, layers=1)
    directory = base.write(tmp_path / "a", 40)
    plan = base.plans.read(directory)
    reader = PageReader(library, base.layout, thread_count=2, max_bytes=MAX_BYTES)
    roots = reader.read(directory, plan, base.pages(plan, torch.bfloat16, 0))
    raw = (directory / "adapter_model.safetensors").read_bytes()
    for record, root in zip(plan.tensors, roots, strict=True):
        start, size = int(record["file_offset"]), int(record["rows"] * record["columns"]) * 2
        assert root == tree_hash(raw[start : start + size])
    assert max(int(record["rows"] * record["columns"]) * 2 for record in plan.tensors) > 2 << 20
