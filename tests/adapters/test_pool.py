"""Adapter memory with a real loader thread and real files."""

import math
import threading

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from node.adapters.binding import LinearTable
from node.adapters.loader import AdapterLoader
from node.adapters.page_store import HostPages
from node.adapters.pool import AdapterPool
from node.adapters.residency import READY, ResidencyState
from node.adapters.verify import AdapterVerifier
from node.errors import ConfigError
from node.kernels.layout import PageLayout
from node.request import AdapterTerm, LinearShape

SHAPES = (
    LinearShape("model.layers.{layer}.self_attn.q_proj", 16, 16, 2),
    LinearShape("model.layers.{layer}.self_attn.k_proj", 16, 8, 2),
    LinearShape("model.layers.{layer}.self_attn.v_proj", 16, 8, 2),
    LinearShape("model.layers.{layer}.self_attn.o_proj", 16, 16, 2),
    LinearShape("model.layers.{layer}.mlp.gate_proj", 16, 24, 2),
    LinearShape("model.layers.{layer}.mlp.up_proj", 16, 24, 2),
    LinearShape("model.layers.{layer}.mlp.down_proj", 24, 16, 2),
    LinearShape("lm_head", 16, 32, 1),
)
CONFIGS = {
    "small": {"r": 3, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"]},
    "other": {"r": 4, "lora_alpha": 4, "target_modules": ["k_proj"]},
    "large": {"r": 10, "lora_alpha": 5, "target_modules": ["q_proj"], "use_rslora": True},
    "patterned": {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj", "down_proj"],
        "rank_pattern": {"down_proj": 7, "layers.1.self_attn.q_proj": 2},
        "alpha_pattern": {"down_proj": 21},
    },
}


@pytest.fixture(scope="module")
def terms(tmp_path_factory):
    """Saved adapters, verified, by name."""
    root = tmp_path_factory.mktemp("adapters")
    verifier = AdapterVerifier(LinearTable(SHAPES), "b" * 64, max_rank=64, max_bytes=1 << 20)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
    )
    found = {}
    for name, options in CONFIGS.items():
        model = get_peft_model(LlamaForCausalLM(config), LoraConfig(task_type="CAUSAL_LM", **options))
        for parameter_name, parameter in model.named_parameters():
            if "lora_" in parameter_name:
                parameter.data = torch.randn_like(parameter)
        model.save_pretrained(root / name)
        found[name] = AdapterTerm(verifier.verify(root / name).adapter_id, str(root / name), 1.0)
    return found


class Clock:
    now_s = 0.0

    def __call__(self):
        return self.now_s


class Room:
    """A pool of `page_count` pages of 4 ranks, and its loader."""

    def __init__(self, page_count, dtype=torch.float32):
        modules = [
            (shape.name.replace("{layer}", str(layer)), shape.in_features, shape.out_features)
            for layer in range(2)
            for shape in SHAPES[:-1]
        ]
        self.layout = PageLayout([*modules, ("lm_head", 16, 32)], 4)
        self.rung = threading.Semaphore(0)
        self.clock = Clock()
        self.loader = AdapterLoader(self.layout, LinearTable(SHAPES), max_rank=64, max_bytes=1 << 20, wake=self.rung.release)
        page_bytes = self.layout.page_elements * dtype.itemsize
        pages = HostPages(self.layout, dtype, memory_bytes=page_count * page_bytes, max_rank=64)
        self.pool = AdapterPool(self.layout, pages, self.loader, clock=self.clock)

    def load(self, *terms):
        """Ask for a recipe until it is decided; waits for the loader's bell, never for time."""
        for _ in range(20):
            self.pool.begin_step()
            answer = self.pool.ensure(terms)
            if answer.state is not ResidencyState.LOADING:
                return answer
            if len(self.pool._loading._arrivals):
                assert self.rung.acquire(timeout=30)
            else:
                return answer
        raise AssertionError("the recipe was never decided")


