"""EIP-712 digests of flat structs, encoded by hand: a receipt is signed on the way to the client, so microseconds count.

The generic encoder of eth-account takes 180 us a receipt, this one 20, half of them for its two hashes; tests hold the two equal.
Flat means: address, uint8..uint256, bytes32, string, bool and bytes32[]; a struct inside a struct is refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any

from eth_hash.auto import keccak

from attribution.errors import SignatureError

_SHORT_BYTES = 1024
_UINT = re.compile(r"uint(\d{1,3})")
_DOMAIN_FIELDS = (
    ("name", "string"),
    ("version", "string"),
    ("chainId", "uint256"),
    ("verifyingContract", "address"),
    ("salt", "bytes32"),
)


_Encoder = Callable[[Any, str], bytes]  # of a value and of where it stands, for the message of an error


@dataclass(frozen=True, slots=True)
class StructType:
    """A struct of atomic fields: its name and (name, type) of every field, in order."""

    name: str
    fields: tuple[tuple[str, str], ...]
    type_hash: bytes = field(init=False, repr=False)
    _names: frozenset[str] = field(init=False, repr=False, compare=False)
    _encoders: tuple[tuple[str, str, _Encoder], ...] = field(init=False, repr=False, compare=False)  # with where the field stands

    def __post_init__(self) -> None:
        encoders = tuple((name, f"{self.name}.{name}", _encoder(kind, f"{self.name}.{name}")) for name, kind in self.fields)
        signature = f"{self.name}({','.join(f'{kind} {name}' for name, kind in self.fields)})"
        object.__setattr__(self, "type_hash", keccak(signature.encode()))
        object.__setattr__(self, "_names", frozenset(name for name, _ in self.fields))
        object.__setattr__(self, "_encoders", encoders)

    def struct_hash(self, message: Mapping[str, Any]) -> bytes:
        """keccak(typeHash | every field as one 32-byte word).

        Raises:
            SignatureError: A field is missing, unknown, of another type or out of range.
        """
        if len(message) != len(self.fields) or not self._names.issuperset(message):
            expected = ", ".join(name for name, _ in self.fields)
            raise SignatureError(f"{self.name} has the fields {', '.join(message)}; it must have {expected}")
        return self.hash_of_words([encode(message[name], where) for name, where, encode in self._encoders])

    def hash_of_words(self, words: Iterable[bytes]) -> bytes:
        """The same, of fields that are words already, in order; nothing is checked."""
        return keccak(self.type_hash + b"".join(words))


@dataclass(frozen=True, slots=True)
class Domain:
    """What a signature is bound to: protocol, version, chain and, where one verifies it, the contract."""

    name: str
    version: str
    chain_id: int
    verifying_contract: str | None = None
    separator: bytes = field(init=False, repr=False)

    def __post_init__(self) -> None:
        message = self.message()
        fields = tuple((name, kind) for name, kind in _DOMAIN_FIELDS if name in message)
        object.__setattr__(self, "separator", StructType("EIP712Domain", fields).struct_hash(message))

    def message(self) -> dict[str, Any]:
        """The domain as it stands in typed data."""
        result: dict[str, Any] = {"name": self.name, "version": self.version, "chainId": self.chain_id}
        if self.verifying_contract is not None:
            result["verifyingContract"] = self.verifying_contract
        return result


def digest(domain: Domain, struct: StructType, message: Mapping[str, Any]) -> bytes:
    """keccak(0x1901 | domain separator | struct hash): the 32 bytes that are signed."""
    return digest_of_hash(domain, struct.struct_hash(message))


def digest_of_hash(domain: Domain, struct_hash: bytes) -> bytes:
    """The same, of a struct that is hashed already."""
    return keccak(b"\x19\x01" + domain.separator + struct_hash)


def full_message(domain: Domain, struct: StructType, message: Mapping[str, Any]) -> dict[str, Any]:
    """The typed data as wallets and remote signers take it (eth_signTypedData_v4)."""
    values = domain.message()
    return {
        "types": {
            "EIP712Domain": [{"name": name, "type": kind} for name, kind in _DOMAIN_FIELDS if name in values],
            struct.name: [{"name": name, "type": kind} for name, kind in struct.fields],
        },
        "primaryType": struct.name,
        "domain": values,
        "message": dict(message),
    }


def hashed(data: bytes) -> bytes:
    """keccak of something that is often the same: a finish reason, a recipe's adapters, a request's id in receipt and record."""
    return _short_hash(data) if len(data) <= _SHORT_BYTES else keccak(data)


@lru_cache(maxsize=1024)
def _short_hash(data: bytes) -> bytes:
    return keccak(data)


def _encoder(kind: str, where: str) -> _Encoder:
    """What makes the 32-byte word of a type: found once, not for every value."""
    found = _ENCODERS.get(kind)
    if found is not None:
        return found
    matched = _UINT.fullmatch(kind)
    if matched is None:
        raise SignatureError(f"{where} has type {kind}; only flat EIP-712 structs are signed here")
    return partial(_uint_word, int(matched[1]))


def _string_word(value: Any, where: str) -> bytes:
    if not isinstance(value, str):
        raise _mistyped(value, where, "string")
    return hashed(value.encode())


def _bytes32_word(value: Any, where: str) -> bytes:
    return fixed_bytes(value, 32, where)


def _address_word(value: Any, where: str) -> bytes:
    return fixed_bytes(value, 20, where).rjust(32, b"\x00")


def _array_word(value: Any, where: str) -> bytes:
    if not isinstance(value, list | tuple):
        raise _mistyped(value, where, "bytes32[]")
    return hashed(b"".join([fixed_bytes(item, 32, where) for item in value]))


def _bool_word(value: Any, where: str) -> bytes:
    if not isinstance(value, bool):
        raise _mistyped(value, where, "bool")
    return int(value).to_bytes(32, "big")


def _uint_word(bits: int, value: Any, where: str) -> bytes:
    if not isinstance(value, int) or isinstance(value, bool):
        raise _mistyped(value, where, f"uint{bits}")
    if not 0 <= value < 1 << bits:
        raise SignatureError(f"{where} is {value}; it must be from 0 to 2**{bits} - 1")
    return value.to_bytes(32, "big")


_ENCODERS: dict[str, _Encoder] = {
    "string": _string_word,
    "bytes32": _bytes32_word,
    "address": _address_word,
    "bytes32[]": _array_word,
    "bool": _bool_word,
}


def _mistyped(value: Any, where: str, kind: str) -> SignatureError:
    return SignatureError(f"{where} is {value!r:.80}; it must be a {kind}")


def fixed_bytes(value: Any, count: int, where: str) -> bytes:
    """`value` ("0x" and hex digits, or bytes) as exactly `count` bytes.

    Raises:
        SignatureError: Another length or not hexadecimal.
    """
    if isinstance(value, str) and len(value) == 2 + 2 * count and value.startswith("0x"):
        try:
            found = bytes.fromhex(value[2:])
        except ValueError:
            found = b""
        if len(found) == count:  # `fromhex` passes over spaces, which leave fewer
            return found
    if isinstance(value, bytes) and len(value) == count:
        return value
    raise SignatureError(f"{where} is {value!r:.80}; it must be 0x and {2 * count} hex digits")
