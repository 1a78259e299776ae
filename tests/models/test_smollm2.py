"""The packaged model against transformers reading the same GGUF file in float32."""

from __future__ import annotations

import random
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

from node.models.source import PACKAGED_MODEL, resolve

TEXTS = {
    "chat": "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n",
    "prose": "It was the best of times, it was the worst of times,",
    "code": "def fibonacci(n):\n    if n < 2:\n        return n\n    return",
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
def adapted(reference, loaded, peft_pool, lora_configs):
    """The PEFT model, a pool of its adapters and their names; afterwards the reference is as it was."""
    configs = lora_configs()
    del configs["head"]  # SmolLM2's is tied, and PEFT would change the embedding with it
    model, pool = peft_pool(reference, configs, loaded.layout, b_scale=0.05)
    yield model, pool, list(configs)
    model.unload()


def test_smollm2_adapters_in_one_batch_equal_peft(adapted, loaded, drive, token_ids, error):
    model, pool, adapters = adapted
    driver = drive(loaded, pool)
    rng, texts = random.Random(4), list(token_ids.values())
    ids = {name: texts[index % len(texts)] for index, name in enumerate([*adapters, "base"])}
    for slot, name in enumerate(adapters):
        driver.add(name, ids[name], ((slot, 1.0),))
    driver.add("base", ids["base"])
    first = {name: rng.randrange(2, len(sequence)) for name, sequence in ids.items()}

    logits = driver.run([first, {name: len(sequence) - first[name] for name, sequence in ids.items()}])

    with model.disable_adapter():
        plain = {name: run(model, sequence) for name, sequence in ids.items()}
    assert error(logits["base"], plain["base"]) < 1e-4
    for name in adapters:
        model.set_adapter(name)
        assert error(logits[name], run(model, ids[name])) < 1e-4, name
        assert error(logits[name], plain[name]) > 1e-3, f"{name} changes nothing: this test would prove nothing"


def test_smollm2_greedy_tokens_with_adapters_equal_peft_generate(adapted, loaded, drive, token_ids):
    model, pool, adapters = adapted
    driver = drive(loaded, pool)
    for slot, name in enumerate(adapters):
        driver.add(name, token_ids["prose"], ((slot, 1.0),))

    answers = driver.greedy(6)

    prompt = torch.tensor([token_ids["prose"]])
    options = {"do_sample": False, "max_new_tokens": 6, "eos_token_id": -1, "pad_token_id": 0}
    for name in adapters:
        model.set_adapter(name)
        generated = model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), **options)
        assert answers[name] == generated[0, prompt.shape[1] :].tolist(), name


def test_smollm2_bfloat16_load_stays_small():
    """The engine process may take 1.2 GB in all; loading must leave most of that to the caches.

    Weights and the embedding's two orders are 326 MiB, the file 93 MiB, and the largest matrix passes through float32 (108 MiB).
    What the libraries take is measured before and left out: a torch built for GPUs takes 260 MiB more than one that is not.
    """
    program = (
        "import torch; from node.models.load import load_model, open_source; from node.models.source import resolve;"
        "from node.kernels.ops import Kernels;"
        "peak = lambda: int([line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')][0]);"
        f"files, kernels = resolve({PACKAGED_MODEL!r}), Kernels.load(); before = peak();"
        "load_model(open_source(files, None), torch.bfloat16, kernels, 8); print(peak() - before)"
    )

    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)

    assert int(result.stdout) < 600 * 1024, "KiB"  # not ru_maxrss, which a child inherits from its parent
