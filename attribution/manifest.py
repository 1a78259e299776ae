"""The adapter manifest: who trained an adapter, on which datanets, and whose data it was."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from eth_utils.address import is_checksum_formatted_address, to_checksum_address

from attribution import canonical
from attribution.errors import CanonicalError, ManifestError
from attribution.fees import Contribution
from attribution.money import PPM

SCHEMA = "openlora.manifest/1"
MAX_BYTES = 1 << 20
MAX_NAME_CHARS = 200
MAX_DATANETS = 256
MAX_CONTRIBUTORS = 4096
MAX_TRAINING_FIELDS = 64
_HASH = re.compile(r"[0-9a-f]{64}")
_ADDRESS = re.compile(r"0x[0-9a-fA-F]{40}")
_FIELDS = ("schema", "adapter_id", "name", "trainer", "base_id", "datanets", "contributors", "training", "license")


@dataclass(frozen=True, slots=True)
class Trainer:
    """Who trained the adapter and is paid the trainer's share."""

    address: str
    name: str


@dataclass(frozen=True, slots=True)
class Datanet:
    """A corpus the adapter was trained on. `corpus_root` is the tree hash of its text, 64 hex digits."""

    id: str
    name: str
    corpus_root: str
    license: str


@dataclass(frozen=True, slots=True)
class Contributor:
    """Who contributed data to one datanet, with their share of this adapter's data reward in ppm."""

    address: str
    name: str
    datanet: str
    share_ppm: int


@dataclass(frozen=True, slots=True)
class Manifest:
    """A parsed manifest; every rule of the format holds. Addresses are in EIP-55 spelling."""

    adapter_id: str
    name: str
    trainer: Trainer
    base_id: str
    datanets: tuple[Datanet, ...]
    contributors: tuple[Contributor, ...]
    training: Mapping[str, str | int]
    license: str

    @classmethod
    def parse(cls, data: bytes) -> Manifest:
        """Read a manifest strictly.

        Raises:
            ManifestError: The first field that breaks a rule, with its value and the rule.
        """
        try:
            return _manifest(canonical.loads(data, max_bytes=MAX_BYTES))
        except CanonicalError as error:
            raise ManifestError("$", data[:40], f"canonical JSON of at most {MAX_BYTES} bytes ({error})") from error

    def to_json(self) -> dict[str, Any]:
        """The manifest as JSON; `parse(canonical.dumps(to_json()))` gives the same manifest."""
        return {
            "schema": SCHEMA,
            "adapter_id": self.adapter_id,
            "name": self.name,
            "trainer": {"address": self.trainer.address, "name": self.trainer.name},
            "base_id": self.base_id,
            "datanets": [
                {"id": item.id, "name": item.name, "corpus_root": item.corpus_root, "license": item.license}
                for item in self.datanets
            ],
            "contributors": [
                {"address": item.address, "name": item.name, "datanet": item.datanet, "share_ppm": item.share_ppm}
                for item in self.contributors
            ],
            "training": dict(self.training),
            "license": self.license,
        }

    def manifest_hash(self) -> str:
        """SHA-256 of the canonical JSON, 64 hex digits; independent of the spacing and key order of the file."""
        return canonical.digest(self.to_json())

    def contribution(self) -> Contribution:
        """Trainer and contributors as a record names them: one share for each address, sorted by address."""
        shares: dict[str, int] = {}
        for item in self.contributors:
            shares[item.address] = shares.get(item.address, 0) + item.share_ppm
        return Contribution(self.adapter_id, self.trainer.address, tuple(sorted(shares.items())))


