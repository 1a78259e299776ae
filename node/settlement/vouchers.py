"""The voucher desk: is this request paid for? Asked before admission, settled when the record is committed.

What a payer has used comes from the ledger, so a restart forgets nothing; what its running requests may still cost is reserved
here. Both together must be covered by the payer's largest promise and by the deposit that it cannot withdraw without notice.

The largest promise, not the one that came with the request: requests sent together arrive in any order, and the one that was
signed first may come last. A promise is a total, so a larger one of the same payer stands for every smaller one.
"""

from __future__ import annotations

import asyncio
import re
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from attribution.eip712 import Domain
from attribution.errors import AttributionError
from attribution.signing import checksum_address
from attribution.voucher import Voucher
from node.errors import LedgerError, PaymentError
from node.settlement.admission import SignedVoucher

MAX_CACHED_PAYERS = 10_000
_FIELDS = ("payer", "operator", "cumulative", "deadline", "signature")
_SIGNATURE = re.compile(r"0x[0-9a-fA-F]{130}")


class EscrowReads(Protocol):
    """What the desk asks the escrow. Blocking; called on worker threads."""

    def escrow_committed_wei(self, payer: str) -> int:
        """The deposit that the payer cannot withdraw without notice."""

    def collected_wei(self, payer: str, operator: str) -> int:
        """Cumulative amount collected from the payer for the operator."""


@dataclass(frozen=True, slots=True)
class _Deposit:
    committed_wei: int
    collected_wei: int
    read_at_s: float


@dataclass(frozen=True, slots=True)
class _Reservation:
    payer: str
    max_fee_wei: int
    promised_wei: int


