"""The cut of the skinny GEMM into work items: plain C++ arithmetic, compiled here without CUDA."""

import ctypes
import shutil
import subprocess
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from node.kernels.build import compiler, source_dir

SHARED_BYTES = 232_448  # what a Hopper block can have
PROCESSORS = 132
TILE_ROWS = 128
LAYER_SHAPES = {(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336), (128256, 4096)}
SMALL_SHAPES = {(960, 576), (576, 576), (3072, 576), (576, 1536), (49152, 576)}
NARROW, TALL, BROAD = range(3)
FIELDS = ("form", "tile_rows", "tile_tokens", "planes", "stages", "shared_bytes", "stage_bytes", "line_bytes", "groups")
SOURCE = """
#include "gemm_plan.h"
using namespace openlora;
extern "C" bool can_run(long long t, long long n, long long k) { return gemm_can_run(t, n, k); }
extern "C" bool is_faster(long long t, long long n, long long k) { return gemm_is_faster(t, n, k, false); }
extern "C" int planes(long long n, long long k) { return gemm_planes(n, k); }
extern "C" int parts(long long n, long long k) { return gemm_parts(n, k); }
extern "C" bool is_wide(long long t, long long n, long long k) { return gemm_is_wide(t, n, k, kGemmWideRows); }
extern "C" bool is_wide_head(long long t, long long n, long long k) { return gemm_is_wide_head(t, n, k); }
extern "C" int plane_start(int blocks, int planes, int plane) { return gemm_plane_start(blocks, planes, plane); }
extern "C" void plan(long long t, long long n, long long k, int* out) {
  const SkinnyGemmPlan p = gemm_plan(t, n, k);
  const int values[] = {static_cast<int>(p.form), p.tile_rows, p.tile_tokens, p.planes, p.stages, gemm_shared_bytes(p),
                        gemm_stage_bytes(p), gemm_line_bytes(gemm_side_tokens(p)), gemm_groups(p.form)};
  for (int i = 0; i < 9; ++i) out[i] = values[i];
}
"""

tokens = st.integers(1, 320)
outputs = st.integers(1, 20_000).map(lambda n: 8 * n)
inputs = st.integers(1, 400).map(lambda k: 64 * k)