def _manifest(value: Any) -> Manifest:
    fields = _object(value, "$", _FIELDS)
    if fields["schema"] != SCHEMA:
        raise ManifestError("schema", fields["schema"], f'"{SCHEMA}"')
    trainer = _object(fields["trainer"], "trainer", ("address", "name"))
    datanets = tuple(
        _datanet(item, f"datanets[{index}]") for index, item in enumerate(_list(fields["datanets"], "datanets", 0, MAX_DATANETS))
    )
    known = {item.id for item in datanets}
    if len(known) != len(datanets):
        raise ManifestError("datanets", sorted(item.id for item in datanets), "a list without an id that occurs twice")
    return Manifest(
        adapter_id=_hash(fields["adapter_id"], "adapter_id"),
        name=_text(fields["name"], "name"),
        trainer=Trainer(_address(trainer["address"], "trainer.address"), _text(trainer["name"], "trainer.name")),
        base_id=_hash(fields["base_id"], "base_id"),
        datanets=datanets,
        contributors=_contributors(fields["contributors"], known),
        training=_training(fields["training"]),
        license=_text(fields["license"], "license"),
    )


def _datanet(value: Any, where: str) -> Datanet:
    fields = _object(value, where, ("id", "name", "corpus_root", "license"))
    return Datanet(
        _text(fields["id"], f"{where}.id"),
        _text(fields["name"], f"{where}.name"),
        _hash(fields["corpus_root"], f"{where}.corpus_root"),
        _text(fields["license"], f"{where}.license"),
    )


def _contributors(value: Any, datanets: set[str]) -> tuple[Contributor, ...]:
    result = []
    for index, item in enumerate(_list(value, "contributors", 1, MAX_CONTRIBUTORS)):
        where = f"contributors[{index}]"
        fields = _object(item, where, ("address", "name", "datanet", "share_ppm"))
        share = fields["share_ppm"]
        if type(share) is not int or not 1 <= share <= PPM:
            raise ManifestError(f"{where}.share_ppm", share, f"an integer from 1 to {PPM}")
        if fields["datanet"] not in datanets:
            raise ManifestError(f"{where}.datanet", fields["datanet"], "the id of one of the manifest's datanets")
        address, name = _address(fields["address"], f"{where}.address"), _text(fields["name"], f"{where}.name")
        result.append(Contributor(address, name, fields["datanet"], share))
    total = sum(item.share_ppm for item in result)
    if total != PPM:
        raise ManifestError("contributors", total, f"a list whose share_ppm sum to exactly {PPM}")
    return tuple(result)


def _training(value: Any) -> dict[str, str | int]:
    if not isinstance(value, dict) or len(value) > MAX_TRAINING_FIELDS:
        raise ManifestError("training", value, f"an object of at most {MAX_TRAINING_FIELDS} strings and integers")
    for key, item in value.items():
        if type(item) not in (str, int):
            raise ManifestError(f"training.{key}", item, "a string or an integer (write fractions as decimal strings)")
    return value


def _object(value: Any, where: str, names: tuple[str, ...]) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ManifestError(where, value, f"an object with the fields {', '.join(names)}")
    unknown, missing = sorted(value.keys() - set(names)), [name for name in names if name not in value]
    if unknown or missing:
        limit = f"exactly {', '.join(names)}" + (f"; {', '.join(missing)} missing" if missing else "")
        raise ManifestError(where, unknown or sorted(value), limit)
    return value


def _list(value: Any, where: str, least: int, most: int) -> list[Any]:
    if not isinstance(value, list) or not least <= len(value) <= most:
        raise ManifestError(where, value, f"a list of {least} to {most} entries")
    return value


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str) or not 1 <= len(value) <= MAX_NAME_CHARS:
        raise ManifestError(where, value, f"a string of 1 to {MAX_NAME_CHARS} characters")
    return value


def _hash(value: Any, where: str) -> str:
    if not isinstance(value, str) or not _HASH.fullmatch(value):
        raise ManifestError(where, value, "64 lower-case hex digits")
    return value


def _address(value: Any, where: str) -> str:
    """EIP-55 spelling. A mixed-case address must carry the right checksum: a typing error here would pay nobody."""
    if not isinstance(value, str) or not _ADDRESS.fullmatch(value) or int(value, 16) == 0:
        raise ManifestError(where, value, "0x and 40 hex digits, not all zero")
    spelled = to_checksum_address(value)
    if is_checksum_formatted_address(value) and value != spelled:
        raise ManifestError(where, value, f"in lower case or with a right EIP-55 checksum, as {spelled}")
    return spelled
