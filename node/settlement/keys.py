"""The node's keys: one file for each duty, made at the first start.

`operator` signs receipts, collections and epochs and never sends a transaction. `submitter` sends transactions and holds only gas
money. `payout` receives the node's share; a running node needs its address and never its key.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from eth_utils.address import is_address, to_checksum_address

from node.errors import KeystoreError
from node.settlement.keystore import STANDARD_SCRYPT_N, address_of, decrypt, encrypt, read_private_file
from node.settlement.signer import LocalSigner, Signer

ROLES = ("operator", "submitter", "payout")
OPENING_THREADS = 2  # a key takes a core for half a second, and 256 MiB
PASSWORD_NAME = "password"  # noqa: S105
SECP256K1_ORDER = 0xFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFEBAAEDCE6AF48A03BBFD25E8CD0364141


@dataclass(frozen=True, slots=True)
class NodeKeys:
    """The opened keys of a running node. The payout key stays closed; only its address is known."""

    operator: Signer
    submitter: Signer
    payout_address: str


class KeyDirectory:
    """<data_dir>/keys: key files and the generated password file, all of mode 0600 in a directory of mode 0700.

    Args:
        directory: Where the files are.
        random_bytes: Source of keys and of the password.
        scrypt_n: Cost of new files; only tests have a reason for less than the standard.
    """

    def __init__(
        self, directory: Path, random_bytes: Callable[[int], bytes] = secrets.token_bytes, scrypt_n: int = STANDARD_SCRYPT_N
    ) -> None:
        self._directory, self._random_bytes, self._scrypt_n = directory, random_bytes, scrypt_n

    def open(self) -> NodeKeys:
        """Open the node's keys; those that do not exist are made.

        Raises:
            KeystoreError: A file is missing its password, can be read by others, is damaged, or two duties share one key.
        """
        missing = [role for role in ROLES if not self.has(role)]
        if missing:
            self._make_directory()
        with ThreadPoolExecutor(OPENING_THREADS, thread_name_prefix="keys") as threads:
            list(threads.map(self.create, missing))
            operator, submitter = threads.map(self.load, ("operator", "submitter"))
        keys = NodeKeys(operator, submitter, self.address("payout"))
        addresses = {keys.operator.address.lower(), keys.submitter.address.lower(), keys.payout_address.lower()}
        if len(addresses) != len(ROLES):
            raise KeystoreError(f"two of {', '.join(ROLES)} in {self._directory} are the same key; give each its own file")
        return keys

    def has(self, role: str) -> bool:
        """Whether there is a file for that duty."""
        return os.path.lexists(self.path(role))

    def path(self, role: str) -> Path:
        """Where the key of a duty is kept."""
        return self._directory / f"{role}.json"

    def address(self, role: str) -> str:
        """The checksummed address of a duty, without opening its key."""
        named = address_of(self.path(role))
        if not is_address(named):
            raise KeystoreError(f"{self.path(role)} names no address; restore it from a backup")
        return str(to_checksum_address(named))

    def load(self, role: str) -> LocalSigner:
        """Open one key with the directory's password.

        Raises:
            KeystoreError: As `keystore.decrypt`.
        """
        return decrypt(self.path(role), self._password())

    def create(self, role: str) -> LocalSigner:
        """Make a new key for a duty that has none.

        Raises:
            KeystoreError: keystore_permissions, the directory cannot be written or the file is there already.
        """
        self._make_directory()
        private_key = self._new_key()
        self._write(self.path(role), encrypt(private_key, self._password(), self._scrypt_n))
        return LocalSigner(private_key)

    def _new_key(self) -> bytes:
        while True:
            private_key = self._random_bytes(32)
            if 0 < int.from_bytes(private_key, "big") < SECP256K1_ORDER:
                return private_key

    def _make_directory(self) -> None:
        try:
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise KeystoreError(
                f"cannot make the key directory {self._directory}; check the data directory's permissions",
                code="keystore_permissions",
            ) from error
        path = self._directory / PASSWORD_NAME
        if not os.path.lexists(path):
            if any(self.has(role) for role in ROLES):
                raise KeystoreError(
                    f"{path} is missing, and the key files beside it need it; restore it", code="keystore_missing"
                )
            self._write(path, self._random_bytes(32).hex().encode() + b"\n")

    def _password(self) -> str:
        path = self._directory / PASSWORD_NAME
        data = read_private_file(path, "password file", limit_bytes=1024)
        try:
            password = data.decode().removesuffix("\n")
        except UnicodeDecodeError as error:
            raise KeystoreError(f"the password file {path} is not UTF-8 text; restore it", code="keystore_password") from error
        if not password:
            raise KeystoreError(f"the password file {path} is empty; restore it", code="keystore_password")
        return password

    def _write(self, path: Path, data: bytes) -> None:
        """Write a new file whole: a crash leaves it complete or absent, never half."""
        temporary = path.with_name(path.name + ".new")
        try:
            temporary.unlink(missing_ok=True)
            fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            with os.fdopen(fd, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.link(temporary, path)  # fails when the file is there: a key is never overwritten
            temporary.unlink()
        except OSError as error:
            raise KeystoreError(
                f"cannot write {path}, or it is there already; check the directory's permissions and free space",
                code="keystore_permissions",
            ) from error
        directory = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
