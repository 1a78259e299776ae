"""The packaged model against transformers reading the same GGUF file in float32."""

from __future__ import annotations

import random
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM

from node.models.source import PACKAGED_MODEL, resolve

TEXTS = {
    "chat": "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n",
    "prose": "It was the best of times, it was the worst of times,",
    "code": "def fibonacci(n):\n    if n < 2:\n        return n\n    return",
}
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ADAPTERS = {
    "small": LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]),
    "wide": LoraConfig(r=20, lora_alpha=16, target_modules=ALL, use_rslora=True, rank_pattern={"down_proj": 8}),
}


@pytest.fixture(scope="module")
def files():
    return resolve(PACKAGED_MODEL)


@pytest.fixture(scope="module")
def reference(files):
    return AutoModelForCausalLM.from_pretrained(str(files.directory), gguf_file=files.weights[0].name, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def loaded(load, kernels):
    return load(PACKAGED_MODEL, kernels=kernels, max_model_len=512)


@pytest.fixture(scope="module")
def token_ids(files, tmp_path_factory):
    from tokenizers import Tokenizer

    from node.models.tokenizer_files import write_tokenizer

    directory = write_tokenizer(files, (2,), tmp_path_factory.mktemp("tokenizer"))
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    return {name: tokenizer.encode(text).ids for name, text in TEXTS.items()}


def run(model, ids):
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0]


def test_smollm2_logits_equal_transformers(reference, loaded, drive, token_ids, mixed_schedule, error):
    driver = drive(loaded)
    for name, ids in token_ids.items():
        driver.add(name, ids)

    logits = driver.run(mixed_schedule({name: len(ids) for name, ids in token_ids.items()}))

    for name, ids in token_ids.items():
        assert error(logits[name], run(reference, ids)) < 1e-4, name


def test_smollm2_greedy_tokens_equal_transformers_generate(reference, loaded, drive, token_ids):
    driver = drive(loaded)
    for name, ids in token_ids.items():
        driver.add(name, ids)

    answers = driver.greedy(12)

    for name, ids in token_ids.items():
        prompt = torch.tensor([ids])
        generated = reference.generate(
            prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=12, eos_token_id=-1, pad_token_id=0
        )
        assert answers[name] == generated[0, len(ids) :].tolist(), name


@pytest.fixture
def adapted(reference, loaded, peft_pool):
    """The PEFT model and a pool of its adapters; afterwards the reference is as it was."""
    model, pool = peft_pool(reference, ADAPTERS, loaded.layout, b_scale=0.02)
    yield model, pool
    model.unload()


def test_smollm2_adapters_in_one_batch_equal_peft(adapted, loaded, drive, token_ids, error):
    model, pool = adapted
    driver = drive(loaded, pool)
    rng = random.Random(4)
    terms = {"chat": ((0, 1.0),), "prose": ((1, 1.0),), "code": ()}
    for name, ids in token_ids.items():
        driver.add(name, ids, terms[name])
    first = {name: rng.randrange(2, len(ids)) for name, ids in token_ids.items()}

    logits = driver.run([first, {name: len(ids) - first[name] for name, ids in token_ids.items()}])

    for name, adapter in (("chat", "small"), ("prose", "wide")):
        model.set_adapter(adapter)
        assert error(logits[name], run(model, token_ids[name])) < 1e-4, name
    with model.disable_adapter():
        assert error(logits["code"], run(model, token_ids["code"])) < 1e-4
        assert error(logits["prose"], run(model, token_ids["prose"])) > 1e-2


def test_smollm2_bfloat16_load_stays_small():
    """The engine process may take 1.2 GB in all; loading must leave most of that to the caches.

    Weights and the embedding's two orders are 326 MiB, the file 93 MiB, and the largest matrix passes through float32 (108 MiB).
    What the libraries take is measured before and left out: a torch built for GPUs takes 260 MiB more than one that is not.
    """
    program = (
        "import torch; from node.models.load import load_model; from node.models.source import resolve;"
        "from node.kernels.ops import Kernels;"
        "peak = lambda: int([line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')][0]);"
        f"files, kernels = resolve({PACKAGED_MODEL!r}), Kernels.load(); before = peak();"
        "load_model(files, torch.bfloat16, kernels); print(peak() - before)"
    )

    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)

    assert int(result.stdout) < 600 * 1024, "KiB"  # not ru_maxrss, which a child inherits from its parent