class Planner:
    """The header's functions, callable."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        for name in ("can_run", "is_faster", "is_wide", "is_wide_head"):
            getattr(library, name).restype = ctypes.c_bool
        for name in ("can_run", "is_faster", "is_wide", "is_wide_head", "planes", "parts", "plan"):
            count = 2 if name in ("planes", "parts") else 3
            getattr(library, name).argtypes = [ctypes.c_longlong] * count + ([ctypes.c_void_p] if name == "plan" else [])

    def can_run(self, t: int, n: int, k: int) -> bool:
        return bool(self._library.can_run(t, n, k))

    def is_faster(self, t: int, n: int, k: int) -> bool:
        return bool(self._library.is_faster(t, n, k))

    def is_wide(self, t: int, n: int, k: int) -> bool:
        return bool(self._library.is_wide(t, n, k))

    def is_wide_head(self, t: int, n: int, k: int) -> bool:
        return bool(self._library.is_wide_head(t, n, k))

    def parts(self, n: int, k: int) -> int:
        return int(self._library.parts(n, k))

    def planes(self, n: int, k: int) -> int:
        return int(self._library.planes(n, k))

    def ranges(self, blocks: int, planes: int) -> list[int]:
        return [self._library.plane_start(blocks, planes, plane) for plane in range(planes + 1)]

    def plan(self, t: int, n: int, k: int) -> dict[str, int]:
        values = (ctypes.c_int * len(FIELDS))()
        self._library.plan(t, n, k, values)
        return dict(zip(FIELDS, values, strict=True))


@pytest.fixture(scope="module")
def planner(tmp_path_factory: pytest.TempPathFactory) -> Planner:
    chosen = compiler()
    if chosen is None:
        pytest.skip("no C++ compiler")
    folder = tmp_path_factory.mktemp("gemm_plan")
    (folder / "plan.cc").write_text(SOURCE)
    command = [
        str(shutil.which(chosen)),
        "-std=c++20",
        "-O1",
        "-shared",
        "-fPIC",
        f"-I{source_dir() / 'cuda'}",
        "plan.cc",
        "-o",
        "plan.so",
    ]
    subprocess.run(command, cwd=folder, check=True, timeout=60)
    return Planner(ctypes.CDLL(str(Path(folder) / "plan.so")))


@pytest.mark.parametrize(
    ("t", "n", "k", "runs"),
    [
        (1, 8, 64, True),
        (256, 128256, 4096, True),
        (320, 28672, 4096, True),
        (0, 64, 64, False),
        (321, 64, 64, False),
        (8, 60, 64, False),
        (8, 64, 96, False),
        (8, 64, 0, False),
    ],
)
def test_can_run_takes_its_shapes_and_refuses_the_others(planner, t, n, k, runs):
    assert planner.can_run(t, n, k) is runs


@given(t=tokens, n=outputs, k=inputs)
def test_plan_of_any_shape_covers_the_tokens_and_fits_the_kernel(planner, t, n, k):
    plan = planner.plan(t, n, k)
    assert plan["tile_tokens"] >= t
    assert plan["tile_rows"] % 8 == 0
    assert 8 <= plan["tile_rows"] <= 64 * plan["groups"]
    assert plan["stages"] >= 2
    assert plan["shared_bytes"] <= SHARED_BYTES


@given(t=tokens, n=outputs, k=inputs)
def test_last_stage_reads_whole_blocks_inside_the_shared_memory(planner, t, n, k):
    plan = planner.plan(t, n, k)
    end_of_reads = (plan["stages"] - 1) * plan["stage_bytes"] + 64 * plan["groups"] * 128
    assert end_of_reads <= plan["shared_bytes"] - 1024 - 512 - plan["groups"] * plan["line_bytes"]


@given(t=tokens, n=outputs, k=inputs)
def test_tiles_take_no_more_rounds_than_whole_ones(planner, t, n, k):
    plan = planner.plan(t, n, k)
    halves = 2 if plan["form"] == BROAD else 1
    tiles = [-(-n // plan["tile_rows"]) * plan["planes"] * halves, -(-n // TILE_ROWS) * plan["planes"]]
    rounds = [-(-count // PROCESSORS) for count in tiles]
    assert rounds[0] <= rounds[1]


@given(t=tokens, n=outputs, k=inputs)
def test_parts_are_the_blocks_of_every_form(planner, t, n, k):
    plan = planner.plan(min(t, 256), n, k)
    assert planner.parts(n, k) == min(-(-n // plan["tile_rows"]), PROCESSORS) or plan["form"] == BROAD
    assert plan["form"] != BROAD or plan["planes"] > 1  # never of logits
    if planner.is_wide_head(t, n, k):
        assert planner.parts(n, k) == PROCESSORS
        assert planner.planes(n, k) == 1


def test_wide_form_takes_the_widest_matrices_at_the_largest_batches(planner):
    wide = {(t, n, k) for t in (1, 192, 193, 256) for n, k in LAYER_SHAPES if planner.is_wide(t, n, k)}
    assert {(t, n) for t, n, _ in wide if n < 100_000} == {(193, 28672), (256, 28672)}
    heads = {(t, n) for t in (1, 192, 193, 256) for n, k in LAYER_SHAPES if planner.is_wide_head(t, n, k)}
    assert heads == {(193, 128256), (256, 128256)}


def test_more_rows_than_one_side_of_a_product_are_cut_in_halves(planner):
    forms = {(t, n): planner.plan(t, n, k)["form"] for t in (192, 193, 256, 257, 320) for n, k in LAYER_SHAPES if n < 100_000}
    assert {key for key, form in forms.items() if form == BROAD} == {(t, 6144) for t in (193, 256, 257, 320)}
    assert {t for (t, n), form in forms.items() if form == TALL} == {257, 320}


@given(t=tokens, n=outputs, k=inputs)
def test_planes_follow_the_matrix_and_never_the_tokens(planner, t, n, k):
    assert planner.plan(t, n, k)["planes"] == planner.planes(n, k)
    assert 1 <= planner.planes(n, k) <= min(8, k // 64)


@given(blocks=st.integers(1, 1000), planes=st.integers(1, 8))
def test_plane_ranges_cover_k_in_order_and_evenly(planner, blocks, planes):
    ranges = planner.ranges(blocks, planes)
    sizes = [end - start for start, end in pairwise(ranges)]
    assert (ranges[0], ranges[-1]) == (0, blocks)
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize(("n", "k"), sorted(LAYER_SHAPES | SMALL_SHAPES))
def test_models_we_serve_run_at_every_batch(planner, n, k):
    assert all(planner.can_run(t, n, k) for t in range(1, 321))
    assert planner.is_faster(64, n, k)