class VoucherDesk:
    """Checks vouchers and keeps reservations. Lives on the event loop.

    Args:
        used_wei: What a payer's committed records cost so far (`Ledger.used_wei`).
        best_voucher: The largest promise of a payer that the ledger keeps, or None (`Ledger.best_voucher`).
        operator: Whom vouchers must name.
        domain: EIP-712 domain of the escrow (`attribution.voucher.escrow_domain`).
        escrow: Deposits.
        now_s: UTC seconds, for deadlines.
        monotonic_s: Seconds of a clock that never steps, for the cache.
        cache_s: How long a deposit may be believed.
        min_validity_s: A voucher must live at least this much longer, so that it can still be collected.
    """

    def __init__(
        self,
        *,
        used_wei: Callable[[str], int],
        best_voucher: Callable[[str], SignedVoucher | None],
        operator: str,
        domain: Domain,
        escrow: EscrowReads,
        now_s: Callable[[], float],
        monotonic_s: Callable[[], float],
        cache_s: float = 5.0,
        min_validity_s: float = 3600.0,
    ) -> None:
        self._used_wei, self._best_voucher = used_wei, best_voucher
        self._operator, self._domain, self._escrow = operator, domain, escrow
        self._now_s, self._monotonic_s = now_s, monotonic_s
        self._cache_s, self._min_validity_s = cache_s, min_validity_s
        self._deposits: OrderedDict[str, _Deposit] = OrderedDict()
        self._reservations: dict[str, _Reservation] = {}
        self._reserved_wei: dict[str, int] = {}

    async def reserve(self, request_id: str, voucher: SignedVoucher, max_fee_wei: int) -> str:
        """Hold `max_fee_wei` of a payer's promise for one request. Call `settle` or `release` when it is over.

        Args:
            request_id: Unique; one reservation each.
            voucher: From `parse_voucher`.
            max_fee_wei: The most the request can cost.

        Returns:
            The voucher's EIP-712 digest, 64 hex digits, for the record.

        Raises:
            PaymentError: voucher_invalid, voucher_too_small or deposit_too_small, with the amounts.
            ChainError: The escrow cannot be asked. LedgerError: The escrow has collected more than the ledger knows.
        """
        digest = self._check_signature(voucher)
        self._check_promise(voucher, max_fee_wei)
        deposit = await self._deposit(voucher.payer, max_age_s=self._cache_s)
        if self._uncovered(voucher.payer, deposit, max_fee_wei) > 0 and deposit.read_at_s < self._monotonic_s():
            deposit = await self._deposit(voucher.payer, max_age_s=0.0)  # the payer may just have topped it up
        # Other requests of this payer were reserved while the escrow answered: check again, and reserve without another await.
        self._check_promise(voucher, max_fee_wei)
        self._check_deposit(voucher.payer, deposit, max_fee_wei)
        if request_id in self._reservations:
            raise ValueError(f"request {request_id} has a reservation already")
        self._reservations[request_id] = _Reservation(voucher.payer, max_fee_wei, voucher.cumulative_wei)
        self._reserved_wei[voucher.payer] = self.reserved_wei(voucher.payer) + max_fee_wei
        return digest

    def settle(self, request_id: str, fee_wei: int) -> None:
        """The record is committed, so the ledger counts the fee from here on: drop the reservation."""
        reservation = self._reservations.get(request_id)
        self.release(request_id)
        if reservation is not None and fee_wei > reservation.max_fee_wei:
            raise ValueError(f"request {request_id} cost {fee_wei} wei, above its reservation of {reservation.max_fee_wei}")

    def release(self, request_id: str) -> None:
        """Drop a reservation; unknown ids (requests nobody pays for) are ignored."""
        reservation = self._reservations.pop(request_id, None)
        if reservation is None:
            return
        left = self._reserved_wei[reservation.payer] - reservation.max_fee_wei
        if left or any(other.payer == reservation.payer for other in self._reservations.values()):
            self._reserved_wei[reservation.payer] = left
        else:
            del self._reserved_wei[reservation.payer]

    def reserved_wei(self, payer: str) -> int:
        """The most that a payer's running requests can cost."""
        return self._reserved_wei.get(payer, 0)

    def _check_signature(self, signed: SignedVoucher) -> str:
        voucher = Voucher(signed.payer, signed.operator, signed.cumulative_wei, signed.deadline)
        if signed.operator != self._operator:
            raise PaymentError(
                f"the voucher names operator {signed.operator}; this node is {self._operator}", param="voucher.operator"
            )
        left_s = signed.deadline - self._now_s()
        if left_s < self._min_validity_s:
            raise PaymentError(
                f"the voucher's deadline is {left_s:.0f} s away; it must be at least {self._min_validity_s:.0f} s away",
                param="voucher.deadline",
            )
        try:
            signer, digest = voucher.signer_of(self._domain, signed.signature), voucher.digest(self._domain)
        except AttributionError as error:
            raise PaymentError(f"the voucher cannot be checked: {error}", param="voucher.signature") from error
        if signer != signed.payer:
            raise PaymentError(
                f"the voucher is not signed by its payer {signed.payer} for chain {self._domain.chain_id} and escrow "
                f"{self._domain.verifying_contract}; sign it again for both",
                param="voucher.signature",
            )
        return digest.hex()

    def _check_promise(self, voucher: SignedVoucher, max_fee_wei: int) -> None:
        needed, promised = self._needed(voucher.payer, max_fee_wei), self._promised(voucher)
        if promised < needed:
            raise PaymentError(
                f"the voucher promises {promised} wei in all; {needed} are needed: {self._used_wei(voucher.payer)} "
                f"used, {self.reserved_wei(voucher.payer)} reserved, {max_fee_wei} for this request at most",
                code="voucher_too_small",
                param="voucher.cumulative",
            )

    def _promised(self, voucher: SignedVoucher) -> int:
        """The largest promise of this payer that can be collected: this one, one of a running request, or the ledger's."""
        running = [held.promised_wei for held in self._reservations.values() if held.payer == voucher.payer]
        kept = self._best_voucher(voucher.payer)
        if kept is not None and kept.deadline - self._now_s() >= self._min_validity_s:
            running.append(kept.cumulative_wei)
        return max([voucher.cumulative_wei, *running])

    def _check_deposit(self, payer: str, deposit: _Deposit, max_fee_wei: int) -> None:
        used = self._used_wei(payer)
        if deposit.collected_wei > used:
            raise LedgerError(
                f"the escrow has collected {deposit.collected_wei} wei from {payer}, the ledger knows of {used}; "
                "restore the newest ledger or run under another operator key",
                code="ledger_corrupt",
            )
        missing = self._uncovered(payer, deposit, max_fee_wei)
        if missing > 0:
            raise PaymentError(
                f"the deposit of {payer} is {missing} wei too small for this request; deposit more in the escrow "
                f"{self._domain.verifying_contract}",
                code="deposit_too_small",
            )

    def _needed(self, payer: str, max_fee_wei: int) -> int:
        return self._used_wei(payer) + self.reserved_wei(payer) + max_fee_wei

    def _uncovered(self, payer: str, deposit: _Deposit, max_fee_wei: int) -> int:
        """How much of what is needed neither the deposit nor earlier collections cover."""
        return self._needed(payer, max_fee_wei) - deposit.collected_wei - deposit.committed_wei

    async def _deposit(self, payer: str, *, max_age_s: float) -> _Deposit:
        known = self._deposits.get(payer)
        if known is not None and self._monotonic_s() - known.read_at_s < max_age_s:
            return known
        fresh = await asyncio.to_thread(self._read_deposit, payer)
        self._deposits[payer] = fresh
        self._deposits.move_to_end(payer)
        while len(self._deposits) > MAX_CACHED_PAYERS:
            self._deposits.popitem(last=False)
        return fresh

    def _read_deposit(self, payer: str) -> _Deposit:
        """Collections first: one that is mined between the two reads then makes the sum too small, never too large."""
        read_at_s = self._monotonic_s()
        collected_wei = self._escrow.collected_wei(payer, self._operator)
        return _Deposit(self._escrow.escrow_committed_wei(payer), collected_wei, read_at_s)


