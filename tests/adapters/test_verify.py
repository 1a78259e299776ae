from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from attribution import canonical
from node.adapters.binding import LinearTable
from node.adapters.safetensors_file import SafetensorsFile
from node.adapters.verify import AdapterVerifier
from node.errors import AdapterInvalidError
from node.request import LinearShape

ADDRESS = "0x" + "11" * 20


@pytest.fixture
def verifier(linears, base_id):
    return AdapterVerifier(LinearTable(linears), base_id, max_rank=64, max_bytes=1 << 20)


def _manifest(adapter_id: str, base_id: str) -> bytes:
    return canonical.dumps(
        {
            "schema": "openlora.manifest/1",
            "adapter_id": adapter_id,
            "name": "good",
            "trainer": {"address": ADDRESS, "name": "trainer"},
            "base_id": base_id,
            "datanets": [{"id": "d", "name": "d", "corpus_root": "cd" * 32, "license": "CC0"}],
            "contributors": [{"address": ADDRESS, "name": "c", "datanet": "d", "share_ppm": 1_000_000}],
            "training": {},
            "license": "Apache-2.0",
        }
    )


def test_verify_good_adapter_reports_rank_and_coverage(verifier, writer):
    found = verifier.verify(writer.write("good"))

    assert found.rank == 2
    assert [(item.module.rsplit(".")[-1], item.adapted_count, item.base_count) for item in found.coverage] == [
        ("q_proj", 2, 2),
        ("v_proj", 2, 2),
        ("down_proj", 2, 2),
    ]
    assert found.manifest is None


def test_verify_same_content_in_another_directory_has_the_same_id(verifier, writer):
    assert verifier.verify(writer.write("one")).adapter_id == verifier.verify(writer.write("two")).adapter_id


def test_verify_other_alpha_has_another_id(verifier, writer):
    assert verifier.verify(writer.write("one")).adapter_id != verifier.verify(writer.write("two", lora_alpha=5)).adapter_id


def test_verify_some_layers_named_by_the_configuration_is_enough(verifier, writer):
    found = verifier.verify(writer.write("first", writer.tensors(layers=1), layers_to_transform=[0]))

    assert {item.adapted_count for item in found.coverage} == {1}


def test_verify_unchanged_files_are_not_read_again(verifier, writer, monkeypatch):
    directory = writer.write("good")
    first = verifier.verify(directory)
    monkeypatch.setattr(SafetensorsFile, "open", lambda *_: pytest.fail("the weights were opened again"))

    assert verifier.verify(directory) is first


def test_verify_manifest_of_these_files_is_kept(verifier, writer, base_id):
    directory = writer.write("good")
    adapter_id = verifier.verify(directory).adapter_id
    (directory / "manifest.json").write_bytes(_manifest(adapter_id, base_id))

    found = verifier.verify(directory)

    assert found.manifest is not None
    assert found.manifest.trainer.name == "trainer"
    assert found.manifest_hash == found.manifest.manifest_hash()


@pytest.mark.parametrize(("other_adapter", "code"), [(True, "adapter_manifest_invalid"), (False, "adapter_base_mismatch")])
def test_verify_manifest_of_another_adapter_or_base_is_refused(verifier, writer, base_id, other_adapter, code):
    directory = writer.write("good")
    adapter_id = verifier.verify(directory).adapter_id
    content = _manifest("00" * 32, base_id) if other_adapter else _manifest(adapter_id, "00" * 32)
    (directory / "manifest.json").write_bytes(content)

    with pytest.raises(AdapterInvalidError) as caught:
        verifier.verify(directory)

    assert caught.value.error_code == code
    assert "00" * 32 in caught.value.message


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_verify_what_peft_saves_is_accepted_and_read_bit_for_bit(tmp_path, base_id, dtype):
    model = LlamaForCausalLM(
        LlamaConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, vocab_size=32)
    )
    config = LoraConfig(r=3, target_modules="all-linear", rank_pattern={"down_proj": 5}, use_rslora=True, task_type="CAUSAL_LM")
    get_peft_model(model, config).to(dtype).save_pretrained(tmp_path)
    linears = [
        LinearShape(f"model.layers.{{layer}}.{name}", inputs, outputs, 2)
        for name, inputs, outputs in [
            *((f"self_attn.{kind}_proj", 16, 16) for kind in "qkvo"),
            *((f"mlp.{kind}_proj", 16, 24) for kind in ("gate", "up")),
            ("mlp.down_proj", 24, 16),
        ]
    ]

    found = AdapterVerifier(LinearTable(linears), base_id, max_rank=64, max_bytes=1 << 20).verify(tmp_path)

    assert found.rank == 5
    assert len(found.coverage) == 7
    with SafetensorsFile.open(tmp_path / "adapter_model.safetensors", 1 << 20) as file:
        for name, tensor in load_file(tmp_path / "adapter_model.safetensors").items():
            assert file.read(name).tobytes() == tensor.contiguous().view(torch.uint8).numpy().tobytes()


def test_verify_huge_announced_header_allocates_nothing(verifier, writer):
    directory = writer.write("bad")
    (directory / "adapter_model.safetensors").write_bytes((1 << 63).to_bytes(8, "little") + b"{}")
    script = (
        "import resource, sys; from pathlib import Path; from node.adapters.safetensors_file import SafetensorsFile\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "try: SafetensorsFile.open(Path(sys.argv[1]), 1 << 30)\n"
        "except Exception as error: print(error.error_code)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )

    done = subprocess.run(
        [sys.executable, "-c", script, str(directory / "adapter_model.safetensors")], capture_output=True, text=True, check=True
    )

    code, grown_kib = done.stdout.split()
    assert code == "adapter_corrupt"
    assert int(grown_kib) < 4096


def test_import_catalog_brings_no_torch():
    script = "import sys, json, node.adapters.catalog; print(json.dumps(sorted(sys.modules)))"

    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=dict(os.environ))

    loaded = json.loads(done.stdout)
    assert "node.adapters.verify" in loaded
    assert not {"torch", "transformers", "peft", "safetensors"} & set(loaded)
