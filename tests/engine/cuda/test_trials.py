"""A prompt computed beside the hash of its adapter on a GPU: the CPU's tokens, and none where the hash is another one."""

import threading

import pytest

from node.adapters.page_reader import PageReader
from node.adapters.trials import Trials

PROMPT = [1, *range(5, 25)]


@pytest.fixture
def begun(monkeypatch):
    """Adapters that went on trial, before which no hash begins: those of small files would be known too soon."""
    seen, is_begun = [], threading.Event()
    begin, place_then_hash = Trials.begin, PageReader.place_then_hash

    def begin_now(self, adapter_id):
        begin(self, adapter_id)
        seen.append(adapter_id)
        is_begun.set()

    def hash_late(self, directory, plan, pages, placed):
        def tell_and_wait():
            is_begun.clear()
            placed()
            is_begun.wait(10.0)

        return place_then_hash(self, directory, plan, pages, tell_and_wait)

    monkeypatch.setattr(Trials, "begin", begin_now)
    monkeypatch.setattr(PageReader, "place_then_hash", hash_late)
    return seen


@pytest.mark.parametrize("new", [1, 20])
def test_tokens_of_an_adapter_on_trial_are_the_cpus(make_gpu, make_cpu, begun, new):
    """The file of z holds a copy of the base's head: it is read in the other way, which ends with the hash."""
    gpu, cpu = make_gpu(prefix_cache=False), make_cpu()
    for driver in (gpu, cpu):
        for name in ("x", "y", "z"):
            driver.add(name, PROMPT, [name], max_new_tokens=new)
            driver.run()
            driver.add(f"{name}-again", PROMPT, [name], max_new_tokens=new)
            driver.run()
    assert begun == [gpu.ids["x"], gpu.ids["y"]]
    for name in ("x", "y", "z"):
        assert gpu.tokens(name) == gpu.tokens(f"{name}-again") == cpu.tokens(name)
    assert set(gpu.engine.stats().resident_adapters) == {gpu.ids[name] for name in ("x", "y", "z")}


@pytest.mark.parametrize("new", [1, 20])
def test_changed_file_gives_no_token_and_nobody_sees_its_slot(make_gpu, begun, tmp_path, world, new):
    gpu = make_gpu()
    weights = world.adapters["y"] / "adapter_model.safetensors"
    sound = weights.read_bytes()
    gpu.add("base", PROMPT, [], max_new_tokens=new)
    gpu.run()
    changed = bytearray(sound)
    changed[-3] ^= 1
    weights.write_bytes(changed)
    try:
        gpu.add("changed", PROMPT, ["y"], max_new_tokens=new)
        gpu.run()
    finally:
        weights.write_bytes(sound)
    assert begun == [gpu.ids["y"]]
    assert [(event.finish_reason, event.error_code) for event in gpu.events["changed"]] == [("error", "adapter_digest_mismatch")]
    assert gpu.tokens("changed") == []
    gpu.add("base-again", PROMPT, [], max_new_tokens=new)
    gpu.run()
    assert gpu.tokens("base-again") == gpu.tokens("base")
    stats = gpu.engine.stats()
    assert stats.resident_adapters == stats.host_adapters == ()
    assert stats.kv_blocks_used == 0
