"""What a transaction offers for gas (EIP-1559), in wei for each unit of gas. Pure integers."""

from __future__ import annotations

from dataclasses import dataclass

from node.settlement.chain import FeeMarket

# geth and its kin ask a replacement for 10 % more on both fields, some for 12.5 %: 9/8 satisfies all of them.
BUMP_NUMERATOR, BUMP_DENOMINATOR = 9, 8
GAS_MARGIN_PERCENT = 20  # between estimate and inclusion the contract's state may change


@dataclass(frozen=True, slots=True)
class Fees:
    """The two fields of a dynamic-fee transaction."""

    max_fee_wei: int
    priority_fee_wei: int


def initial_fees(market: FeeMarket) -> Fees:
    """Twice the base fee, so that it survives at least five full blocks in a row, and the going tip."""
    return Fees(2 * market.base_fee_wei + market.priority_fee_wei, market.priority_fee_wei)


def bumped_fees(fees: Fees, market: FeeMarket) -> Fees:
    """A replacement's fees: both fields up by an eighth, rounded up, and never below what the market asks."""
    wanted = initial_fees(market)
    max_fee_wei = max(_bump_up(fees.max_fee_wei), wanted.max_fee_wei)
    return Fees(max_fee_wei, min(max_fee_wei, max(_bump_up(fees.priority_fee_wei), wanted.priority_fee_wei)))


def gas_limit(estimate: int) -> int:
    """The estimate with a margin, rounded up."""
    return -(-estimate * (100 + GAS_MARGIN_PERCENT) // 100)


def _bump_up(fee_wei: int) -> int:
    return max(fee_wei + 1, -(-fee_wei * BUMP_NUMERATOR // BUMP_DENOMINATOR))
