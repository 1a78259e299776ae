"""Every attention backend of this GPU against float64: random block tables, windows, chunked prefill, poisoned memory."""

import pytest
import torch

from node.errors import ConfigError
from node.kernels import reference
from node.kernels.attention.paged import AttentionShape
from node.kernels.attention.registry import attention_facts, open_attention
from node.kernels.cuda_ops import CudaOps, Product

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]

BF16_TOLERANCE, F32_TOLERANCE = 1e-2, 2e-5


class Batch:
    """Sequences of (context, rows) over a cache whose unwritten places are NaN."""

    def __init__(self, shapes, heads, groups, size, block, dtype, *, spare_blocks=3):
        self.shapes, self.dtype = shapes, dtype
        needed = [-(-context // block) for context, _ in shapes]
        order = torch.randperm(sum(needed) + spare_blocks)
        tables = torch.zeros(len(shapes), max(needed) + 1, dtype=torch.int32)
        used, place = torch.zeros(len(order), block, dtype=torch.bool), 0
        for s, (context, _) in enumerate(shapes):
            blocks = order[place : place + needed[s]]
            tables[s, : needed[s]] = blocks
            used[blocks] = (torch.arange(needed[s] * block) < context).view(needed[s], block)
            place += needed[s]
        used = used.cuda()[:, :, None, None]
        both = torch.randn(2, len(order), block, groups, size, device="cuda").where(used, float("nan")).to(dtype)
        self.keys, self.values = both
        self.tables = tables.cuda()
        self.lens = torch.tensor([context for context, _ in shapes], dtype=torch.int32, device="cuda")
        counts = torch.tensor([0, *(rows for _, rows in shapes)])
        self.starts = counts.cumsum(0).to(torch.int32).cuda()
        self.q = torch.randn(int(self.starts[-1]), heads, size, device="cuda").to(dtype)
        self.geometry = {"heads": heads, "groups": groups, "head_dim": size, "block_size": block, "dtype": dtype}
        self.scale = size**-0.5

    def backend(self, name, window=None, *, is_deterministic=False, max_context=None):
        shape = AttentionShape(
            **self.geometry,
            scale=self.scale,
            max_batch=len(self.shapes),
            max_context=max_context or max(context for context, _ in self.shapes),
            windows=(window,),
        )
        try:
            found, _ = open_attention(name, shape, torch.device("cuda"), is_deterministic=is_deterministic)
        except ConfigError as error:
            pytest.skip(error.message)
        return found

    def expected(self, window=None):
        wide = (self.q.double().flatten(1), self.keys.double().transpose(1, 2), self.values.double().transpose(1, 2))
        return reference.paged_attention(*wide, self.tables, self.starts, self.lens, self.scale, window).view(self.q.shape)

    def decode(self, backend, window=None):
        out = torch.full_like(self.q, float("nan"))
        plan = backend.plan_decode(self.tables, self.lens, backend.shape.max_context)
        out.fill_(float("nan"))  # stands between the plan and who reads it, as layers do
        return backend.decode(self.q, self.keys, self.values, plan, out, window=window)

    def prefill(self, backend, window=None):
        out = torch.full_like(self.q, float("nan"))
        rows = max(rows for _, rows in self.shapes)
        plan = backend.plan_prefill(self.tables, self.starts, self.lens, rows, max(context for context, _ in self.shapes))
        return backend.prefill(self.q, self.keys, self.values, plan, out, window=window)

    def short(self, backend, window=None):
        out = torch.full_like(self.q, float("nan"))
        rows = max(rows for _, rows in self.shapes)
        plan = backend.plan_short_prefill(self.tables, self.starts, self.lens, rows, backend.shape.max_context)
        out.fill_(float("nan"))
        return backend.prefill(self.q, self.keys, self.values, plan, out, window=window)

    def check(self, actual, window=None):
        expected = self.expected(window)
        assert torch.isfinite(actual).all()
        tolerance = BF16_TOLERANCE if self.dtype == torch.bfloat16 else F32_TOLERANCE
        assert (actual.double() - expected).abs().max() <= tolerance * expected.abs().max()


LLAMA = (32, 8, 128)
GEOMETRIES = [LLAMA, (9, 3, 64), (4, 4, 80), (6, 2, 96)]


@pytest.fixture(params=["native", "triton", "fa3", "fa2", "varlen"])
def name(request):
    if request.param == "triton" and not attention_facts(torch.device("cuda")).has_triton:
        pytest.skip("triton is not installed")
    return request.param


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("block", [16, 32, 64, 128, 256])
@pytest.mark.parametrize("window", [None, 100])
def test_decode_mixed_contexts_matches_float64(name, geometry, block, window):
    if geometry != LLAMA and block != 16:
        pytest.skip("block sizes are covered by the first geometry")
    contexts = [1, 320, 17, 2049, 64, 65, 130, 4100, 900]
    batch = Batch([(context, 1) for context in contexts], *geometry, block, torch.bfloat16)
    batch.check(batch.decode(batch.backend(name, window), window), window)


@pytest.mark.parametrize("geometry", [LLAMA, (9, 3, 64)], ids=str)
@pytest.mark.parametrize("is_deterministic", [False, True])
def test_decode_float32_matches_float64(geometry, is_deterministic):
    batch = Batch([(context, 1) for context in (1, 320, 2049, 65)], *geometry, 16, torch.float32)
    batch.check(batch.decode(batch.backend("auto", is_deterministic=is_deterministic)))


@pytest.mark.parametrize("count", [1, 16, 64, 256])
def test_decode_even_contexts_match_float64(name, count):
    batch = Batch([(320, 1)] * count, *LLAMA, 16, torch.bfloat16)
    batch.check(batch.decode(batch.backend(name, max_context=8192)))


EDGES = {
    "whole in the ring": [384, 385, 383, 16, 17, 1],
    "two blocks a processor": [192, 193, 208, 176] * 8,
    "one round of small blocks": [260, 257, 256, 1] * 16,
    "rounds begun": [1, 500] * 35,
    "one": [260],
    "cut": [2048],
    "blocks not named": [8192, 1600],
}


@pytest.mark.parametrize("contexts", EDGES.values(), ids=EDGES)
def test_decode_at_the_edges_of_what_is_fetched_early_matches_float64(contexts):
    batch = Batch([(context, 1) for context in contexts], *LLAMA, 64, torch.bfloat16)
    batch.check(batch.decode(batch.backend("native", max_context=8192)))


@pytest.mark.parametrize("heads", [8, 40, 72, 128])
def test_decode_of_other_group_sizes_matches_float64(heads):
    batch = Batch([(context, 1) for context in (300, 17, 1000)], heads, 8, 128, 64, torch.bfloat16)
    batch.check(batch.decode(batch.backend("native")))


@pytest.mark.parametrize("contexts", [[260], [1, 17, 1000], [160] * 32, [130, 385] * 32], ids=len)
def test_decode_behind_the_kernel_that_writes_the_newest_key_sees_it(contexts):
    batch = Batch([(context, 1) for context in contexts], *LLAMA, 64, torch.bfloat16)
    backend, ops, (heads, groups, size) = batch.backend("native"), CudaOps(), LLAMA
    plan = backend.plan_decode(batch.tables, batch.lens, backend.shape.max_context)
    positions = batch.lens - 1
    places = positions.long()
    blocks = batch.tables.long().gather(1, places[:, None] // 64)[:, 0]
    slots = (blocks * 64 + places % 64).int()
    angles = torch.randn(2, max(contexts), size // 2, device="cuda")
    product = Product(torch.randn(2, len(contexts), (heads + 2 * groups) * size, device="cuda"))
    for _ in range(5):
        for written in (batch.keys, batch.values):
            written[blocks, places % 64] = float("nan")
        batch.q.fill_(float("nan"))
        out = torch.full_like(batch.q, float("nan"))  # nothing may stand between the two kernels
        ops.rope_kv_write(product, *angles, positions, slots, batch.keys, batch.values, batch.q.flatten(1))
        batch.check(backend.decode(batch.q, batch.keys, batch.values, plan, out))


def test_decode_long_context_matches_float64(name):
    batch = Batch([(32_768, 1), (32_001, 1), (5, 1)], *LLAMA, 64, torch.bfloat16)
    batch.check(batch.decode(batch.backend(name)))


def test_decode_again_gives_the_same_bits(name):
    batch = Batch([(context, 1) for context in (1, 320, 2049, 65, 8000)], *LLAMA, 16, torch.bfloat16)
    backend = batch.backend(name)
    first = batch.decode(backend)
    assert all(torch.equal(batch.decode(backend), first) for _ in range(20))


def test_decode_padding_rows_are_zero(name):
    batch = Batch([(320, 1), (700, 1), (64, 1)], *LLAMA, 16, torch.bfloat16)
    backend = batch.backend(name)
    expected = batch.decode(backend)
    batch.lens[1] = 0
    actual = batch.decode(backend)
    assert (actual[1] == 0).all()
    tolerance = BF16_TOLERANCE * expected.abs().max()
    assert (actual[::2] - expected[::2]).abs().max() <= tolerance


def test_decode_in_a_graph_follows_new_lengths(name):
    batch = Batch([(400, 1), (2000, 1), (64, 1)], *LLAMA, 16, torch.bfloat16)
    backend = batch.backend(name)
    batch.decode(backend)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = batch.decode(backend)
    for lens in ([1, 2000, 64], [400, 3, 30], [399, 1999, 1]):
        batch.lens.copy_(torch.tensor(lens, dtype=torch.int32))
        batch.shapes = [(context, 1) for context in lens]
        batch.q.normal_()
        captured.fill_(float("nan"))
        graph.replay()
        batch.check(captured)


@pytest.mark.parametrize("is_bfloat16", [True, False])
@pytest.mark.parametrize("window", [None, 300])
def test_deterministic_rows_have_the_same_bits_alone_in_a_batch_and_in_prefill(is_bfloat16, window):
    dtype = torch.bfloat16 if is_bfloat16 else torch.float32
    batch = Batch([(context, 1) for context in (1, 320, 5000, 65, 2049, 700)], *LLAMA, 16, dtype)
    backend = batch.backend("auto", window, is_deterministic=True)
    together = batch.decode(backend, window)
    batch.check(together, window)
    for s in range(len(batch.shapes)):
        plan = backend.plan_decode(batch.tables[s : s + 1], batch.lens[s : s + 1], 5000)
        alone = backend.decode(batch.q[s : s + 1], batch.keys, batch.values, plan, torch.empty_like(batch.q[:1]), window=window)
        assert torch.equal(alone[0], together[s])
    assert torch.equal(batch.prefill(backend, window), together)


@pytest.mark.parametrize("is_bfloat16", [True, False])
def test_deterministic_prefill_has_the_same_bits_in_any_chunk(is_bfloat16):
    dtype = torch.bfloat16 if is_bfloat16 else torch.float32
    batch = Batch([(1500, 1500)], *LLAMA, 16, dtype)
    backend = batch.backend("auto", is_deterministic=True)
    whole = batch.prefill(backend)
    for begin, end in ((0, 1), (5, 70), (700, 1500), (1499, 1500)):
        lens = torch.tensor([end], dtype=torch.int32, device="cuda")
        starts = torch.tensor([0, end - begin], dtype=torch.int32, device="cuda")
        plan = backend.plan_prefill(batch.tables, starts, lens, end - begin, end)
        q = batch.q[begin:end]
        part = backend.prefill(q, batch.keys, batch.values, plan, torch.empty_like(q))
        assert torch.equal(part, whole[begin:end])


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("window", [None, 100])
def test_prefill_mixed_chunks_match_float64(name, geometry, window):
    shapes = [(1, 1), (129, 129), (1000, 300), (65, 1), (64, 64), (2048, 17), (400, 399)]
    batch = Batch(shapes, *geometry, 16, torch.bfloat16)
    batch.check(batch.prefill(batch.backend(name, window), window), window)


@pytest.mark.parametrize("block", [32, 64, 128, 256])
def test_prefill_block_sizes_match_float64(name, block):
    batch = Batch([(700, 700), (1000, 300), (65, 1)], *LLAMA, block, torch.bfloat16)
    batch.check(batch.prefill(batch.backend(name)))


def test_prefill_float32_matches_float64():
    batch = Batch([(129, 129), (1000, 300), (65, 1)], 9, 3, 64, 16, torch.float32)
    batch.check(batch.prefill(batch.backend("auto")))


def test_prefill_last_chunk_of_a_long_prompt_matches_float64(name):
    batch = Batch([(32_768, 256)], *LLAMA, 64, torch.bfloat16)
    batch.check(batch.prefill(batch.backend(name)))


SHORT = {
    "a prompt beside decoding rows": [(260, 1)] * 31 + [(225, 225)],
    "prompts alone": [(33, 33), (128, 128), (2, 2), (16, 16), (17, 17)],
    "chunks behind long contexts": [(3000, 17), (5000, 156), (1, 1), (8192, 1), (400, 3), (64, 64)],
    "one small chunk": [(40, 5)],
    "many small chunks": [(40 + 7 * i, 2 + i % 5) for i in range(40)],
    "more items than blocks": [(300, 1)] * 60 + [(512, 380), (100, 63)],
    "decoding rows alone": [(1 + 97 * i, 1) for i in range(20)],
    "one prompt": [(512, 512)],
}


@pytest.mark.parametrize("shapes", SHORT.values(), ids=SHORT)
@pytest.mark.parametrize("block", [16, 64, 256])
@pytest.mark.parametrize("window", [None, 100])
def test_short_steps_match_float64(shapes, block, window):
    batch = Batch(shapes, *LLAMA, block, torch.bfloat16)
    batch.check(batch.short(batch.backend("native", window), window), window)


@pytest.mark.parametrize("geometry", [(9, 3, 64), (8, 8, 128), (40, 8, 128), (64, 8, 128), (72, 8, 128), (32, 2, 64)], ids=str)
@pytest.mark.parametrize("window", [None, 30])
def test_short_steps_of_other_geometries_match_float64(geometry, window):
    batch = Batch([(500, 1), (129, 129), (700, 20), (65, 1), (3, 2)], *geometry, 32, torch.bfloat16)
    batch.check(batch.short(batch.backend("native", window), window), window)


@pytest.mark.parametrize(
    "shapes", [[(225, 225)], [(1, 1), (17, 17), (1000, 1), (900, 40)], [(160, 1)] * 32 + [(400, 200)]], ids=len
)
def test_short_steps_behind_the_kernel_that_writes_their_keys_see_them(shapes):
    batch = Batch(shapes, *LLAMA, 64, torch.bfloat16)
    backend, ops, (heads, groups, size) = batch.backend("native"), CudaOps(), LLAMA
    plan = backend.plan_short_prefill(batch.tables, batch.starts, batch.lens, 225, backend.shape.max_context)
    positions = torch.cat([torch.arange(context - rows, context) for context, rows in shapes]).int().cuda()
    sequences = torch.cat([torch.full((rows,), s) for s, (_, rows) in enumerate(shapes)]).cuda()
    places = positions.long()
    blocks = batch.tables.long()[sequences, places // 64]
    slots = (blocks * 64 + places % 64).int()
    angles = torch.randn(2, max(context for context, _ in shapes), size // 2, device="cuda")
    product = Product(torch.randn(2, len(places), (heads + 2 * groups) * size, device="cuda"))
    for _ in range(5):
        for written in (batch.keys, batch.values):
            written[blocks, places % 64] = float("nan")
        batch.q.fill_(float("nan"))
        out = torch.full_like(batch.q, float("nan"))  # nothing may stand between the two kernels
        ops.rope_kv_write(product, *angles, positions, slots, batch.keys, batch.values, batch.q.flatten(1))
        batch.check(backend.prefill(batch.q, batch.keys, batch.values, plan, out))


def test_short_steps_in_a_graph_follow_new_shapes():
    batch = Batch([(400, 1), (2000, 1), (300, 120), (64, 40), (200, 1)], *LLAMA, 16, torch.bfloat16)
    backend = batch.backend("native")
    batch.short(backend)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = batch.short(backend)
    for shapes in (
        [(1, 1), (2000, 100), (300, 1), (64, 1), (199, 60)],
        [(400, 1), (3, 3), (30, 1)],
        [(399, 160)],
        [(400, 1), (1999, 1), (300, 1), (64, 1), (200, 1)],
    ):
        rows = [0, *(rows for _, rows in shapes)] + [0] * (5 - len(shapes))
        batch.starts.copy_(torch.tensor(rows).cumsum(0))
        batch.lens.copy_(torch.tensor([context for context, _ in shapes] + [0] * (5 - len(shapes))))
        batch.q.normal_()
        captured.fill_(float("nan"))
        graph.replay()
        wide = (batch.q.double().flatten(1), batch.keys.double().transpose(1, 2), batch.values.double().transpose(1, 2))
        count, end = len(shapes), sum(rows)
        starts = batch.starts[: count + 1]
        expected = reference.paged_attention(
            wide[0][:end], *wide[1:], batch.tables[:count], starts, batch.lens[:count], batch.scale, None
        ).view(end, *batch.q.shape[1:])
        assert torch.isnan(captured[end:]).all()
        assert torch.isfinite(captured[:end]).all()
        assert (captured[:end].double() - expected).abs().max() <= BF16_TOLERANCE * expected.abs().max()


def test_short_rows_have_the_same_bits_in_any_chunk():
    batch = Batch([(500, 500)], *LLAMA, 64, torch.bfloat16)
    backend = batch.backend("native")
    whole = batch.short(backend)
    for begin, end in ((5, 70), (300, 500), (400, 432), (0, 16)):
        lens = torch.tensor([end], dtype=torch.int32, device="cuda")
        starts = torch.tensor([0, end - begin], dtype=torch.int32, device="cuda")
        plan = backend.plan_short_prefill(batch.tables, starts, lens, end - begin, 500)
        q = batch.q[begin:end]
        assert torch.equal(backend.prefill(q, batch.keys, batch.values, plan, torch.zeros_like(q)), whole[begin:end])
