"""The ledger and the voucher desk behind the one door the request path knows."""

from __future__ import annotations

from typing import Any

from attribution.fees import Contribution, Payees, Price, SplitPolicy
from attribution.record import RecipeTerm
from node.api.doors import Closing, Opening, Receipt, RecipeEntry
from node.errors import NodeError, PaymentError
from node.settlement.admission import Admission, Outcome
from node.settlement.ledger import Ledger
from node.settlement.vouchers import VoucherDesk


class SettlementBooks:
    """Opens and closes the books of every request.

    Args:
        desk: None on a node that takes no payment.
        requires_payment: Refuse requests without a voucher.
    """

    def __init__(
        self,
        ledger: Ledger,
        desk: VoucherDesk | None,
        *,
        base_id: str,
        price: Price,
        policy: SplitPolicy,
        payees: Payees,
        requires_payment: bool,
    ) -> None:
        self._ledger = ledger
        self._desk = desk
        self._base_id = base_id
        self._price = price
        self._policy = policy
        self._payees = payees
        self._requires_payment = requires_payment

    @property
    def is_healthy(self) -> bool:
        """Whether the last commit succeeded."""
        return self._ledger.is_healthy

    async def open(self, opening: Opening) -> None:
        """Hold the largest possible price, then make the admission durable.

        Raises:
            PaymentError: No voucher where one is required, or the desk refuses it. LedgerError: The admission did not commit.
        """
        self._check_payment(opening)
        digest = None
        if opening.voucher is not None and self._desk is not None:
            digest = await self._desk.reserve(opening.request_id, opening.voucher, self._most_wei(opening))
        try:
            await self._ledger.admit(self._admission(opening, digest))
        except NodeError:
            self._release(opening.request_id)
            raise

    async def close(self, closing: Closing) -> Receipt:
        """Commit the record.

        Raises:
            LedgerError: It did not commit; what was held is free again, because nothing was charged.
        """
        outcome = Outcome(
            request_id=closing.request_id,
            status=closing.status,
            finish_reason=closing.finish_reason,
            outputs=closing.outputs,
            cached_tokens=closing.cached_tokens,
        )
        try:
            signed = await self._ledger.close(outcome)
        except NodeError:
            self._release(closing.request_id)
            raise
        if self._desk is not None:
            self._desk.settle(closing.request_id, signed.fee_wei)
        return signed.encoded

    async def receipt(self, request_id: str, tenant: str) -> dict[str, Any] | None:
        """The bundle of a closed request of this tenant, or None."""
        return await self._ledger.receipt(request_id, tenant)

    def _check_payment(self, opening: Opening) -> None:
        """Whether a voucher is there is this node's policy; whether it is any good is the desk's question."""
        if opening.voucher is None and self._requires_payment:
            raise PaymentError(
                "this node serves paid requests only; send a signed voucher in the x-openlora-voucher header",
                code="payment_required",
                param="x-openlora-voucher",
            )
        if opening.voucher is not None and self._desk is None:
            raise PaymentError(
                "this node settles on no chain and takes no vouchers; send the request without one", param="x-openlora-voucher"
            )

    def _most_wei(self, opening: Opening) -> int:
        """The fee if every choice used its whole budget."""
        prompt_count = sum(len(ids) for ids in opening.prompts)
        input_wei, output_wei = int(self._price.input_token_wei), int(self._price.output_token_wei)
        return prompt_count * input_wei + opening.max_output_tokens * output_wei

    def _admission(self, opening: Opening, digest: str | None) -> Admission:
        return Admission(
            request_id=opening.request_id,
            tenant=opening.tenant,
            base_id=self._base_id,
            prompts=opening.prompts,
            terms=tuple(_term(item) for item in opening.recipe),
            contributions=_contributions(opening.recipe),
            merge=opening.merge,
            price=self._price,
            policy=self._policy,
            payees=self._payees,
            voucher=opening.voucher,
            voucher_digest=digest,
        )

    def _release(self, request_id: str) -> None:
        if self._desk is not None:
            self._desk.release(request_id)


def _term(item: RecipeEntry) -> RecipeTerm:
    return RecipeTerm(item.entry.adapter_id, item.entry.manifest_hash, item.weight)


def _contributions(recipe: tuple[RecipeEntry, ...]) -> tuple[Contribution, ...]:
    return tuple(item.entry.manifest.contribution() for item in recipe if item.entry.manifest is not None)
