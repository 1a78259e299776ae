"""What decides a `FilePlan`: digests of an adapter's header and configuration."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass

from node.adapters.formats.layout import AdapterLayout
from node.adapters.lora_config import DESCRIPTIVE, MAX_CONFIG_BYTES
from node.adapters.regular_file import open_regular, read_exactly, read_whole
from node.adapters.safetensors_file import LENGTH_BYTES, MAX_HEADER_BYTES

_DIGEST_BYTES = 32


@dataclass(frozen=True, slots=True)
class PlanKeys:
    """Of one adapter's files.

    Attributes:
        config: The configuration's bytes.
        exact: Digest of header and configuration.
        shape: Digest of the header and of the configuration less its alpha; empty where that is not one number.
    """

    config: bytes
    exact: bytes
    shape: bytes


def plan_keys(files: AdapterLayout, max_bytes: int) -> PlanKeys | None:
    """Read the keys; None where there is no header, or none that could be remembered.

    Args:
        max_bytes: Limit on the weights file.

    Raises:
        AdapterInvalidError: As `open_regular` and `read_exactly` say.
    """
    if files.config is None:
        return None
    config = read_whole(files.config, MAX_CONFIG_BYTES)
    header = hashlib.blake2b(digest_size=_DIGEST_BYTES)
    descriptor, size_bytes = open_regular(files.weights, max_bytes)
    try:
        header_bytes = int.from_bytes(os.pread(descriptor, LENGTH_BYTES, 0), "little")
        if header_bytes > min(MAX_HEADER_BYTES, size_bytes - LENGTH_BYTES):
            return None
        header.update(size_bytes.to_bytes(8, "little"))
        header.update(read_exactly(descriptor, files.weights.name, 0, LENGTH_BYTES + header_bytes))
    finally:
        os.close(descriptor)
    return PlanKeys(config, _digest(header.digest(), config), _shape_digest(header.digest(), config))


def _digest(header: bytes, config: bytes) -> bytes:
    return hashlib.blake2b(header + config, digest_size=_DIGEST_BYTES).digest()


def _shape_digest(header: bytes, config: bytes) -> bytes:
    """Of the configuration less `lora_alpha` and what only describes; parsing refuses what is no JSON object."""
    try:
        raw = json.loads(config)
    except (ValueError, RecursionError):
        return b""
    if not isinstance(raw, dict) or raw.get("alpha_pattern"):
        return b""
    deciding = {name: value for name, value in raw.items() if name != "lora_alpha" and name not in DESCRIPTIVE}
    return _digest(header, json.dumps(deciding).encode())
