"""What a request costs, and the exact integers everyone gets."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from attribution.errors import RecordError
from attribution.money import PPM, split

STATUSES = ("ok", "cancelled", "failed", "interrupted")


class Tokens(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Token counts of one request: `prompt` read, `cached` of those found in the prefix cache, `output` delivered."""

    prompt: int
    cached: int
    output: int


class Price(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Wei per token, as decimal strings (JSON integers end at 2**53)."""

    input_token_wei: str
    output_token_wei: str


class SplitPolicy(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How a fee is shared, in parts per million that sum to 1,000,000."""

    node_ppm: int
    trainer_ppm: int
    data_ppm: int


class Payees(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Addresses of the node's own share and of the shares of adapters that have no manifest."""

    operator: str
    reserve: str


class Contribution(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Who made one adapter: its trainer and the contributors of its data as (address, share_ppm), sorted by address."""

    adapter_id: str
    trainer: str
    contributors: tuple[tuple[str, int], ...]


class SplitLine(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One payment. `role` is node, trainer, data or reserve; `adapter_id` is None for the node's own share."""

    role: str
    account: str
    adapter_id: str | None
    amount_wei: str


def fee_wei(status: str, tokens: Tokens, price: Price) -> int:
    """The fee, in wei.

    Semantics:
        prompt * input price + output * output price, cached prompt tokens at the full price. A cancelled request pays the same
        for what was delivered, and nothing when no token was. A failed or interrupted one pays nothing.

    Raises:
        RecordError: An unknown status, a negative count, more cached than prompt tokens, or a malformed price.
    """
    if status not in STATUSES:
        raise RecordError(f"status is {status!r:.40}; it must be one of {', '.join(STATUSES)}")
    if min(tokens.prompt, tokens.cached, tokens.output) < 0 or tokens.cached > tokens.prompt:
        raise RecordError(f"token counts are {tokens}; they must be 0 or more, with no more cached than prompt tokens")
    full = tokens.prompt * parse_wei(price.input_token_wei) + tokens.output * parse_wei(price.output_token_wei)
    if status == "ok" or (status == "cancelled" and tokens.output > 0):
        return full
    return 0


def parse_wei(text: str) -> int:
    """A decimal string of wei as an integer below 2**256.

    Raises:
        RecordError: Signs, leading zeros, anything but digits, or too large.
    """
    if not (text.isascii() and text.isdigit()) or (text[0] == "0" and text != "0") or len(text) > 78 or int(text) >> 256:
        raise RecordError(f"amount {text[:80]!r} is not a plain decimal number of wei below 2**256")
    return int(text)


def split_fee(
    fee: int,
    policy: SplitPolicy,
    payees: Payees,
    adapter_shares: Sequence[tuple[str, int]],
    contributions: Sequence[Contribution],
    tie: bytes,
) -> tuple[SplitLine, ...]:
    """Everybody's payment for one request. The amounts sum to `fee` exactly; payments of 0 are left out.

    Semantics:
        1. The fee is split into a node, a trainer and a data pot by the policy; without adapters the node gets all of it.
        2. The trainer pot and the data pot are each split over the adapters by their share.
        3. An adapter's data share is split over its contributors. Without a manifest, trainer and data share go to the reserve.
        Every split is `attribution.money.split`.

    Args:
        fee: Wei, >= 0.
        policy: Shares in ppm.
        payees: The node's own addresses.
        adapter_shares: (adapter_id, share_ppm) in recipe order, summing to 1,000,000; empty for the base model alone.
        contributions: Of the adapters that have a manifest.
        tie: Decides equal remainders.

    Raises:
        RecordError: The policy does not sum to 1,000,000. SplitError: Weights that cannot share a sum.
    """
    pots = {"node": policy.node_ppm, "trainer": policy.trainer_ppm, "data": policy.data_ppm}
    if sum(pots.values()) != PPM or min(pots.values()) < 0:
        raise RecordError(f"the split policy is {policy}; its shares must be 0 or more and sum to {PPM}")
    if fee == 0:
        return ()
    if not adapter_shares:
        return (SplitLine("node", payees.operator, None, str(fee)),)
    shares = dict(adapter_shares)
    makers = {contribution.adapter_id: contribution for contribution in contributions}
    amounts = split(fee, pots, tie)
    trainer, data = split(amounts["trainer"], shares, tie + b"trainer"), split(amounts["data"], shares, tie + b"data")
    lines: list[tuple[str, str, str | None, int]] = [("node", payees.operator, None, amounts["node"])]
    for adapter_id in shares:
        maker = makers.get(adapter_id)
        if maker is None:
            lines.append(("reserve", payees.reserve, adapter_id, trainer[adapter_id] + data[adapter_id]))
            continue
        lines.append(("trainer", maker.trainer, adapter_id, trainer[adapter_id]))
        for account, amount in split(data[adapter_id], dict(maker.contributors), tie + adapter_id.encode()).items():
            lines.append(("data", account, adapter_id, amount))
    return tuple(SplitLine(role, account, adapter, str(amount)) for role, account, adapter, amount in lines if amount)
