"""What can be wrong with provenance, money and signatures. An auditor needs nothing else to read a verdict.

AttributionError
|-- CanonicalError       bytes that are not canonical JSON of our subset
|-- IdentityError        tensors or settings that have no well-defined identity
|-- ManifestError        an adapter's manifest; names the field, its value and the limit
|-- SplitError           weights that cannot share a sum
|-- RecordError          a record that does not follow from its own facts
|-- SignatureError       a signature that is malformed or by somebody else
|   `-- Unauthenticated  nobody was named as trusted, so nothing was authenticated
`-- MerkleError          entries that have no tree, or a proof that does not lead to the root
"""

from __future__ import annotations


class AttributionError(Exception):
    """Anything this package refuses, with the value and the limit in the message."""


class CanonicalError(AttributionError):
    """The bytes or the value are outside the canonical subset."""


class IdentityError(AttributionError):
    """The tensors or settings have no well-defined content hash."""


class ManifestError(AttributionError):
    """One field of a manifest is wrong.

    Args:
        field: Path of the field, such as `contributors[3].share_ppm`.
        value: What stands there, shortened.
        limit: What may stand there.
    """

    def __init__(self, field: str, value: object, limit: str) -> None:
        shown = repr(value)
        if len(shown) > 80:
            shown = shown[:77] + "..."
        super().__init__(f"manifest field {field} is {shown}; it must be {limit}")
        self.field = field
        self.value = value
        self.limit = limit


class SplitError(AttributionError):
    """No weight is above zero, a weight is negative, or the sum is."""


class RecordError(AttributionError):
    """A record contradicts itself: a hash, weight, fee or split differs from the one its facts give."""


class SignatureError(AttributionError):
    """A signature is malformed, malleable or made by an address other than the one claimed or trusted."""


class Unauthenticated(SignatureError):
    """The bundle may be sound, but no trusted signer was named, so it proves nothing about who made it."""


class MerkleError(AttributionError):
    """Entries that cannot form a tree, or an account without an entry."""
