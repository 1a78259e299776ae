"""The loader's threads: what they tell of an adapter and when; and numpy's conversions."""

import threading

import numpy as np
import pytest
import torch

from node.adapters.binding import LinearTable
from node.adapters.loader import AdapterLoader, Failed, Filled, Inspected, Placed
from node.adapters.page_filler import convert, to_bfloat16_bits
from node.adapters.verify import AdapterVerifier
from node.errors import AdapterChangedError
from node.kernels.build import build
from node.kernels.layout import PageLayout


class Room:
    """A loader over the compiled reader, and one adapter of the tiny base."""

    def __init__(self, linears, directory, base_id):
        table = LinearTable(linears)
        self.layout = PageLayout([(name, shape.in_features, shape.out_features) for name, shape in table.shapes.items()], 8)
        self.wakes = threading.Semaphore(0)
        self.loader = AdapterLoader(
            self.layout, table, max_rank=64, max_bytes=1 << 20, library=build(), job_limit=2, wake=self.wakes.release
        )
        self.directory = directory
        self.adapter_id = AdapterVerifier(table, base_id, max_rank=64, max_bytes=1 << 20).verify(directory).adapter_id
        self.page = np.zeros(self.layout.page_elements, np.float32)

    def inspect(self):
        self.loader.inspect(self.adapter_id, self.directory)
        (found,) = self.loader.outcomes(10.0)
        assert isinstance(found, Inspected)
        return found.plan

    def fill(self, *, is_urgent):
        plan = self.inspect()
        self.loader.fill(plan, [self.page], is_urgent=is_urgent)
        found = self.loader.outcomes(10.0)
        while not isinstance(found[-1], Filled | Failed):
            assert self.loader.job_count == 1
            found += self.loader.outcomes(10.0)
        return plan, found


@pytest.fixture
def room(linears, writer, base_id):
    made = Room(linears, writer.write("a"), base_id)
    yield made
    made.loader.close()


def test_urgent_adapter_is_told_of_when_its_pages_are_complete_and_when_its_hash_is_known(room):
    plan, found = room.fill(is_urgent=True)
    assert [type(outcome) for outcome in found] == [Placed, Filled]
    assert all(outcome.plan is plan for outcome in found)
    assert room.page.any()
    assert room.loader.job_count == 0
    assert all(room.wakes.acquire(timeout=10.0) for _ in range(3))


def test_adapter_that_nobody_waits_for_is_told_of_once(room):
    _, found = room.fill(is_urgent=False)
    assert [type(outcome) for outcome in found] == [Filled]


def test_loader_that_is_closed_while_it_hashes_ends_the_hash_before_its_reader(room, monkeypatch):
    reader, order, may_hash = room.loader._reader, [], threading.Event()
    hash_placed, close_reader = reader._hash, reader.close

    def hash_late(*arguments):
        assert may_hash.wait(10.0)
        fault = hash_placed(*arguments)
        order.append("hashed")
        return fault

    monkeypatch.setattr(reader, "_hash", hash_late)
    monkeypatch.setattr(reader, "close", lambda: (order.append("closed"), close_reader()))
    room.loader.fill(room.inspect(), [room.page], is_urgent=True)
    assert [type(outcome) for outcome in room.loader.outcomes(10.0)] == [Placed]
    closing = threading.Thread(target=room.loader.close)
    closing.start()
    may_hash.set()
    closing.join(10.0)
    assert order == ["hashed", "closed"]


@pytest.mark.parametrize("is_urgent", [False, True])
def test_changed_bytes_end_as_failed_however_they_were_read(room, is_urgent):
    weights = room.directory / "adapter_model.safetensors"
    changed = bytearray(weights.read_bytes())
    changed[-1] ^= 1
    weights.write_bytes(changed)
    _, found = room.fill(is_urgent=is_urgent)
    assert [type(outcome) for outcome in found] == [Placed, Failed][not is_urgent :]
    assert isinstance(found[-1].error, AdapterChangedError)
    assert room.loader.job_count == 0


def test_waiting_for_outcomes_ends_without_any(room):
    assert room.loader.outcomes(0.001) == []


def test_bfloat16_rounding_equals_torch():
    values = torch.randn(10_000, generator=torch.Generator().manual_seed(0)) * 10
    ties = torch.tensor([0x3F808000, 0x3F818000, 0x3F80FFFF], dtype=torch.int32).view(torch.float32)
    x = torch.cat([values, ties, torch.tensor([0.0, -0.0, 1e-40])])
    expected = x.to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    assert np.array_equal(to_bfloat16_bits(x.numpy()), expected)


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("target", [torch.float32, torch.bfloat16])
def test_convert_equals_torch(dtype, target):
    source = torch.randn(7, 5, generator=torch.Generator().manual_seed(1)).to(
        {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[dtype]
    )
    raw = source.view(torch.int16).numpy().view(np.uint16) if dtype == "BF16" else source.numpy()
    number = np.dtype(np.float32 if target == torch.float32 else np.uint16)
    found = convert(raw, dtype, number)
    expected = source.to(target)
    bits = expected.numpy() if target == torch.float32 else expected.view(torch.int16).numpy().view(np.uint16)
    assert np.array_equal(found, bits)


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory")])
def test_adapter_without_memory_for_its_loading_fails_alone(room, monkeypatch, error):
    def fill(*_, **__):
        raise error

    plan = room.inspect()
    monkeypatch.setattr(room.loader, "_fill", fill)
    room.loader.fill(plan, [room.page])
    (found,) = room.loader.outcomes(10.0)
    assert isinstance(found, Failed)
    assert "memory" in found.error.message
    monkeypatch.undo()
    assert isinstance(room.fill(is_urgent=False)[1][-1], Filled)
