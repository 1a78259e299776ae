"""The GPU's runner on a CPU, over plain torch: one step ahead, static memory and all, but without graphs."""

import pytest
import torch

from node.engine.device_runner import DeviceRunner
from node.engine.engine import FAILED_STEPS_LIMIT
from node.engine.sizing import DeviceSizes
from node.kernels.attention.paged import ShortBound
from node.kernels.lora import LoraRows
from node.kernels.reference_tiles import read_tiles
from node.kernels.torch_kernels import TorchKernels

PROMPTS = {f"s{i}": [1, *(((7 * i + 3 * k) % 90) + 5 for k in range(5 + 4 * i))] for i in range(6)}
ADAPTERS = {"s0": (), "s1": ("x",), "s2": ("y",), "s3": ("z",), "s4": ("x", "z"), "s5": ()}


class TileKernels(TorchKernels):
    """Plain torch that reads what the CUDA kernels read: tiles, padding rows, one row a sequence without query_start."""

    takes_tiles = True
    has_static_prefill = True
    short_bound = ShortBound(rows=64, context=30, pairs=400)

    def __init__(self, **settings):
        super().__init__(**settings)
        self.short_plans = []

    def linear(self, x, packed, bias=None, *, pool=None, rows=None, spans=None, out_dtype=None):
        lora = None if rows is None else rows_of_tiles(rows.tiles, pool, x.shape[0])
        return super().linear(x, packed, bias, pool=pool, rows=lora, spans=spans, out_dtype=out_dtype)

    def logits(self, x, packed, bias=None, *, pool=None, rows=None, spans=None, tops=None):
        """Leaves the logits that nobody may read as they are on a GPU: anything at all."""
        y = super().logits(x, packed, bias, pool=pool, rows=rows, spans=spans)
        if tops is None or rows is not None:
            return y
        best = [part.max(dim=1) for part in y.split(40, dim=1)]
        values, tokens = (
            torch.stack([b.values for b in best], 1),
            torch.stack([b.indices + 40 * i for i, b in enumerate(best)], 1),
        )
        tops.parts = torch.stack([values.view(torch.int32), tokens.int()], dim=2)
        return y.masked_fill(tops.wanted[:, None] == 0, float("nan"))

    def select_rows(self, rows, wanted):
        return None if rows is None else rows.wanted

    def head_rows(self, rows, pool, module):
        return rows if rows is not None and rows.has_head else None

    def rope_kv_write(self, qkv, cos, sin, positions, kv_slots, key_cache, value_cache, **rest):
        real = int((kv_slots >= 0).sum())  # padding comes last
        assert bool((kv_slots[:real] >= 0).all())
        q = qkv.new_zeros((qkv.shape[0], qkv.shape[1] - 2 * key_cache.shape[1] * key_cache.shape[3]))
        q[:real] = super().rope_kv_write(qkv[:real], cos, sin, positions[:real], kv_slots[:real], key_cache, value_cache, **rest)
        return q

    def paged_attention(self, q, keys, values, tables, query_start, context_lens, scale, window=None, plan=None):
        out = torch.zeros_like(q)
        real = int((context_lens > 0).sum())
        assert not context_lens[real:].any()
        if self.max_query == 1:
            query_start = torch.arange(real + 1, dtype=torch.int32)
        rows = int(query_start[real])
        out[:rows] = super().paged_attention(
            q[:rows], keys, values, tables[:real], query_start[: real + 1], context_lens[:real], scale, window
        )
        return out

    def plan_attention(self, block_tables, query_start, context_lens, max_query, max_context, *, is_short=False):
        self.max_query = max_query
        self.short_plans.append(is_short)


def rows_of_tiles(tiles, pool, row_count):
    """The terms of every row, read back from the block that csrc/cuda/lora_work.h describes."""
    terms = [[] for _ in range(row_count)]
    for tile in read_tiles(tiles.block.numpy()):
        for page, slot, ordinal, weight in tile.entries:
            assert page == pool.slot_pages[slot, ordinal]
            for row in tile.rows:
                if ordinal == 0:
                    terms[row].append((slot, weight))
    starts = torch.tensor([0, *map(len, terms)], dtype=torch.int32).cumsum(0).int()
    flat = [pair for row in terms for pair in row]
    slots = torch.tensor([slot for slot, _ in flat], dtype=torch.int32)
    return LoraRows(starts, slots, torch.tensor([weight for _, weight in flat], dtype=torch.float32))