def parse_voucher(value: Any) -> SignedVoucher:
    """Read a voucher as clients send it.

    Args:
        value: {"payer", "operator", "cumulative", "deadline", "signature"}: two addresses, wei as a decimal string, UTC seconds
            as an integer, and 0x with 130 hex digits.

    Raises:
        PaymentError: voucher_invalid, naming the field.
    """
    if not isinstance(value, Mapping) or set(value) != set(_FIELDS):
        raise PaymentError(f"the voucher must be an object with exactly {', '.join(_FIELDS)}", param="voucher")
    cumulative, deadline, signature = value["cumulative"], value["deadline"], value["signature"]
    if not isinstance(cumulative, str) or not (cumulative.isascii() and cumulative.isdigit()) or len(cumulative) > 78:
        raise PaymentError("voucher.cumulative must be a decimal string of wei", param="voucher.cumulative")
    if int(cumulative) >> 256:
        raise PaymentError("voucher.cumulative must be below 2**256", param="voucher.cumulative")
    if not isinstance(deadline, int) or isinstance(deadline, bool) or not 0 <= deadline < 1 << 64:
        raise PaymentError("voucher.deadline must be an integer of UTC seconds", param="voucher.deadline")
    if not isinstance(signature, str) or not _SIGNATURE.fullmatch(signature):
        raise PaymentError("voucher.signature must be 0x and 130 hex digits", param="voucher.signature")
    return SignedVoucher(
        _address(value["payer"], "payer"),
        _address(value["operator"], "operator"),
        int(cumulative),
        deadline,
        bytes.fromhex(signature[2:]),
    )


def _address(value: Any, field: str) -> str:
    try:
        return checksum_address(value, f"voucher.{field}")
    except AttributionError as error:
        raise PaymentError(f"voucher.{field} must be 0x and 40 hex digits", param=f"voucher.{field}") from error
