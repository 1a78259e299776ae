"""Derived adapters made by the real process, kept in the real cache."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys

import numpy as np
import pytest

from attribution.record import Merge
from node.adapters.binding import LinearTable
from node.adapters.disk_cache import DiskCache
from node.adapters.merges.derived import Deriver
from node.adapters.merges.recipe import MergeRecipe, MergeSource
from node.adapters.verify import AdapterVerifier
from node.errors import AdapterChangedError, AdapterInvalidError, AdapterUnavailableError
from node.request import LinearShape

TIES = Merge("ties", "0.5", "total")


def in_thread(verifier):
    return lambda directory: asyncio.to_thread(verifier.verify, directory)


@pytest.fixture
def verifier(linears, base_id):
    return AdapterVerifier(LinearTable(linears), base_id, max_rank=64, max_bytes=1 << 20)


@pytest.fixture
async def make_deriver(tmp_path, linears, verifier):
    made = []

    def make(**changes):
        limits = {"max_rank": 64, "max_bytes": 1 << 20, "memory_bytes": 4 << 30, "timeout_s": 60.0} | changes
        cache = DiskCache(tmp_path / "cache", limits.pop("cache_bytes", 1 << 20))
        made.append(Deriver(cache, in_thread(verifier), linears, **limits))
        return made[-1]

    yield make
    for deriver in made:
        await deriver.close()


@pytest.fixture
def recipe(writer, verifier):
    def make(merge=TIES, weights=("0.7", "0.3")):
        sources = []
        for seed, weight in enumerate(weights):
            directory = writer.write(f"source{seed}", writer.tensors(seed=seed))
            sources.append(MergeSource(verifier.verify(directory).adapter_id, directory, weight))
        return MergeRecipe(merge, tuple(sources))

    return make


async def test_derive_makes_an_adapter_once_and_finds_it_again(make_deriver, recipe, tmp_path):
    wanted = recipe()
    first = await make_deriver().derive(wanted)
    made_at = (first.directory / "adapter_model.safetensors").stat().st_mtime_ns

    again = await make_deriver().derive(wanted)

    assert again == first
    assert (again.directory / "adapter_model.safetensors").stat().st_mtime_ns == made_at
    assert first.directory == tmp_path / "cache" / "merged" / wanted.recipe_hash()[:2] / wanted.recipe_hash()
    assert json.loads((first.directory / "recipe.json").read_text())["recipe_hash"] == wanted.recipe_hash()


async def test_derive_callers_at_once_share_one_run(make_deriver, recipe, monkeypatch):
    deriver, started = make_deriver(), []
    real = asyncio.create_subprocess_exec

    async def counting(*arguments, **options):
        started.append(arguments)
        return await real(*arguments, **options)

    monkeypatch.setattr(asyncio, "create_subprocess_exec", counting)
    wanted = recipe()

    found = await asyncio.gather(*(deriver.derive(wanted) for _ in range(5)))

    assert len({item.adapter_id for item in found}) == 1
    assert len(started) == 1


async def test_derive_recipes_with_other_weights_are_other_adapters(make_deriver, recipe):
    deriver = make_deriver()

    found = [await deriver.derive(recipe(weights=weights)) for weights in (("0.7", "0.3"), ("0.7", "0.31"))]

    assert len({item.adapter_id for item in found}) == 2
    assert len({item.directory for item in found}) == 2


async def test_derive_source_replaced_meanwhile_leaves_nothing_behind(make_deriver, recipe, writer, tmp_path):
    wanted = recipe()
    writer.write("source0", writer.tensors(seed=9))

    with pytest.raises(AdapterChangedError):
        await make_deriver().derive(wanted)

    assert [path for path in (tmp_path / "cache").rglob("*") if path.is_file()] == []


async def test_derive_beyond_its_time_is_ended(make_deriver, recipe, tmp_path):
    with pytest.raises(AdapterUnavailableError, match="merge_timeout_s"):
        await make_deriver(timeout_s=0.01).derive(recipe())

    assert list((tmp_path / "cache").rglob("adapter_*")) == []


async def test_derive_beyond_its_memory_is_refused(tmp_path, writer, base_id):
    wide = [LinearShape("model.layers.{layer}.mlp.down_proj", 16384, 64, 1)]
    verifier = AdapterVerifier(LinearTable(wide), base_id, max_rank=64, max_bytes=1 << 24)
    sources = []
    for seed in range(2):
        name = "base_model.model.model.layers.0.mlp.down_proj.lora_"
        values = np.random.default_rng(seed).standard_normal((64, 16384), dtype=np.float32)
        tensors = {
            f"{name}A.weight": ("F32", [64, 16384], values.tobytes()),
            f"{name}B.weight": ("F32", [64, 64], values[:, :64].tobytes()),
        }
        directory = writer.write(f"wide{seed}", tensors, r=64, target_modules=["down_proj"])
        sources.append(MergeSource(verifier.verify(directory).adapter_id, directory, "1"))
    cache = DiskCache(tmp_path / "cache", 1 << 26)
    deriver = Deriver(cache, in_thread(verifier), wide, max_rank=64, max_bytes=1 << 24, memory_bytes=1 << 26, timeout_s=60.0)

    with pytest.raises(AdapterInvalidError, match="merge_memory_bytes") as caught:
        await deriver.derive(MergeRecipe(TIES, tuple(sources)))
    await deriver.close()

    assert caught.value.error_code == "adapter_too_large"


async def test_derive_without_room_in_the_cache_is_refused(make_deriver, recipe):
    with pytest.raises(AdapterUnavailableError) as caught:
        await make_deriver(cache_bytes=100).derive(recipe())

    assert caught.value.error_code == "cache_full"


async def test_derive_a_source_that_became_unreadable_is_its_own_error(make_deriver, recipe):
    wanted = recipe()
    (wanted.sources[1].directory / "adapter_model.safetensors").write_bytes(b"junk")

    with pytest.raises(AdapterInvalidError):
        await make_deriver().derive(wanted)


def test_worker_and_the_room_import_no_torch():
    code = "import sys, node.adapters.merges.worker, node.adapters.merges.derived; sys.exit('torch' in sys.modules)"

    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0
