"""Adapters that follow each other through the layers of steps, in the whole engine: many of them through few slots of a GPU."""

import pytest

from node.adapters.copies import Copies

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
NAMES = [f"a{rank}" for rank in range(5, 17)]  # other numbers for every rank; a page each
PROMPTS = {f"s{i}": [1, *(((11 * i + 3 * k) % 90) + 5 for k in range(4 + 5 * i % 40))] for i in range(40)}
SLOTS, PLACES = 3, 4


@pytest.fixture(scope="session")
def world(build_world):
    """Eight layers, so that there is a middle, of heads of 128."""
    return build_world(
        tuple((name, int(name[1:]), LINEARS) for name in NAMES),
        0.05,
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=8,
        max_position_embeddings=256,
        initializer_range=0.1,
    )


def add_all(driver):
    """Most with an adapter of their own, some with two, some with none; they end at different times."""
    for index, (name, prompt) in enumerate(PROMPTS.items()):
        count = {0: 0, 5: 2}.get(index % 8, 1)
        recipe = [NAMES[(index + 5 * turn) % len(NAMES)] for turn in range(count)]
        driver.add(name, prompt, recipe, max_new_tokens=3 + 7 * index % 9)


@pytest.fixture(scope="module")
def expected():
    """The CPU's tokens, computed once."""
    return {}


def page_bytes(driver):
    """Of 16 ranks of everything, float32."""
    return 4 * 16 * sum((kind.in_features + kind.out_features) * kind.layer_count for kind in driver.engine.ready.linears)


class Early:
    """Counts adapters that a step names although the step before it may still read the place they are copied to."""

    def __init__(self, pool):
        self.count = 0
        self._pool, self._copies, self._inner = pool, pool._route._copies, pool._route._copies.join
        pool._route._copies.join = self.join

    def join(self, adapter_id):
        copy = self._copies._copies.get(adapter_id)
        is_sent_now = copy is not None and copy.step == self._copies._step and copy.arrival.early_share is not None
        follows = (
            is_sent_now
            and self._pool._demand.running_count > 1
            and self._pool._residents.place_of(adapter_id).fence == self._pool._store.mark() - 1
        )
        self.count += follows
        self._inner(adapter_id)


@pytest.mark.parametrize("is_bold", [False, True], ids=["as_measured", "whenever_possible"])
def test_tokens_stay_the_cpus_while_adapters_follow_each_other(make_gpu, make_cpu, expected, monkeypatch, is_bold):
    """`is_bold`: an adapter that can come in halves is always named early, however long its first half may take."""
    if not expected:
        cpu = make_cpu()
        add_all(cpu)
        cpu.run()
        expected.update({name: cpu.tokens(name) for name in PROMPTS}, page_bytes=page_bytes(cpu))
    if is_bold:
        monkeypatch.setattr(Copies, "is_hidden", lambda self, name: self._copies[name].arrival.early_share is not None)
    memory = {"memory_bytes": SLOTS * expected["page_bytes"], "host_memory_bytes": 2 * len(NAMES) * expected["page_bytes"]}
    gpu = make_gpu(max_sequences=PLACES, prefix_cache=False, adapters=memory)
    early = Early(gpu.engine._adapters)
    for _ in range(2):  # from their files, then from host memory
        add_all(gpu)
        gpu.run()
        assert {name: gpu.tokens(name) for name in PROMPTS} == {name: expected[name] for name in PROMPTS}
        gpu.events.clear()
    stats = gpu.engine.stats()
    assert stats.adapter_slots == SLOTS
    assert stats.adapter_evictions_total > 2 * len(NAMES)
    assert stats.adapter_file_loads_total == len(NAMES)
    assert early.count > 0 or not is_bold