@pytest.fixture
def make_room():
    rooms = []

    def make(*args, **options):
        rooms.append(Room(*args, **options))
        return rooms[-1]

    yield make
    for room in rooms:
        room.pool.close()


def matrices(room, adapter_id, module):
    """A [r, in] and B [out, r] as the pages have them, and the scale."""
    pool, span, slot = room.pool.tensors, room.layout.spans[module], room.pool.slot_of(adapter_id)
    rank = int(pool.ranks[span.index, slot])
    rows_a, rows_b = [], []
    for index in range(rank):
        page = pool.pages[int(pool.slot_pages[slot, index // 4])]
        rows_a.append(page[span.a_offset + index % 4 * span.in_features :][: span.in_features])
        rows_b.append(page[span.b_offset + index % 4 * span.out_features :][: span.out_features])
    return torch.stack(rows_a), torch.stack(rows_b).T, float(pool.scales[span.index, slot])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", list(CONFIGS))
def test_load_writes_the_files_matrices(make_room, terms, name, dtype):
    from safetensors.torch import load_file

    room = make_room(8, dtype=dtype)
    assert room.load(terms[name]) == READY
    weights = load_file(f"{terms[name].directory}/adapter_model.safetensors")
    names = {key.removeprefix("base_model.model.").rsplit(".lora_", 1)[0] for key in weights}
    for module in names:
        a, b, _ = matrices(room, terms[name].adapter_id, module)
        assert torch.equal(a, weights[f"base_model.model.{module}.lora_A.weight"].to(dtype))
        assert torch.equal(b, weights[f"base_model.model.{module}.lora_B.weight"].to(dtype))
    untouched = [span.index for module, span in room.layout.spans.items() if module not in names]
    assert not room.pool.tensors.ranks[untouched].any()


def test_scales_follow_patterns_and_rslora(make_room, terms):
    room = make_room(8)
    room.load(terms["patterned"], terms["large"])
    of = lambda name, module: matrices(room, terms[name].adapter_id, module)[2]  # noqa: E731
    assert of("patterned", "model.layers.0.mlp.down_proj") == pytest.approx(21 / 7)
    assert of("patterned", "model.layers.1.self_attn.q_proj") == pytest.approx(8 / 2)
    assert of("patterned", "model.layers.0.self_attn.q_proj") == pytest.approx(8 / 4)
    assert of("large", "model.layers.0.self_attn.q_proj") == pytest.approx(5 / math.sqrt(10))


def test_least_recently_used_leaves_first(make_room, terms):
    room = make_room(2)
    room.load(terms["small"])
    room.load(terms["other"])
    room.load(terms["small"])
    room.load(terms["patterned"])
    assert terms["patterned"].adapter_id in room.pool.resident_ids
    assert terms["other"].adapter_id not in room.pool.resident_ids
    assert room.pool.evictions_total == 2  # patterned takes two pages


def test_pinned_adapter_never_leaves(make_room, terms):
    room = make_room(1)
    room.load(terms["small"])
    room.pool.pin([terms["small"]])
    assert room.load(terms["other"]).state is ResidencyState.LOADING
    assert room.pool.resident_ids == (terms["small"].adapter_id,)
    room.pool.unpin([terms["small"]])
    assert room.load(terms["other"]) == READY


def test_adapter_wanted_earlier_in_the_step_is_not_evicted_by_a_later_want(make_room, terms):
    room = make_room(1)
    room.load(terms["small"])
    room.load(terms["other"])
    room.load(terms["small"])
    room.pool.begin_step()
    assert room.pool.ensure([terms["small"]]) == READY
    assert room.pool.ensure([terms["other"]]).state is ResidencyState.LOADING
    assert room.pool.resident_ids == (terms["small"].adapter_id,)


def test_evicted_adapter_leaves_no_rank_behind(make_room, terms):
    room = make_room(1)
    room.load(terms["small"])
    room.load(terms["other"])
    ranks = room.pool.tensors.ranks
    assert set(ranks.sum(dim=1).tolist()) == {0, 4}
    assert int((ranks != 0).sum()) == 2  # k_proj of two layers


def test_recipe_larger_than_memory_is_refused_with_both_numbers(make_room, terms):
    room = make_room(2)
    answer = room.load(terms["large"])
    assert (answer.state, answer.code) == (ResidencyState.FAILED, "adapter_too_large")
    assert "3 pages" in answer.message
    assert "2 pages" in answer.message


def test_recipe_of_more_adapters_than_slots_is_refused(make_room, terms):
    room = make_room(1)
    assert room.load(terms["small"], terms["other"]).code == "adapter_too_large"


def test_missing_files_fail_and_may_be_tried_again(make_room, terms, tmp_path):
    room = make_room(4)
    ghost = AdapterTerm("1" * 64, str(tmp_path / "ghost"), 1.0)
    assert room.load(ghost).state is ResidencyState.FAILED
    room.clock.now_s += 10
    room.pool.begin_step()
    assert room.pool.ensure([ghost]).state is ResidencyState.LOADING


def test_failed_fill_gives_its_pages_back(make_room, terms):
    room = make_room(1)
    liar = AdapterTerm("2" * 64, terms["small"].directory, 1.0)
    assert room.load(liar).code == "adapter_digest_mismatch"
    assert room.load(terms["other"]) == READY


def test_memory_below_one_page_is_a_configuration_error(make_room):
    with pytest.raises(ConfigError, match="one page"):
        make_room(0)


# ---- wishes


def test_prefetched_adapter_is_resident_before_anybody_asks(make_room, terms):
    room = make_room(8)
    room.pool.prefetch(terms["small"])
    while room.pool.has_wishes:
        room.pool.begin_step()
        room.pool.grant_wishes()
        if len(room.pool._loading._arrivals):
            assert room.rung.acquire(timeout=30)

    assert room.pool.resident_ids == (terms["small"].adapter_id,)


def test_prefetch_of_what_never_fits_is_given_up(make_room, terms):
    room = make_room(2)
    room.pool.prefetch(terms["large"])
    for _ in range(4):
        room.pool.begin_step()
        room.pool.grant_wishes()
        if len(room.pool._loading._arrivals):
            assert room.rung.acquire(timeout=30)

    assert not room.pool.has_wishes


def test_prefetch_never_pushes_out_what_the_step_wants(make_room, terms):
    room = make_room(1)
    assert room.load(terms["small"]) is READY
    room.pool.prefetch(terms["other"])
    for _ in range(4):
        room.pool.begin_step()
        assert room.pool.ensure((terms["small"],)) is READY
        room.pool.grant_wishes()
        if len(room.pool._loading._arrivals):
            assert room.rung.acquire(timeout=30)

    assert room.pool.resident_ids == (terms["small"].adapter_id,)


def test_dismissed_adapter_leaves_once_nobody_runs_with_it(make_room, terms):
    room = make_room(8)
    room.load(terms["small"])
    room.pool.pin((terms["small"],))
    room.pool.dismiss(terms["small"].adapter_id)
    room.pool.grant_wishes()
    held = room.pool.resident_ids

    room.pool.unpin((terms["small"],))
    assert room.pool.has_wishes
    room.pool.begin_step()
    room.pool.grant_wishes()

    assert held == (terms["small"].adapter_id,)
    assert room.pool.resident_ids == ()
    assert not room.pool.has_wishes


def test_dismissed_adapter_that_somebody_waits_for_leaves_after_that(make_room, terms):
    room = make_room(8)
    room.load(terms["small"])
    room.pool.dismiss(terms["small"].adapter_id)
    room.pool.begin_step()
    room.pool.ensure((terms["small"],))
    room.pool.grant_wishes()
    assert terms["small"].adapter_id in room.pool.resident_ids

    room.pool.begin_step()
    room.pool.grant_wishes()
    assert not room.pool.resident_ids
    assert not room.pool.has_wishes


def test_dismiss_of_an_unknown_adapter_is_nothing_to_wait_for(make_room):
    room = make_room(8)
    room.pool.dismiss("f" * 64)

    assert not room.pool.has_wishes
