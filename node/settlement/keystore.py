"""One keystore v3 file: checked before its password is ever tried.

Everything in the file was chosen by whoever wrote it, so its cost parameters are bounded before the key is derived: scrypt with
n = 2^30 would take a gigabyte per r before any password could turn out wrong.
"""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

from eth_account import Account
from eth_utils.exceptions import ValidationError

from node.errors import KeystoreError
from node.settlement.json_bounds import loads_bounded
from node.settlement.signer import LocalSigner

MAX_FILE_BYTES = 64 << 10
MAX_SCRYPT_BYTES = 512 << 20  # 128 * n * r
MAX_SCRYPT_WORK = 1 << 23  # n * r * p; the standard file has 2^18 * 8 * 1 = 2^21
MIN_SCRYPT_N = 2
PBKDF2_ROUNDS = range(1_000, 10_000_001)
STANDARD_SCRYPT_N = 1 << 18


def read_private_file(path: Path, what: str, limit_bytes: int = MAX_FILE_BYTES) -> bytes:
    """Read a file that only its owner may read.

    Args:
        path: The file; a symbolic link is refused, since its target's owner could swap it.
        what: "key file" or "password file", for the message.
        limit_bytes: Longest accepted file.

    Raises:
        KeystoreError: keystore_missing, keystore_permissions or keystore_damaged (too long, not a plain file).
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError as error:
        raise KeystoreError(f"the {what} {path} does not exist; restore it or name another", code="keystore_missing") from error
    except OSError as error:
        raise KeystoreError(
            f"the {what} {path} is a symbolic link or cannot be opened; put a plain file there that its user can read",
            code="keystore_permissions",
        ) from error
    with os.fdopen(fd, "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise KeystoreError(f"the {what} {path} is not a plain file; put one there", code="keystore_permissions")
        if status.st_mode & 0o077:
            mode = stat.S_IMODE(status.st_mode)
            raise KeystoreError(
                f"the {what} {path} has mode {mode:04o} and others can use it; run: chmod 600 {path}", code="keystore_permissions"
            )
        if status.st_uid not in (os.geteuid(), 0):
            raise KeystoreError(
                f"the {what} {path} belongs to another user; run: chown {os.geteuid()} {path}", code="keystore_permissions"
            )
        data = file.read(limit_bytes + 1)
    if len(data) > limit_bytes:
        raise KeystoreError(f"the {what} {path} is longer than {limit_bytes} bytes; it is not a {what}")
    return data


def decrypt(path: Path, password: str) -> LocalSigner:
    """Open a key file.

    Raises:
        KeystoreError: keystore_missing, keystore_permissions, keystore_damaged, or keystore_password.
    """
    fields = _parse(path, read_private_file(path, "key file"))
    _refuse_costly(path, fields["crypto"])
    try:
        private_key = bytes(Account.decrypt(fields, password))
        signer = LocalSigner(private_key)
    except (ValueError, TypeError, KeyError, ValidationError) as error:
        raise KeystoreError(
            f"wrong password or damaged file: {path}; check the password file beside it, or restore both from a backup",
            code="keystore_password",
        ) from error
    named = str(fields.get("address", signer.address)).lower().removeprefix("0x")
    if named != signer.address.lower().removeprefix("0x"):
        raise KeystoreError(f"the key in {path} belongs to {signer.address}, not to the address the file names; restore the file")
    return signer


def encrypt(private_key: bytes, password: str, scrypt_n: int = STANDARD_SCRYPT_N) -> bytes:
    """A keystore v3 file's bytes (scrypt, r = 8, p = 1).

    Args:
        scrypt_n: Cost; the standard takes about 0.7 s and 256 MiB. Only tests have a reason for less.
    """
    return json.dumps(Account.encrypt(private_key, password, kdf="scrypt", iterations=scrypt_n), indent=1).encode() + b"\n"


def address_of(path: Path) -> str:
    """The address a key file names, without its password.

    Raises:
        KeystoreError: As `decrypt`.
    """
    return "0x" + str(_parse(path, read_private_file(path, "key file")).get("address", "")).lower().removeprefix("0x")


def _parse(path: Path, data: bytes) -> dict[str, Any]:
    """The file's JSON, with the members that the rest relies on."""
    try:
        fields = loads_bounded(data)
        crypto = fields["crypto"]
        if fields["version"] != 3 or crypto["cipher"] != "aes-128-ctr" or crypto["kdf"] not in ("scrypt", "pbkdf2"):
            raise KeystoreError(
                f"{path} is not a keystore of version 3 with aes-128-ctr and scrypt or pbkdf2; export the key in that format"
            )
        if not isinstance(crypto["kdfparams"], dict):
            raise TypeError("kdfparams")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise KeystoreError(f"{path} is not a keystore file or is damaged; restore it from a backup") from error
    return dict(fields)


def _refuse_costly(path: Path, crypto: dict[str, Any]) -> None:
    parameters = crypto["kdfparams"]
    names = ("n", "r", "p", "dklen") if crypto["kdf"] == "scrypt" else ("c", "dklen")
    values = [parameters.get(name) for name in names]
    if not all(type(value) is int and value > 0 for value in values):
        raise KeystoreError(f"{path} has malformed {crypto['kdf']} parameters; restore it from a backup")
    if parameters["dklen"] != 32:
        raise KeystoreError(
            f"{path} asks for a derived key of {parameters['dklen']} bytes; version 3 has 32; restore it from a backup"
        )
    if crypto["kdf"] == "pbkdf2":
        if parameters["c"] not in PBKDF2_ROUNDS:
            raise KeystoreError(
                f"{path} asks for {parameters['c']} pbkdf2 rounds; {PBKDF2_ROUNDS[0]} to {PBKDF2_ROUNDS[-1]} are accepted"
            )
        return
    n, r, p = parameters["n"], parameters["r"], parameters["p"]
    if n < MIN_SCRYPT_N or n & (n - 1) or 128 * n * r > MAX_SCRYPT_BYTES or n * r * p > MAX_SCRYPT_WORK:
        raise KeystoreError(
            f"{path} asks for scrypt with n={n}, r={r}, p={p}; at most {MAX_SCRYPT_BYTES >> 20} MiB and n*r*p of "
            f"{MAX_SCRYPT_WORK} are accepted; export the key with standard parameters"
        )
