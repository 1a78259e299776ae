"""The grammar of adapter locations outside the hub: where an adapter lies in a store that the operator opened.

location = scheme "://" authority "/" part {"/" part}
scheme = "s3" | "gs" | "az" | "https" | "http"

A location is checked character by character before any client library sees it: no user, query, fragment, percent sign, ".." or
empty part, so that no two programs can read two different hosts or paths out of it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from node.errors import AdapterError, AdapterForbiddenError, AdapterIdError, ConfigError

MAX_LOCATION_CHARACTERS = 1024
MAX_PARTS = 16
SCHEMES = {"s3": ("s3",), "gcs": ("gs",), "azure": ("az",), "http": ("https", "http")}  # adapter_source -> its schemes
SOURCES = ("local", "hub", *SCHEMES, "pbase")  # every `adapter_source`
_AUTHORITY = re.compile(r"[a-z0-9]([a-z0-9._-]{0,251}[a-z0-9])?(:[0-9]{1,5})?")
_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._=+-]{0,127}")
_PRINTABLE = re.compile(r"[\x21-\x7e]+")


@dataclass(frozen=True, slots=True)
class Location:
    """A well-formed location. `authority` is a bucket, a container or a host with an optional port."""

    scheme: str
    authority: str
    parts: tuple[str, ...]

    @property
    def source(self) -> str:
        """The `adapter_source` it belongs to."""
        return next(source for source, schemes in SCHEMES.items() if self.scheme in schemes)

    @property
    def path(self) -> str:
        return "/".join(self.parts)

    def is_under(self, other: Location) -> bool:
        """Whether `other` is this location or a directory above it."""
        return self.scheme == other.scheme and self.authority == other.authority and self.parts[: len(other.parts)] == other.parts

    def __str__(self) -> str:
        return f"{self.scheme}://{self.authority}/{self.path}"


def is_location(text: str) -> bool:
    """Whether `text` is meant as a location and not as a name."""
    return "://" in text


def parse_location(text: str, source: str | None = None, *, may_be_root: bool = False) -> Location:
    """Check a location.

    Args:
        text: "s3://bucket/path", or, with `source`, LoRAX's "bucket/path".
        source: "s3", "gcs", "azure" or "http"; None: the scheme says it.
        may_be_root: Whether the authority alone is enough, as in the operator's settings.

    Raises:
        AdapterIdError: Too long, or characters no location has.
        AdapterForbiddenError: source_forbidden. A scheme, host or path that this node does not follow.
    """
    if not text or len(text) > MAX_LOCATION_CHARACTERS or not _PRINTABLE.fullmatch(text):
        shown = ascii(text if len(text) <= 96 else text[:93] + "...")
        raise AdapterIdError(
            f"adapter location {shown} is not 1 to {MAX_LOCATION_CHARACTERS} printable ASCII characters", param="model"
        )
    schemes = SCHEMES.get(source or "", tuple(scheme for known in SCHEMES.values() for scheme in known))
    if source is not None and not is_location(text):
        text = f"{schemes[0]}://{text}"
    scheme, _, rest = text.partition("://")
    if scheme not in schemes:
        raise _forbidden(text, f"its scheme is none of {', '.join(schemes)}")
    authority, _, path = rest.partition("/")
    parts = tuple(path.rstrip("/").split("/")) if path.rstrip("/") else ()
    if not _AUTHORITY.fullmatch(authority) or ".." in authority:
        raise _forbidden(text, "its host or bucket is not a plain lower-case name")
    if len(parts) > MAX_PARTS or any(not _PART.fullmatch(part) or ".." in part for part in parts):
        raise _forbidden(text, f"its path is not 1 to {MAX_PARTS} plain parts")
    if not parts and not may_be_root:
        raise _forbidden(text, "it names no adapter below the host or bucket")
    return Location(scheme, authority, parts)


def parse_store_root(url: str) -> Location:
    """The URL of a store in the settings.

    Raises:
        ConfigError: It makes no sense.
    """
    try:
        return parse_location(url, may_be_root=True)
    except AdapterError as error:
        raise ConfigError(f"adapters.stores: {error.message}") from error


def require_below(location: Location, roots: Iterable[Location]) -> Location:
    """The root that a location lies under.

    Raises:
        AdapterForbiddenError: source_forbidden. It lies outside every store.
    """
    for root in roots:
        if location.is_under(root):
            return root
    raise AdapterForbiddenError(
        f"adapter location {location} is outside the stores this node serves from (adapters.stores)", param="model"
    )


def _forbidden(text: str, why: str) -> AdapterForbiddenError:
    return AdapterForbiddenError(f"adapter location {text[:200]!a}: {why}", param="model")
