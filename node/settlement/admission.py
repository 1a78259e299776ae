"""What the ledger is told about a request: once before the engine sees it, once when it is over."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec

from attribution.digests import SALT_BYTES, tenant_digest, token_digest
from attribution.errors import AttributionError
from attribution.fees import Contribution, Payees, Price, SplitPolicy, Tokens
from attribution.money import request_tie
from attribution.record import REQUEST_ID, Facts, Merge, RecipeTerm, build_recipe
from node.errors import RequestError

TokenIds = Sequence[Sequence[int]]


class SignedVoucher(msgspec.Struct, frozen=True):
    """A payer's voucher with its signature. Amounts in wei, `deadline` in seconds UTC."""

    payer: str
    operator: str
    cumulative_wei: int
    deadline: int
    signature: bytes


class Admission(msgspec.Struct, frozen=True, kw_only=True):
    """A request that is about to be served.

    `prompts` holds the token ids of every prompt. `terms` and `contributions` say which adapters and who made them (of those with
    a manifest, in the order of the terms). `voucher` is None for usage nobody signed for: recorded, never in an epoch.
    """

    request_id: str
    tenant: str
    base_id: str
    prompts: TokenIds
    terms: tuple[RecipeTerm, ...]
    contributions: tuple[Contribution, ...]
    price: Price
    policy: SplitPolicy
    payees: Payees
    voucher: SignedVoucher | None = None
    voucher_digest: str | None = None  # 64 hex digits, given with the voucher
    merge: Merge | None = None


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """How a request ended. `outputs` holds the token ids delivered to the client, one list a choice.

    `status` is "ok", "cancelled" or "failed"; `finish_reason` the client's word for it.
    """

    request_id: str
    status: str
    finish_reason: str
    outputs: TokenIds = ()
    cached_tokens: int = 0


class OpenRequest(msgspec.Struct, frozen=True, kw_only=True):
    """An admission as it is stored: digests and salts instead of token ids and the tenant's name."""

    request_id: str
    admitted_ms: int
    tenant_digest: str
    base_id: str
    operator: str
    prompt_tokens: int
    prompt_digest: str
    prompt_salt: bytes
    output_salt: bytes
    terms: tuple[RecipeTerm, ...]
    contributions: tuple[Contribution, ...]
    price: Price
    policy: SplitPolicy
    payees: Payees
    voucher: SignedVoucher | None
    voucher_digest: str | None
    merge: Merge | None = None

    def to_bytes(self) -> bytes:
        """JSON for the table of open requests."""
        return msgspec.json.encode(self)

    @classmethod
    def from_bytes(cls, data: bytes) -> OpenRequest:
        """The inverse of `to_bytes`."""
        return msgspec.json.decode(data, type=cls)

    def facts(self, outcome: Outcome, finished_ms: int) -> Facts:
        """What the record of this request is built from."""
        output_tokens = sum(len(ids) for ids in outcome.outputs)
        return Facts(
            request_id=self.request_id,
            admitted_ms=self.admitted_ms,
            finished_ms=max(finished_ms, self.admitted_ms),  # the wall clock may step back between the two
            status=outcome.status,
            finish_reason=outcome.finish_reason,
            base_id=self.base_id,
            operator=self.operator,
            payer=None if self.voucher is None else self.voucher.payer,
            voucher_digest=self.voucher_digest,
            tenant_digest=self.tenant_digest,
            terms=self.terms,
            contributions=self.contributions,
            tokens=Tokens(self.prompt_tokens, min(outcome.cached_tokens, self.prompt_tokens), output_tokens),
            price=self.price,
            policy=self.policy,
            payees=self.payees,
            prompt_digest=self.prompt_digest,
            output_digest=token_digest(self.output_salt, outcome.outputs),
            merge=self.merge,
        )


def open_request(
    admission: Admission, *, operator: str, admitted_ms: int, tenant_salt: bytes, random_bytes: Callable[[int], bytes]
) -> OpenRequest:
    """Turn an admission into what is stored, with fresh salts.

    Raises:
        RequestError: The id is malformed, or the recipe has no record: one adapter twice, weights malformed or all zero.
    """
    if not REQUEST_ID.fullmatch(admission.request_id):
        raise RequestError("the request id must have 1 to 128 printable ASCII characters and no spaces", param="request_id")
    try:
        build_recipe(admission.terms, request_tie(admission.request_id), admission.merge)
    except AttributionError as error:
        raise RequestError(f"the adapter recipe cannot be recorded: {error}", param="adapters") from error
    salts = random_bytes(2 * SALT_BYTES)  # one call of the system for both
    prompt_salt, output_salt = salts[:SALT_BYTES], salts[SALT_BYTES:]
    return OpenRequest(
        request_id=admission.request_id,
        admitted_ms=admitted_ms,
        tenant_digest=tenant_digest(admission.tenant, tenant_salt),
        base_id=admission.base_id,
        operator=operator,
        prompt_tokens=sum(len(ids) for ids in admission.prompts),
        prompt_digest=token_digest(prompt_salt, admission.prompts),
        prompt_salt=prompt_salt,
        output_salt=output_salt,
        terms=admission.terms,
        contributions=admission.contributions,
        price=admission.price,
        policy=admission.policy,
        payees=admission.payees,
        voucher=admission.voucher,
        voucher_digest=admission.voucher_digest,
        merge=admission.merge,
    )
