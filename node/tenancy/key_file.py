"""`server.api_keys_file`: keys that an operator provisions as a file of "name key" lines."""

from __future__ import annotations

import stat
from pathlib import Path

from node.errors import ConfigError, RequestError
from node.tenancy.api_key import MAX_KEY_CHARS
from node.tenancy.tenant import check_name

MIN_KEY_CHARS = 16
MAX_FILE_BYTES = 4 << 20


def read_key_file(path: Path) -> tuple[tuple[str, str], ...]:
    """(tenant, key) of every line; blank lines and lines that begin with # are skipped. A tenant may have several keys.

    Raises:
        ConfigError: The file is missing, too large, readable by others, empty or malformed. No message repeats a key.
    """
    try:
        found = path.stat()
        if found.st_size > MAX_FILE_BYTES:
            raise ConfigError(f"server.api_keys_file {path} has {found.st_size} bytes; the limit is {MAX_FILE_BYTES}")
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"server.api_keys_file {path} cannot be read as UTF-8 text; check path and permissions") from error
    if found.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise ConfigError(
            f"server.api_keys_file {path} has mode {stat.S_IMODE(found.st_mode):04o}; run chmod 600 on it",
            code="secret_permissions",
        )
    pairs: list[tuple[str, str]] = []
    seen: set[str] = set()
    for number, line in enumerate(lines, start=1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        if len(words) != 2 or words[1] in seen or not MIN_KEY_CHARS <= len(words[1]) <= MAX_KEY_CHARS or not _is_name(words[0]):
            raise ConfigError(
                f"server.api_keys_file {path}, line {number}: write a tenant's name and a key of {MIN_KEY_CHARS} to "
                f"{MAX_KEY_CHARS} characters that no other line has"
            )
        seen.add(words[1])
        pairs.append((words[0], words[1]))
    if not pairs:
        raise ConfigError(f"server.api_keys_file {path} holds no key; write one 'name key' pair a line")
    return tuple(pairs)


def _is_name(text: str) -> bool:
    try:
        check_name(text)
    except RequestError:
        return False
    return True