@pytest.fixture(params=["static", "eager"])
def make_ahead(make_driver, request):
    """A driver whose engine runs one step ahead, as on a GPU or as on one without compiled kernels."""

    def make(**settings):
        driver = make_driver(kernels="reference", **settings)
        engine = driver.engine
        before = engine._runner
        if request.param == "static":
            before._model._kernels = TileKernels(is_deterministic=settings.get("deterministic", False))
        sizes = DeviceSizes(
            max_sequences=8,
            max_batch_tokens=settings.get("max_batch_tokens", 512),
            max_model_len=engine.ready.max_model_len,
            vocab_size=engine.ready.vocab_size,
            head_module=engine._adapters.tensors.ranks.shape[0] - 1,
            processors=5,
        )
        engine._runner = DeviceRunner(
            before._model, before._model._kernels, before._kv, engine._adapters, before._masks, sizes, has_graphs=False
        )
        return driver

    return make


def answers(driver, names=PROMPTS, **sampling):
    for name in names:
        driver.add(name, PROMPTS[name], ADAPTERS[name], **{"max_new_tokens": 12, **sampling})
    driver.run()
    return {name: driver.tokens(name) for name in names}


SAMPLINGS = {
    "greedy": {},
    "drawn": {"temperature": 0.9, "top_p": 0.95, "seed": 5},
    "penalised": {"repetition_penalty": 1.3, "frequency_penalty": 0.4, "logit_bias": ((7, 2.0),)},
    "logprobs": {"logprobs": 3},
}


@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)
@pytest.mark.parametrize(
    "change", [{}, {"max_batch_tokens": 16}, {"kv_cache_bytes": 14 * 2 * 2 * 2 * 16 * 4 * 4}], ids=["", "chunks", "few"]
)
def test_answers_equal_those_of_the_synchronous_engine(make_driver, make_ahead, sampling, change):
    expected = answers(make_driver(kernels="reference", deterministic=True), **sampling)
    driver = make_ahead(deterministic=True, **change)
    assert answers(driver, **sampling) == expected
    assert driver.engine.stats().kv_blocks_used == 0
    if "kv_cache_bytes" in change:
        assert driver.engine.stats().preemptions_total > 0


def test_stop_token_ends_the_answer_although_the_next_step_is_under_way(make_driver, make_ahead):
    plain = answers(make_driver(kernels="reference"), ["s3"])["s3"]
    stop = plain[4]
    driver = make_ahead()
    driver.add("s3", PROMPTS["s3"], ADAPTERS["s3"], max_new_tokens=50, stop_token_ids=(stop,))
    driver.run()
    assert driver.tokens("s3") == plain[: plain.index(stop) + 1]
    assert driver.last("s3").finish_reason == "stop"
    assert driver.engine.stats().kv_blocks_used == 0


def test_prompt_logprobs_equal_the_synchronous_engine(make_driver, make_ahead):
    found = []
    for driver in (make_driver(kernels="reference"), make_ahead(max_batch_tokens=16)):
        driver.add("a", PROMPTS["s4"], prompt_logprobs=True, prompt_top=2, max_new_tokens=3)
        driver.add("b", PROMPTS["s2"], ["y"], max_new_tokens=9)
        driver.run()
        scored = [item for token in driver.events["a"][0].prompt_logprobs[1:] for item in (token, *token.top)]
        found.append(((driver.tokens("a"), driver.tokens("b"), [item.token_id for item in scored]), scored))
    assert found[0][0] == found[1][0]
    assert [item.logprob for item in found[0][1]] == pytest.approx([item.logprob for item in found[1][1]], abs=1e-5)


def test_steps_whose_prompts_have_few_keys_are_planned_as_short_ones(make_ahead):
    driver = make_ahead(prefix_cache=False)
    kernels = driver.engine._runner._model._kernels
    if not isinstance(kernels, TileKernels):
        pytest.skip("steps are not recorded")
    found = {}
    for count in (18, 22):  # pairs of a row and a token: 324 and 484, of 400
        kernels.short_plans.clear()
        driver.add(f"p{count}", [1, *range(5, 4 + count)], max_new_tokens=3)
        driver.run()
        found[count] = list(kernels.short_plans)
    assert found == {18: [True, False, False], 22: [False, False, False]}


def test_chunks_with_adapters_of_the_head_are_recorded(make_ahead, monkeypatch):
    expected = answers(make_ahead(max_batch_tokens=16))
    driver = make_ahead(max_batch_tokens=16)
    runner = driver.engine._runner
    if not isinstance(runner._kernels, TileKernels):
        pytest.skip("steps are not recorded")
    monkeypatch.setattr(driver.engine._adapters, "adapts", lambda adapter_id, module: True)  # with rank 0
    launched = []
    monkeypatch.setattr(runner, "_launch_rows", lambda *step: launched.append(step))
    assert answers(driver) == expected
    assert not launched


def test_second_turn_hits_the_prefix_of_the_first(make_ahead):
    driver = make_ahead()
    driver.add("first", PROMPTS["s5"], max_new_tokens=8)
    driver.run()
    driver.add("second", [*PROMPTS["s5"], *driver.tokens("first"), 9], max_new_tokens=2)
    driver.run()
    assert driver.events["second"][0].cached_prompt_tokens == 32  # 25 + 8 tokens are 8 full blocks of 4; the last drawn is no row


