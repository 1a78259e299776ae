"""Tiny random models of every family, saved as checkpoints, and a small driver that runs a decoder step by step."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import Tensor

from node.kernels.layout import PageLayout
from node.kernels.lora import LoraPool, lora_rows
from node.kernels.ops import Kernels
from node.models.inputs import KVCache, StepInputs
from node.models.load import LoadedModel, load_model, make_kv_cache, open_source
from node.models.source import resolve

BLOCK_SIZE = 4
VOCAB = 97

_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama-tied": ("Llama", {"tie_word_embeddings": True}),
    "llama-biased": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-wide-heads": ("Llama", {"head_dim": 32}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "mistral-sliding": ("Mistral", {"sliding_window": 7}),
    "qwen2": ("Qwen2", {}),
    "qwen2-sliding": ("Qwen2", {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}),
    "qwen3": ("Qwen3", {"head_dim": 32}),
    "phi3": ("Phi3", {"pad_token_id": 0}),
    "phi3-sliding": ("Phi3", {"pad_token_id": 0, "sliding_window": 5, "tie_word_embeddings": True}),
    "qwen3-biased-sliding": (
        "Qwen3",
        {"head_dim": 16, "attention_bias": True, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2},
    ),
}
ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ADAPTERS: dict[str, dict[str, Any]] = {
    "rank1": {"r": 1, "lora_alpha": 3, "target_modules": ALL_LINEAR},
    "rank4": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
    "rank8": {"r": 8, "lora_alpha": 16, "target_modules": ALL_LINEAR},
    "rank20": {"r": 20, "lora_alpha": 5, "target_modules": ["k_proj", "up_proj", "down_proj"]},
    "rank64": {"r": 64, "lora_alpha": 16, "target_modules": ALL_LINEAR},
    "rslora": {"r": 8, "lora_alpha": 4, "target_modules": ALL_LINEAR, "use_rslora": True},
    "rank_pattern": {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ALL_LINEAR,
        "rank_pattern": {"q_proj": 20, "layers.1.mlp.up_proj": 9},
    },
    "alpha_pattern": {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ALL_LINEAR,
        "alpha_pattern": {"o_proj": 1, "layers.0.mlp.down_proj": 40},
    },
    "head": {"r": 8, "lora_alpha": 8, "target_modules": ["lm_head", "q_proj"]},
}


@dataclass
class Tiny:
    """A random transformers model and the directory it was saved to."""

    reference: Any
    directory: Path

    def logits(self, ids: list[int]) -> Tensor:
        """[len(ids), V] float32, computed by transformers."""
        with torch.no_grad():
            return self.reference(torch.tensor([ids])).logits[0].float()


MakeTiny = Callable[..., Tiny]


@pytest.fixture(scope="session")
def make_tiny(tmp_path_factory: pytest.TempPathFactory) -> MakeTiny:
    """Build and save a random model. Every parameter is random, norms and biases too, so that none can be left out unseen."""

    def make(family: str, max_shard_size: str = "1GB", **overrides: Any) -> Tiny:
        prefix, changes = FAMILIES[family]
        config = getattr(transformers, prefix + "Config")(**{**_SIZES, **changes, **overrides})
        generator = torch.Generator().manual_seed(len(family))
        model = getattr(transformers, prefix + "ForCausalLM")(config).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(1 + 0.2 * noise if "norm" in name else 0.2 * noise)
        directory = tmp_path_factory.mktemp(family)
        model.save_pretrained(directory, max_shard_size=max_shard_size)
        return Tiny(model, directory)

    return make


@pytest.fixture(scope="session")
def tiny_llama(make_tiny: MakeTiny) -> Tiny:
    return make_tiny("llama")


@pytest.fixture(scope="module", params=["reference", "cpp"])
def kernels(request: pytest.FixtureRequest) -> Kernels:
    """Both kernel paths; the compiled one where it is built."""
    kernels = Kernels.load("reference" if request.param == "reference" else "auto", threads=1)
    if request.param == "cpp" and kernels.name == "reference":
        pytest.skip("the C++ kernels are not built, or this CPU cannot run them")
    return kernels


@pytest.fixture(scope="session")
def load() -> Callable[..., LoadedModel]:
    """Load a directory or path; in float32 with the torch reference unless told otherwise."""

    def load(path: Path | str, **options: Any) -> LoadedModel:
        options.setdefault("kernels", Kernels.load("reference"))
        source = open_source(resolve(str(path)), options.get("max_model_len"), options.get("hash_cache"))
        return load_model(source, options.get("dtype", torch.float32), options["kernels"], options.get("page_rank", 8))

    return load


@dataclass
class Driver:
    """Runs sequences through a decoder: scattered cache blocks, any mix of chunks in a step."""

    loaded: LoadedModel
    kv: KVCache
    pool: LoraPool | None = None
    ids: dict[str, list[int]] = field(default_factory=dict)
    terms: dict[str, tuple[tuple[int, float], ...]] = field(default_factory=dict)
    done: dict[str, int] = field(default_factory=dict)
    blocks: dict[str, list[int]] = field(default_factory=dict)
    free: list[int] = field(default_factory=list)

    def add(self, name: str, ids: list[int], terms: tuple[tuple[int, float], ...] = ()) -> None:
        self.ids[name], self.terms[name], self.done[name], self.blocks[name] = list(ids), terms, 0, []

    def inputs(self, rows: dict[str, int]) -> StepInputs:
        """Lay out a step that advances each named sequence by that many tokens and wants the logits of all of them."""
        tokens, positions, slots, starts, lengths = [], [], [], [0], []
        for name, count in rows.items():
            first, last = self.done[name], self.done[name] + count
            while len(self.blocks[name]) * BLOCK_SIZE < last:
                self.blocks[name].append(self.free.pop())
            tokens += self.ids[name][first:last]
            positions += range(first, last)
            slots += [self.blocks[name][p // BLOCK_SIZE] * BLOCK_SIZE + p % BLOCK_SIZE for p in range(first, last)]
            starts.append(starts[-1] + count)
            lengths.append(last)
            self.done[name] = last
        width = max(len(self.blocks[name]) for name in rows)
        return StepInputs(
            token_ids=torch.tensor(tokens),
            positions=torch.tensor(positions),
            kv_slots=torch.tensor(slots),
            query_start=torch.tensor(starts, dtype=torch.int32),
            context_lens=torch.tensor(lengths, dtype=torch.int32),
            block_tables=torch.tensor([self.blocks[n] + [0] * (width - len(self.blocks[n])) for n in rows], dtype=torch.int32),
            logit_rows=torch.arange(len(tokens)),
            lora=lora_rows([self.terms[name] for name in rows], list(rows.values())),
        )

    def forward(self, inputs: StepInputs) -> Tensor:
        return self.loaded.model.forward(inputs, self.kv, self.pool)

    def step(self, rows: dict[str, int]) -> dict[str, Tensor]:
        """Advance each named sequence by that many tokens; return the logits [count, V] of each."""
        logits = self.forward(self.inputs(rows)).split(list(rows.values()))
        return dict(zip(rows, logits, strict=True))

    def run(self, schedule: list[dict[str, int]]) -> dict[str, Tensor]:
        """Logits of all positions of every sequence after all steps of the schedule."""
        parts: dict[str, list[Tensor]] = {name: [] for name in self.ids}
        for rows in schedule:
            for name, logits in self.step(rows).items():
                parts[name].append(logits)
        return {name: torch.cat(found) for name, found in parts.items() if found}

    def greedy(self, count: int) -> dict[str, list[int]]:
        """Prefill every sequence in one step, then decode all together, the most likely token each time."""
        rows = {name: len(ids) for name, ids in self.ids.items()}
        answers: dict[str, list[int]] = {name: [] for name in self.ids}
        for _ in range(count):
            for name, logits in self.step(rows).items():
                token = int(logits[-1].argmax())
                answers[name].append(token)
                self.ids[name].append(token)
            rows = dict.fromkeys(self.ids, 1)
        return answers


@pytest.fixture
def drive() -> Callable[..., Driver]:
    def drive(loaded: LoadedModel, pool: LoraPool | None = None, tokens: int = 1600) -> Driver:
        block_bytes = 2 * loaded.spec.layer_count * loaded.spec.kv_size * BLOCK_SIZE * loaded.dtype.itemsize
        kv = make_kv_cache(loaded.spec, tokens // BLOCK_SIZE * block_bytes, BLOCK_SIZE, loaded.dtype)
        for tensor in (*kv.keys, *kv.values):
            tensor.fill_(1e4)  # what a sequence must never see
        free = list(range(1, kv.block_count))
        random.Random(0).shuffle(free)
        return Driver(loaded, kv, pool, free=free)

    return drive


@pytest.fixture(scope="session")
def mixed_schedule() -> Callable[[dict[str, int]], list[dict[str, int]]]:
    """A schedule for sequences of given lengths: staggered starts, chunks of 1 to 6 tokens, prefill and decode in one step."""

    def schedule(lengths: dict[str, int]) -> list[dict[str, int]]:
        rng, left, steps = random.Random(1), dict(lengths), []
        while any(left.values()):
            ready = [name for name, count in left.items() if count and rng.random() < 0.8]
            rows = {name: min(left[name], rng.choice([1, 1, 3, 6])) for name in ready}
            for name, count in rows.items():
                left[name] -= count
            if rows:
                steps.append(rows)
        return steps

    return schedule


@pytest.fixture(scope="session")
def prompts() -> dict[str, list[int]]:
    rng = random.Random(3)
    return {name: [rng.randrange(VOCAB) for _ in range(length)] for name, length in (("a", 29), ("b", 7), ("c", 16), ("d", 1))}


@pytest.fixture(scope="session")
def error() -> Callable[[Tensor, Tensor], float]:
    """max|difference| / max|reference|: how the project states the error of logits."""
    return lambda ours, reference: float((ours - reference).abs().max() / reference.abs().max())


@pytest.fixture(scope="session")
def lora_configs() -> Callable[..., dict[str, LoraConfig]]:
    """New PEFT configurations of every kind, or of the kinds named: ranks 1 to 64, rsLoRA, patterns, and the head."""
    return lambda *names: {name: LoraConfig(**ADAPTERS[name]) for name in names or ADAPTERS}


@pytest.fixture(scope="session")
def peft_pool() -> Callable[..., tuple[Any, LoraPool]]:
    """Add random adapters to a transformers model; return the PEFT model and a pool whose slot i holds the i-th adapter."""

    def peft_pool(
        reference: Any, adapters: dict[str, LoraConfig], layout: PageLayout, b_scale: float = 1.0
    ) -> tuple[Any, LoraPool]:
        model = _with_adapters(reference, adapters, b_scale)
        return model, _filled_pool(model, list(adapters), layout)

    return peft_pool


def _with_adapters(reference: Any, adapters: dict[str, LoraConfig], b_scale: float) -> Any:
    """The PEFT model with every adapter, A and B random, no two alike."""
    generator = torch.Generator().manual_seed(5)
    first, *others = adapters
    model = get_peft_model(reference, adapters[first], adapter_name=first).eval()
    for name in others:
        model.add_adapter(name, adapters[name])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                scale = b_scale if "lora_B" in name else 1.0
                parameter.copy_(scale * torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5)
    return model


def _filled_pool(model: Any, adapters: list[str], layout: PageLayout) -> LoraPool:
    """PEFT's adapters in scattered pages, unused ranks poisoned."""
    ranks = [max([model.peft_config[name].r, *model.peft_config[name].rank_pattern.values()]) for name in adapters]
    counts = [layout.pages_for_rank(rank) for rank in ranks]
    order = torch.randperm(sum(counts), generator=torch.Generator().manual_seed(2)).int()
    slot_pages = torch.full((len(adapters), max(counts)), -1, dtype=torch.int32)
    for slot, pages in enumerate(order.split(counts)):
        slot_pages[slot, : len(pages)] = pages
    pool = LoraPool(
        pages=torch.full((order.numel(), layout.page_elements), float("nan")),
        slot_pages=slot_pages,
        ranks=torch.zeros(layout.module_count, len(adapters), dtype=torch.int32),
        scales=torch.zeros(layout.module_count, len(adapters)),
        page_rank=layout.page_rank,
    )
    modules = dict(model.named_modules())
    for span in layout.spans.values():
        module = modules.get("base_model.model." + span.name)
        for slot, name in enumerate(adapters):
            if name not in getattr(module, "lora_A", {}):
                continue
            a, b = module.lora_A[name].weight.detach(), module.lora_B[name].weight.detach().T
            pool.ranks[span.index, slot], pool.scales[span.index, slot] = a.shape[0], module.scaling[name]
            for rank in range(a.shape[0]):
                page = pool.pages[pool.slot_pages[slot, rank // layout.page_rank]]
                row = rank % layout.page_rank
                page[span.a_offset + row * span.in_features :][: span.in_features] = a[rank]
                page[span.b_offset + row * span.out_features :][: span.out_features] = b[rank]
    return pool
