"""The grammar of adapter names, checked before any path or URL is made from one.

    name = part ["/" part] ["@" revision]
    part = letter or digit, then up to 95 letters, digits, "." "_" "-"
    revision = part {"/" part}, 96 characters at most; "refs/pr/2" is the hub's pull request 2

ASCII only. No comma (metric label lists are split at commas), no "%" (nobody decodes it twice), no ".." and no ".git" or ".lock"
at the end of a part (the hub and its cache refuse or misread them).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from node.errors import AdapterIdError

MAX_NAME_CHARACTERS = 96 * 3 + 2
MAX_REVISION_CHARACTERS = 96  # it is part of a file's name
_PART = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
_FORBIDDEN_ENDS = (".git", ".lock", ".ipynb")


@dataclass(frozen=True, slots=True)
class AdapterName:
    """A well-formed name. `path` is one part, or two with a "/" between them; `revision` may have several."""

    path: str
    revision: str | None

    @property
    def is_hub_id(self) -> bool:
        """Whether the name has an owner, as every repository on the hub has."""
        return "/" in self.path

    def __str__(self) -> str:
        return self.path if self.revision is None else f"{self.path}@{self.revision}"


def parse_name(text: str) -> AdapterName:
    """Check the name of an adapter.

    Raises:
        AdapterIdError: The name does not follow the grammar; the message says which rule and shows the name escaped.
    """
    if not text:
        raise _refused(text, "it is empty")
    if len(text) > MAX_NAME_CHARACTERS:
        raise _refused(text, f"it has {len(text)} characters; the limit is {MAX_NAME_CHARACTERS}")
    path, at, revision = text.partition("@")
    parts = path.split("/")
    if len(parts) > 2:
        raise _refused(text, 'it has more than one "/"')
    if len(revision) > MAX_REVISION_CHARACTERS:
        raise _refused(text, f"its revision has {len(revision)} characters; the limit is {MAX_REVISION_CHARACTERS}")
    for part in [*parts, *revision.split("/")] if at else parts:
        _check_part(text, part)
    return AdapterName(path, revision if at else None)


def _check_part(text: str, part: str) -> None:
    if not _PART.fullmatch(part):
        raise _refused(text, f"{part[:96]!a} is not 1 to 96 of A-Z a-z 0-9 . _ - that begin with a letter or digit")
    if ".." in part or part.endswith(_FORBIDDEN_ENDS):
        raise _refused(text, f'{part!a} contains ".." or ends with {", ".join(_FORBIDDEN_ENDS)}')


def _refused(text: str, why: str) -> AdapterIdError:
    shown = ascii(text if len(text) <= 96 else text[:93] + "...")
    return AdapterIdError(f"adapter name {shown}: {why}", param="model")