def test_only_an_idle_device_gets_its_step_before_others_are_looked_at(make_driver, make_ahead, monkeypatch):
    def order_of(driver):
        order = []
        for owner, method in ((driver.engine._runner, "launch"), (driver.engine._scheduler, "look_ahead")):
            inner = getattr(owner, method)
            monkeypatch.setattr(owner, method, lambda *args, inner=inner, name=method: (order.append(name), inner(*args))[1])
        driver.add("a", PROMPTS["s0"], max_new_tokens=4)
        driver.run()
        return order[:4]

    assert order_of(make_ahead()) == ["launch", "look_ahead", "look_ahead", "launch"]
    assert order_of(make_driver()) == ["look_ahead", "launch", "look_ahead", "launch"]


def test_sequence_that_comes_back_finds_its_adapter_where_it_is_now(make_driver, make_ahead):
    """It waited alone, and comes back with one row to compute: the same batch as before, with other pages."""
    expected = answers(make_driver(), ["s1"])
    for count in range(2, 9):
        driver = make_ahead()
        scheduler, adapters = driver.engine._scheduler, driver.engine._adapters
        driver.engine._runner.is_ahead = False  # so that all of its rows but the last are known to the prefix cache
        driver.add("s1", PROMPTS["s1"], ADAPTERS["s1"], max_new_tokens=12)
        while "s1" not in driver.events or len(driver.tokens("s1")) < count:
            driver.record(driver.engine.step()[0])
        scheduler._preemption.preempt(scheduler._by_id["s1"])
        adapters._forget(driver.ids["x"])
        adapters._residents._tier.take("somebody else", 1)
        driver.run()
        assert driver.tokens("s1") == expected["s1"]


def test_cancel_between_two_steps_frees_everything(make_ahead):
    driver = make_ahead()
    driver.add("a", PROMPTS["s5"], ["y"], max_new_tokens=100)
    driver.add("b", PROMPTS["s1"], ["x"], max_new_tokens=6)
    while driver.engine.stats().output_tokens_total < 3:
        driver.record(driver.engine.step()[0])
    driver.record(driver.engine.cancel("a"))
    driver.run()
    assert driver.last("a").finish_reason == "cancelled"
    assert driver.last("b").finish_reason == "length"
    assert driver.engine.stats().kv_blocks_used == 0


def make_fragile(runner, token_id):
    runner._model = runner._recorded._model = Fragile(runner._model, token_id)


class Fragile:
    """A model that cannot bear one token id."""

    def __init__(self, model, token_id):
        self._model = model
        self._token_id = token_id

    def forward(self, inputs, kv, pool):
        if (inputs.row_token_ids() == self._token_id).any():
            raise RuntimeError("this token breaks the model")
        return self._model.forward(inputs, kv, pool)

    def attended(self, inputs, kv, pool):
        if (inputs.row_token_ids() == self._token_id).any():
            raise RuntimeError("this token breaks the model")
        return self._model.attended(inputs, kv, pool)

    def logits(self, attended, inputs, pool):
        return self._model.logits(attended, inputs, pool)


def test_step_that_fails_ends_only_the_sequence_at_fault(make_ahead):
    names = ["s0", "s3", "s4"]
    expected = answers(make_ahead(), names)
    driver = make_ahead()
    make_fragile(driver.engine._runner, 99)
    driver.add("bad", [1, 99, 7])
    assert answers(driver, names) == expected
    assert driver.last("bad").error_code == "engine_failed"
    assert driver.engine.stats().kv_blocks_used == 0


def test_draw_that_fails_is_repeated_with_known_tokens(make_ahead, monkeypatch):
    expected = answers(make_ahead())
    driver = make_ahead()
    sampler = driver.engine._runner._sampler
    draw, calls = sampler.draw, []

    def sometimes(logits, rows, *rest):
        calls.append(len(rows))
        if len(calls) in (4, 9) and len(rows) > 1:
            raise RuntimeError("the draw failed")
        return draw(logits, rows, *rest)

    monkeypatch.setattr(sampler, "draw", sometimes)
    assert answers(driver) == expected


def test_engine_that_computes_nothing_any_more_gives_up(make_ahead):
    driver = make_ahead()
    make_fragile(driver.engine._runner, 1)
    for index in range(FAILED_STEPS_LIMIT - 1):
        driver.add(f"a{index}", [1, 5])
        driver.run()
    driver.add("last", [1, 5])
    with pytest.raises(RuntimeError):
        driver.run()


def test_non_finite_logits_end_their_sequence_alone(make_ahead):
    driver = make_ahead()
    driver.add("bad", PROMPTS["s2"], [driver.term("x", 3e38)])
    assert set(answers(driver, ["s0", "s1"])) == {"s0", "s1"}
    assert driver.last("bad").error_code == "engine_failed"
