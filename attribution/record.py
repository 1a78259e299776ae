"""The attribution record: one served request, who shaped it, what it cost and who is owed what.

Facts are what the node observed; everything else in a record (shares, recipe hash, fee, split) follows from them, so that an
auditor rebuilds a record from its own facts and compares. Records form a chain: each names the hash of the one before.
"""

from __future__ import annotations

import hashlib
import re
from functools import lru_cache
from operator import attrgetter
from typing import Any

import msgspec

from attribution import canonical
from attribution.errors import RecordError, SplitError
from attribution.fees import Contribution, Payees, Price, SplitLine, SplitPolicy, Tokens, fee_wei, split_fee
from attribution.money import PPM, request_tie
from attribution.shares import adapter_shares

SCHEMA = "openlora.record/1"
RECIPE_SCHEMA = "openlora.recipe/1"
GENESIS_HASH = "0" * 64
REQUEST_ID = re.compile(r"[!-~]{1,128}")
_FINISH_REASON = re.compile(r"[!-~]{1,64}")
_HASH = re.compile(r"[0-9a-f]{64}")
_HASHES = re.compile(r"[0-9a-f]*")  # several, one behind the other
_FIELD_AT_FAULT = re.compile(r"(?:unknown field `|`\$\.)([^`]+)`")
_ADDRESS = re.compile(r"0x[0-9a-fA-F]{40}")
_DENSITY = re.compile(r"1|0\.[0-9]{0,17}[1-9]")
MERGE_STRATEGIES = ("linear_factors", "ties", "dare_linear", "dare_ties")
PRUNING = ("ties", "dare_linear", "dare_ties")
ELECTING = ("ties", "dare_ties")
SIGN_METHODS = ("total", "frequency")


