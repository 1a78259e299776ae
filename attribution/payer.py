"""The paying side of a request: what a dApp keeps to sign one voucher per request, and nothing more.

Use:
    payer = Payer(LocalSigner(key), operator=info["operator"], domain=escrow_domain(info["chain_id"], info["escrow"]))
    headers = {"x-openlora-voucher": payer.header(max_fee_wei, deadline)}
    ...
    payer.charge(max_fee_wei, int(answer["openlora"]["receipt"]["receipt"]["feeWei"]))
"""

from __future__ import annotations

import base64
import json

from attribution.eip712 import Domain
from attribution.signing import Signer
from attribution.voucher import Voucher


class Payer:
    """Keeps the running total that one payer owes one operator.

    A voucher promises a total, not an amount, so every request signs "all that was used so far, all that is still open, and at
    most this much for the next answer". What was promised and not used is free again once the receipt is known.

    Args:
        signer: The payer's key.
        operator: The node's operator address, from `GET /info`.
        domain: `escrow_domain(chain_id, escrow)`, from the same answer.
        used_wei: What this operator already used of this payer, when the total is carried over from earlier.
    """

    def __init__(self, signer: Signer, operator: str, domain: Domain, used_wei: int = 0) -> None:
        self._signer = signer
        self._operator = operator
        self._domain = domain
        self._used_wei = used_wei
        self._open_wei = 0

    @property
    def address(self) -> str:
        """Who pays."""
        return self._signer.address

    @property
    def used_wei(self) -> int:
        """The sum of all fees charged so far."""
        return self._used_wei

    def header(self, max_fee_wei: int, deadline: int) -> str:
        """Sign for one request of at most `max_fee_wei` and return the value of `x-openlora-voucher`.

        Args:
            max_fee_wei: Prompt tokens and the largest answer at the node's prices.
            deadline: Seconds since 1970, UTC, until which the operator may collect.
        """
        self._open_wei += max_fee_wei
        voucher = Voucher(self.address, self._operator, self._used_wei + self._open_wei, deadline)
        body = {**voucher.message(), "cumulative": str(voucher.cumulative)}
        body["signature"] = "0x" + voucher.sign(self._domain, self._signer).hex()
        return base64.urlsafe_b64encode(json.dumps(body).encode()).decode()

    def charge(self, max_fee_wei: int, fee_wei: int) -> None:
        """Replace one request's `max_fee_wei` by the fee of its receipt."""
        if not 0 <= fee_wei <= max_fee_wei <= self._open_wei:
            raise ValueError(f"fee {fee_wei} > promised {max_fee_wei} > open {self._open_wei} wei: each must hold the one before")
        self._open_wei -= max_fee_wei
        self._used_wei += fee_wei
