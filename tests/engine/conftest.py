"""A tiny random Llama with a tokenizer, PEFT adapters for it, and an in-process engine."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM

from node.adapters.binding import LinearTable
from node.adapters.residency import READY, Residency
from node.adapters.verify import AdapterVerifier
from node.config import AdapterSettings, EngineSettings, ModelSettings
from node.engine.blocks import BlockPool
from node.engine.engine import Engine, open_engine
from node.engine.messages import Submit
from node.engine.running import Running
from node.engine.sequence import Sequence
from node.request import AdapterTerm, Sampling

VOCAB = 101


@dataclass(frozen=True)
class World:
    """A checkpoint and three adapters of it, by name."""

    model_dir: Path
    adapters: dict[str, Path]


Build = Callable[..., World]


@pytest.fixture(scope="session")
def build_world(tmp_path_factory) -> Build:
    """Makes a world: `adapters` are (name, rank, target modules) and more of PEFT's settings, if any; their numbers are
    drawn with deviation `adapter_std`."""

    def build(adapters, adapter_std, **sizes) -> World:
        root = tmp_path_factory.mktemp("world")
        torch.manual_seed(7)
        shape = {"vocab_size": VOCAB, "num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2}
        LlamaForCausalLM(LlamaConfig(**shape, **sizes)).eval().save_pretrained(root / "model")
        words = models.WordLevel({f"t{i}": i for i in range(VOCAB)}, unk_token="t0")
        Tokenizer(words).save(str(root / "model" / "tokenizer.json"))
        for name, rank, targets, *more in adapters:
            config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets, task_type="CAUSAL_LM", **dict(*more))
            peft = get_peft_model(LlamaForCausalLM.from_pretrained(root / "model"), config)
            generator = torch.Generator().manual_seed(rank)
            for parameter_name, parameter in peft.named_parameters():
                if "lora_" in parameter_name and "magnitude" not in parameter_name:
                    parameter.data = torch.randn(parameter.shape, generator=generator) * adapter_std
            peft.save_pretrained(root / name)
        return World(root / "model", {name: root / name for name, *_ in adapters})

    return build


@pytest.fixture(scope="session")
def world(build_world) -> World:
    return build_world(
        (("x", 4, ["q_proj", "v_proj"]), ("y", 8, "all-linear"), ("z", 20, ["down_proj", "o_proj"])),
        0.15,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        max_position_embeddings=256,
        initializer_range=0.2,
    )


class Pins:
    """Adapter memory in which everything is loaded; counts pins."""

    def __init__(self) -> None:
        self.count = 0

    def begin_step(self) -> None: ...

    def holds(self, terms) -> bool:
        return True

    def ensure(self, terms) -> Residency:
        return READY

    def pin(self, terms) -> None:
        self.count += len(terms)

    def unpin(self, terms) -> None:
        self.count -= len(terms)


@pytest.fixture
def make_sequence():
    """Sequences of adapter x, as the scheduler keeps them."""

    def make(index, prompt_count=6, new=4, tenant="t", **sampling) -> Sequence:
        terms = (AdapterTerm("x", "/x", 1.0),)
        prompt = tuple(range(1, prompt_count + 1))
        asked = Sampling(max_new_tokens=new, **sampling)
        submit = Submit(sequence_id=f"s{index}", tenant=tenant, prompt_ids=prompt, terms=terms, sampling=asked)
        return Sequence(submit, index, b"")

    return make


@pytest.fixture
def make_running():
    """Places over blocks of four tokens, and adapter memory that counts pins."""

    def make(block_count, place_count) -> Running:
        return Running(BlockPool(block_count, 4, False), Pins(), place_count)

    return make


class Driver:
    """Feeds an engine on this thread and collects what comes out."""

    def __init__(self, engine: Engine, world: World, bell: threading.Event) -> None:
        self.engine = engine
        self.bell = bell
        self.world = world
        self.events: dict = {}
        verifier = AdapterVerifier(LinearTable(engine.ready.linears), engine.ready.base_id, max_rank=256, max_bytes=1 << 30)
        self.ids = {name: verifier.verify(path).adapter_id for name, path in world.adapters.items()}

    def term(self, name: str, weight: float = 1.0) -> AdapterTerm:
        return AdapterTerm(self.ids[name], str(self.world.adapters[name]), weight)

    def add(self, sequence_id, prompt, adapters=(), tenant="t", choice_index=0, embeds=False, **sampling) -> None:
        terms = tuple(self.term(item) if isinstance(item, str) else item for item in adapters)
        sampling = Sampling(**{"max_new_tokens": 8, **sampling})
        self.record(
            self.engine.add(
                Submit(
                    sequence_id=sequence_id,
                    tenant=tenant,
                    prompt_ids=tuple(prompt),
                    terms=terms,
                    sampling=sampling,
                    choice_index=choice_index,
                    embeds=embeds,
                )
            )
        )

    def record(self, events) -> None:
        for event in events:
            self.events.setdefault(event.sequence_id, []).append(event)

    def run(self) -> None:
        for _ in range(20_000):
            if not self.engine.has_work:
                return
            events, has_computed = self.engine.step()
            self.record(events)
            if not has_computed:  # as the engine's loop sleeps: a loader needs the interpreter too
                self.bell.wait(0.001)
                self.bell.clear()
        raise AssertionError(f"the engine did not finish: {self.engine.stats()}")

    def tokens(self, sequence_id) -> list[int]:
        return [token.token_id for event in self.events[sequence_id] for token in event.tokens]

    def last(self, sequence_id):
        return self.events[sequence_id][-1]


@pytest.fixture
def make_driver(world, tmp_path):
    engines = []

    def make(dtype="float32", adapters=None, model=None, device="cpu", watch=None, max_model_len=None, **settings) -> Driver:
        bell = threading.Event()
        engine = open_engine(
            ModelSettings(path=str(model or world.model_dir), dtype=dtype, device=device, max_model_len=max_model_len),
            EngineSettings(**{"threads": 1, "kv_cache_bytes": 1 << 20, "kv_block_size": 4, **settings}),
            AdapterSettings(**{"memory_bytes": 4 << 20, **(adapters or {})}),
            tmp_path,
            wake=bell.set,
            watch_logits=watch,
        )
        engines.append(engine)
        return Driver(engine, world if model is None else World(Path(model), {}), bell)  # the adapters are of the world's model

    yield make
    for engine in engines:
        engine.close()


@pytest.fixture
def driver(make_driver) -> Driver:
    return make_driver()