class RecipeTerm(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One adapter of a recipe. `weight` is a decimal string; `manifest_hash` is None where nobody said who made it."""

    adapter_id: str
    manifest_hash: str | None
    weight: str


class Merge(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How several adapters became one before they were added, where that is more than their weighted sum.

    `density` is a decimal string above 0 and at most 1, for strategies that prune; `majority_sign_method` is for those that elect
    a sign; else None.
    """

    strategy: str
    density: str | None = None
    majority_sign_method: str | None = None


class Facts(msgspec.Struct, frozen=True, kw_only=True):
    """What the node observed of one request. Hashes and digests are 64 hex digits, addresses EIP-55, times UTC milliseconds.

    `status` is ok, cancelled, failed or interrupted; `finish_reason` is the client's word for it. `tenant_digest` stands for the
    caller, `payer` and `voucher_digest` for who signed to pay, or None. `contributions` cover the adapters with a manifest.
    `merge` is None where the answer was computed with the terms themselves.
    """

    request_id: str
    admitted_ms: int
    finished_ms: int
    status: str
    finish_reason: str
    base_id: str
    operator: str
    payer: str | None
    voucher_digest: str | None
    tenant_digest: str
    terms: tuple[RecipeTerm, ...]
    contributions: tuple[Contribution, ...]
    tokens: Tokens
    price: Price
    policy: SplitPolicy
    payees: Payees
    prompt_digest: str
    output_digest: str
    merge: Merge | None = None


class RecipeAdapter(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A recipe's term with its share of the request, in ppm."""

    adapter_id: str
    manifest_hash: str | None
    weight: str
    share_ppm: int


class Recipe(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What was added to the base model.

    `kind` is base (nothing), single, linear (a weighted sum) or merge, and then `merge` says how; only then is it written.
    """

    kind: str
    adapters: tuple[RecipeAdapter, ...]
    recipe_hash: str
    merge: Merge | None = None


class Record(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One link of the chain. Its hash is the SHA-256 of its canonical JSON."""

    schema: str
    sequence: int
    previous_hash: str
    request_id: str
    admitted_ms: int
    finished_ms: int
    status: str
    finish_reason: str
    base_id: str
    operator: str
    payer: str | None
    voucher_digest: str | None
    tenant_digest: str
    recipe: Recipe
    tokens: Tokens
    contributions: tuple[Contribution, ...]
    price: Price
    policy: SplitPolicy
    payees: Payees
    fee_wei: str
    split: tuple[SplitLine, ...]
    prompt_digest: str
    output_digest: str

    def to_bytes(self) -> bytes:
        """Canonical JSON: what is hashed, stored and published.

        A record holds only ASCII keys, strings and integers below 2**53, for which msgspec's sorted encoding is the canonical
        one, at 2 us instead of 60. A test holds it equal to `canonical.dumps`.
        """
        return msgspec.json.encode(self, order="sorted")

    def record_hash(self) -> str:
        """SHA-256 of `to_bytes()`, 64 hex digits."""
        return hash_bytes(self.to_bytes())


_COPIED = tuple(name for name in Facts.__struct_fields__ if name not in ("terms", "merge"))  # from facts into records
_copied = attrgetter(*_COPIED)


def hash_bytes(body: bytes) -> str:
    """The hash of a record from its canonical bytes, 64 hex digits."""
    return hashlib.sha256(body).hexdigest()


def build(facts: Facts, *, sequence: int, previous_hash: str) -> Record:
    """Derive the record of one request.

    Args:
        facts: What was observed.
        sequence: Position in the chain, from 1.
        previous_hash: Hash of record `sequence - 1`, or GENESIS_HASH.

    Raises:
        RecordError: A malformed or contradictory fact. SplitError: Weights that cannot share the fee.
    """
    _check(facts, sequence, previous_hash)
    tie = request_tie(facts.request_id)
    recipe = build_recipe(facts.terms, tie, facts.merge)
    fee = fee_wei(facts.status, facts.tokens, facts.price)
    shares = [(adapter.adapter_id, adapter.share_ppm) for adapter in recipe.adapters]
    lines = split_fee(fee, facts.policy, facts.payees, shares, facts.contributions, tie)
    copied: dict[str, Any] = dict(zip(_COPIED, _copied(facts), strict=True))
    return Record(
        schema=SCHEMA, sequence=sequence, previous_hash=previous_hash, recipe=recipe, fee_wei=str(fee), split=lines, **copied
    )


def build_recipe(terms: tuple[RecipeTerm, ...], tie: bytes, merge: Merge | None = None) -> Recipe:
    """Name, weigh and hash what was added to the base model. The hash covers kind, adapters and weights, in order, and the merge.

    Raises:
        RecordError: One adapter twice, or a malformed merge. SplitError: A malformed weight, or all of them zero.
    """
    return _short_recipe(terms, merge) if len(terms) < 2 else _recipe(terms, tie, merge)


@lru_cache(maxsize=1024)
def _short_recipe(terms: tuple[RecipeTerm, ...], merge: Merge | None) -> Recipe:
    """Of one adapter, which has no ties to break, or of none: the same for request after request."""
    return _recipe(terms, b"", merge)


def _recipe(terms: tuple[RecipeTerm, ...], tie: bytes, merge: Merge | None) -> Recipe:
    weights = {term.adapter_id: term.weight for term in terms}
    if len(weights) != len(terms):
        raise RecordError("a recipe names one adapter twice; add its weights and name it once")
    shares = adapter_shares(weights, tie) if terms else {}
    adapters = tuple(RecipeAdapter(t.adapter_id, t.manifest_hash, t.weight, shares[t.adapter_id]) for t in terms)
    return Recipe(_kind(terms, merge), adapters, recipe_hash(terms, merge), merge)


def recipe_hash(terms: tuple[RecipeTerm, ...], merge: Merge | None) -> str:
    """Content hash of a recipe, 64 hex digits: what is computed, whoever made the adapters.

    Raises:
        RecordError: The merge is malformed.
    """
    named = [{"adapter_id": term.adapter_id, "weight": term.weight} for term in terms]
    recipe: dict[str, Any] = {"schema": RECIPE_SCHEMA, "kind": _kind(terms, merge), "adapters": named}
    if merge is not None:
        recipe["merge"] = {
            "strategy": merge.strategy,
            "density": merge.density,
            "majority_sign_method": merge.majority_sign_method,
        }
    # ASCII and no numbers, for which msgspec's sorted encoding is the canonical one: 2 us instead of 40, twice a request.
    return hash_bytes(msgspec.json.encode(recipe, order="sorted"))


def _kind(terms: tuple[RecipeTerm, ...], merge: Merge | None) -> str:
    if merge is None:
        return ("base", "single")[len(terms)] if len(terms) < 2 else "linear"
    if len(terms) < 2:
        raise RecordError(f"a merge of {len(terms)} adapters is no merge; two are needed")
    prunes, elects = merge.strategy in PRUNING, merge.strategy in ELECTING
    if merge.strategy not in MERGE_STRATEGIES:
        raise RecordError(f"merge strategy {merge.strategy!r:.40} is unknown; known are {', '.join(MERGE_STRATEGIES)}")
    if (merge.density is not None) != prunes or (merge.majority_sign_method is not None) != elects:
        raise RecordError(f"a {merge.strategy} merge has density and majority_sign_method where it uses them and nowhere else")
    if merge.density is not None and not _DENSITY.fullmatch(merge.density):
        raise RecordError(f"density {merge.density!r:.40} is not a plain decimal above 0 and at most 1, without trailing zeros")
    if merge.majority_sign_method not in (None, *SIGN_METHODS):
        raise RecordError(f"majority_sign_method {merge.majority_sign_method!r:.40} is none of {', '.join(SIGN_METHODS)}")
    return "merge"


def facts_of(record: Record) -> Facts:
    """The facts inside a record, without anything derived."""
    terms = tuple(RecipeTerm(item.adapter_id, item.manifest_hash, item.weight) for item in record.recipe.adapters)
    copied: dict[str, Any] = dict(zip(_COPIED, _copied(record), strict=True))
    return Facts(terms=terms, merge=record.recipe.merge, **copied)


def verify(record: Record) -> None:
    """Recompute shares, recipe hash, fee and split from the record's own facts.

    Raises:
        RecordError: Something differs; the first differing field is named.
    """
    if record.schema != SCHEMA:
        raise RecordError(f"schema is {record.schema!r:.40}; this version reads {SCHEMA}")
    try:
        expected = build(facts_of(record), sequence=record.sequence, previous_hash=record.previous_hash)
    except SplitError as error:
        raise RecordError(f"record {record.sequence}: {error}") from error
    for name in Record.__struct_fields__:
        given, computed = getattr(record, name), getattr(expected, name)
        if given != computed:
            raise RecordError(f"record {record.sequence} has {name} = {given!r:.200}; its facts give {computed!r:.200}")


def parse(data: bytes | dict[str, Any]) -> Record:
    """Read a record from JSON, strictly, without verifying what it says.

    Raises:
        RecordError: A field is missing, unknown or of another type. CanonicalError: Not JSON of the canonical subset.
    """
    value = canonical.loads(data) if isinstance(data, bytes) else data
    try:
        return msgspec.convert(value, Record, strict=True)
    except msgspec.ValidationError as error:
        found = _FIELD_AT_FAULT.search(str(error))
        where = found[1] if found else "the top level"
        raise RecordError(f"not a record of schema {SCHEMA}: {where} is missing, unknown or of the wrong type") from error


def _check(facts: Facts, sequence: int, previous_hash: str) -> None:
    """Refuse facts that could not be hashed, signed or paid."""
    if sequence < 1:
        raise RecordError(f"sequence is {sequence}; records count from 1")
    if not REQUEST_ID.fullmatch(facts.request_id):
        raise RecordError(
            f"request_id is {facts.request_id[:140]!r}; it must have 1 to 128 printable ASCII characters, no spaces"
        )
    if not _FINISH_REASON.fullmatch(facts.finish_reason):
        raise RecordError(
            f"finish_reason is {facts.finish_reason[:80]!r}; it must have 1 to 64 printable ASCII characters, no spaces"
        )
    if max(sequence, facts.finished_ms, facts.tokens.prompt, facts.tokens.output) > canonical.MAX_INTEGER:
        raise RecordError("a sequence number, time or token count is beyond 2**53 - 1")
    if not 0 <= facts.admitted_ms <= facts.finished_ms:
        raise RecordError(f"admitted at {facts.admitted_ms} ms and finished at {facts.finished_ms} ms; time must not run back")
    hashes = [previous_hash, facts.base_id, facts.tenant_digest, facts.prompt_digest, facts.output_digest, facts.voucher_digest]
    hashes += [value for term in facts.terms for value in (term.adapter_id, term.manifest_hash)]
    given = [value for value in hashes if value is not None]
    if set(map(len, given)) != {64} or not _HASHES.fullmatch("".join(given)):
        wrong = next(value for value in given if not _HASH.fullmatch(value))
        raise RecordError(f"hash {wrong!r:.80} is malformed; it must have 64 lower-case hex digits")
    addresses = [facts.operator, facts.payees.operator, facts.payees.reserve, facts.payer]
    addresses += [maker.trainer for maker in facts.contributions]
    addresses += [account for maker in facts.contributions for account, _ in maker.contributors]
    for value in addresses:
        if value is not None and not _ADDRESS.fullmatch(value):
            raise RecordError(f"address {value!r:.80} is malformed; it must be 0x and 40 hex digits")
    _check_contributions(facts)


def _check_contributions(facts: Facts) -> None:
    """Exactly the adapters with a manifest have makers, and every maker's shares sum to one."""
    made = [maker.adapter_id for maker in facts.contributions]
    expected = [term.adapter_id for term in facts.terms if term.manifest_hash is not None]
    if made != expected:
        raise RecordError(f"contributions name the adapters {made}; the recipe's adapters with a manifest are {expected}")
    for maker in facts.contributions:
        accounts = [account for account, _ in maker.contributors]
        if accounts != sorted(set(accounts)):
            raise RecordError(f"contributors of adapter {maker.adapter_id} must be sorted by address and named once")
        if sum(share for _, share in maker.contributors) != PPM or any(share < 1 for _, share in maker.contributors):
            raise RecordError(f"contributors of adapter {maker.adapter_id} must have shares above 0 that sum to {PPM}")
