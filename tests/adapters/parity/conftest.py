"""Tiny random bases, adapters made by PEFT itself, and the node's engine beside PEFT's forward pass, all in float32."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, models
from torch import Tensor

from node.adapters.binding import LinearTable
from node.adapters.verify import AdapterVerifier, VerifiedAdapter
from node.config import AdapterSettings, EngineSettings, ModelSettings
from node.engine.engine import open_engine
from node.engine.messages import Submit
from node.request import AdapterTerm, Sampling

VOCAB = 61
ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
IDS = [3, 17, 5, 44, 9, 23, 60, 11, 3]
OTHER_IDS = [8, 8, 31, 2, 50]
BASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama-tied": ("Llama", {"tie_word_embeddings": True}),
    "qwen2": ("Qwen2", {}),  # biases on q, k and v
    "phi3": ("Phi3", {"pad_token_id": 0}),  # q, k and v are one matrix, gate and up another
}


class Base:
    """One base model on disk, its transformers model, and a running engine of it."""

    def __init__(self, name: str, root: Path) -> None:
        prefix, changes = BASES[name]
        sizes = {
            "vocab_size": VOCAB,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 64,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "tie_word_embeddings": False,
        }
        config = getattr(transformers, f"{prefix}Config")(**{**sizes, **changes})
        generator = torch.Generator().manual_seed(11)
        self.model = getattr(transformers, f"{prefix}ForCausalLM")(config).eval()
        with torch.no_grad():
            for parameter_name, parameter in self.model.named_parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(1 + 0.2 * noise if "norm" in parameter_name else 0.25 * noise)
        self.root = root
        self.directory = root / "model"
        self.model.save_pretrained(self.directory)
        words = {f"t{index}": index for index in range(VOCAB)}
        Tokenizer(models.WordLevel(words, unk_token="t0")).save(str(self.directory / "tokenizer.json"))
        self._seen: dict[str, Tensor] = {}
        self._count = 0
        self.engine = open_engine(
            ModelSettings(path=str(self.directory), dtype="float32", device="cpu"),
            EngineSettings(threads=1, kv_cache_bytes=1 << 20, kv_block_size=4, prefix_cache=False, deterministic=True),
            AdapterSettings(memory_bytes=64 << 20, page_rank=8),
            root,
            watch_logits=self._watch,
        )
        ready = self.engine.ready
        self.table = LinearTable(ready.linears)
        self.verifier = AdapterVerifier(self.table, ready.base_id, max_rank=256, max_bytes=1 << 30)

    def adapter(self, name: str, seed: int = 1, **config: Any) -> Path:
        """Have PEFT make an adapter with random factors and save it; returns its directory."""
        directory = self.root / name
        peft = get_peft_model(copy.deepcopy(self.model), LoraConfig(task_type="CAUSAL_LM", **config))
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter_name, parameter in peft.named_parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                if "magnitude" in parameter_name:
                    parameter.mul_(1 + 0.2 * noise)
                elif "lora_" in parameter_name:
                    parameter.copy_(0.2 * noise)
        peft.save_pretrained(directory)
        return directory

    def peft(self, directory: Path, ids: Sequence[int] = IDS) -> Tensor:
        """[len(ids), V]: what PEFT computes with the saved adapter."""
        return logits_of(PeftModel.from_pretrained(copy.deepcopy(self.model), str(directory)).eval(), ids)

    def plain(self, ids: Sequence[int] = IDS) -> Tensor:
        """The base model alone."""
        return logits_of(self.model, ids)

    def verify(self, directory: Path) -> VerifiedAdapter:
        return self.verifier.verify(directory)

    def term(self, directory: Path, weight: float = 1.0) -> AdapterTerm:
        return AdapterTerm(self.verify(directory).adapter_id, str(directory), weight)

    def ours(self, *directories: Path | AdapterTerm, ids: Sequence[int] = IDS) -> Tensor:
        """[len(ids), V]: what the engine computes with these adapters, all terms of one recipe."""
        return self.batch([(directories, ids)])[0]

    def batch(self, requests: Sequence[tuple[Sequence[Path | AdapterTerm], Sequence[int]]]) -> list[Tensor]:
        """Several sequences at once; logits of every prompt position of each."""
        names = []
        for terms, ids in requests:
            self._count += 1
            names.append(f"s{self._count}")
            events = self.engine.add(
                Submit(
                    sequence_id=names[-1],
                    tenant="t",
                    prompt_ids=tuple(ids),
                    terms=tuple(term if isinstance(term, AdapterTerm) else self.term(term) for term in terms),
                    sampling=Sampling(max_new_tokens=1, prompt_logprobs=True),
                )
            )
            assert not events, events
        errors = []
        for _ in range(2_000_000):
            if not self.engine.has_work:
                break
            errors += [event for event in self.engine.step()[0] if event.finish_reason == "error"]
        if errors:
            raise EngineRefusedError(errors[0].error_code, errors[0].error_message)
        return [self._seen.pop(name) for name in names]

    def _watch(self, work: Sequence[Any], logits: Tensor) -> None:
        row = 0
        for item in work:
            count = item.count if item.wants_prompt_logprobs else 1
            part = logits[row : row + count].clone()
            row += count
            known = self._seen.get(item.sequence.id)
            self._seen[item.sequence.id] = part if known is None else torch.cat([known, part])


class EngineRefusedError(Exception):
    """The engine ended a sequence with an error: (code, message)."""


def logits_of(model: Any, ids: Sequence[int]) -> Tensor:
    with torch.no_grad():
        return model(torch.tensor([list(ids)])).logits[0].float()


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Bases by name, each made once."""
    made: dict[str, Base] = {}

    def make(name: str = "llama") -> Base:
        if name not in made:
            made[name] = Base(name, tmp_path_factory.mktemp(name))
        return made[name]

    yield make
    for item in made.values():
        item.engine.close()


@pytest.fixture(scope="session")
def same() -> Callable[[Tensor, Tensor], float]:
    """max|difference| / max|reference|."""
    return lambda ours, reference: float((ours - reference).abs().max() / reference.abs().max())


@pytest.fixture(scope="session")
def edit_config() -> Callable[..., None]:
    """Change fields of a saved adapter_config.json."""

    def edit(directory: Path, **changes: Any) -> None:
        file = directory / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return edit


@pytest.fixture(scope="session")
def refused() -> type[Exception]:
    return EngineRefusedError
