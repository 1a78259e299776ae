"""How the shrink inside the skinny GEMM is cut: plain C++ arithmetic, compiled here without CUDA."""

import ctypes
import shutil
import subprocess

import pytest
from hypothesis import given
from hypothesis import strategies as st

from node.kernels.build import compiler, source_dir

SHARED_BYTES = 232_448  # what a Hopper block can have
BARRIERS = 24  # kShrinkBarriers of gemm_shrink.cuh
MOST_INPUTS = 4096
SOURCE = """
#include "gemm_plan.h"
using namespace openlora;
extern "C" int columns() { return kGemmShrinkColumns; }
extern "C" int chunks(int k) { return gemm_shrink_chunks(k); }
extern "C" int page_bytes() { return 16 * kGemmShrinkPitch; }
extern "C" int stage_bytes(int t, int n, int k) { return gemm_stage_bytes(gemm_plan(t, n, k, true)); }
extern "C" int shared_bytes(int t, int n, int k) { return gemm_shared_bytes(gemm_plan(t, n, k, true)); }
extern "C" int ring_stages(int t, int n, int k) { return gemm_plan(t, n, k, true).stages; }
extern "C" int plane_count(int t, int n, int k, bool has_shrink) { return gemm_plan(t, n, k, has_shrink).planes; }
"""

tokens = st.integers(1, 256)
outputs = st.integers(1, 20_000).map(lambda n: 8 * n)
inputs = st.integers(1, MOST_INPUTS // 64).map(lambda k: 64 * k)


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    chosen = compiler()
    if chosen is None:
        pytest.skip("no C++ compiler")
    folder = tmp_path_factory.mktemp("gemm_shrink_plan")
    (folder / "plan.cc").write_text(SOURCE)
    flags = ["-std=c++20", "-O1", "-shared", "-fPIC", f"-I{source_dir() / 'cuda'}"]
    command = [str(shutil.which(chosen)), *flags, "plan.cc", "-o", "plan.so"]
    subprocess.run(command, cwd=folder, check=True, timeout=60)
    return ctypes.CDLL(str(folder / "plan.so"))


@given(k=inputs)
def test_chunks_cover_the_inputs_in_at_most_eight_planes(plan, k):
    assert 1 <= plan.chunks(k) <= 8
    assert (plan.chunks(k) - 1) * plan.columns() < k <= plan.chunks(k) * plan.columns()


def test_longer_rows_have_no_chunks(plan):
    assert plan.chunks(MOST_INPUTS) > 0
    assert plan.chunks(MOST_INPUTS + 64) == 0


@given(t=tokens, n=outputs, k=inputs)
def test_stage_holds_pages_and_the_ring_fits(plan, t, n, k):
    assert plan.stage_bytes(t, n, k) >= plan.page_bytes()
    assert plan.stage_bytes(t, n, k) % 1024 == 0
    assert plan.shared_bytes(t, n, k) <= SHARED_BYTES
    assert 2 <= plan.ring_stages(t, n, k) <= BARRIERS


@given(t=tokens, n=outputs, k=inputs)
def test_planes_of_the_product_do_not_follow_the_shrink(plan, t, n, k):
    assert plan.plane_count(t, n, k, True) == plan.plane_count(t, n, k, False)
