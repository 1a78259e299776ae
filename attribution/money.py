"""Sharing an integer so that nothing is lost: the largest remainder method."""

from __future__ import annotations

from collections.abc import Mapping

from eth_hash.auto import keccak

from attribution.eip712 import hashed
from attribution.errors import SplitError

PPM = 1_000_000


def split(total_wei: int, weights: Mapping[str, int], tie: bytes) -> dict[str, int]:
    """Share `total_wei` in proportion to `weights`. The shares sum to `total_wei` exactly; each is within 1 wei of ideal.

    Semantics:
        Everyone gets floor(total * weight / sum of weights); the wei left over go one each to the largest remainders.
        Equal remainders are ordered by keccak(id | tie), so that no id is lucky in every request.

    Args:
        total_wei: What to share, >= 0.
        weights: Weight >= 0 by id. The order of the mapping changes nothing but the order of the answer.
        tie: Decides between equal remainders; anything fixed before the shares are known, such as the request's hash.

    Returns:
        The share of every id, in the order of `weights`.

    Raises:
        SplitError: A negative total or weight, or no weight above zero (also when `weights` is empty).
    """
    if total_wei < 0:
        raise SplitError(f"the total is {total_wei} wei; only 0 or more can be shared")
    if any(weight < 0 for weight in weights.values()):
        raise SplitError(f"weight {min(weights.values())} is negative; weights are 0 or more")
    weight_sum = sum(weights.values())
    if weight_sum == 0:
        raise SplitError(f"none of the {len(weights)} weights is above zero; nobody can receive {total_wei} wei")
    if len(weights) == 1:
        return dict.fromkeys(weights, total_wei)
    shares: dict[str, int] = {}
    remainders: dict[str, int] = {}
    for key, weight in weights.items():
        shares[key], remainders[key] = divmod(total_wei * weight, weight_sum)
    for key in _largest(remainders, total_wei - sum(shares.values()), tie):
        shares[key] += 1
    return shares


def request_tie(request_id: str) -> bytes:
    """What breaks ties within one request: 32 bytes that anyone with the record can recompute."""
    return hashed(request_id.encode())


def _largest(remainders: Mapping[str, int], count: int, tie: bytes) -> list[str]:
    """The `count` ids with the largest remainders. Hashes are taken only among those that compete for the last places."""
    if count == 0:
        return []
    bound = sorted(remainders.values(), reverse=True)[count - 1]
    above = [key for key, remainder in remainders.items() if remainder > bound]
    equal = [key for key, remainder in remainders.items() if remainder == bound]
    if len(above) + len(equal) > count:
        equal.sort(key=lambda key: keccak(key.encode() + b"|" + tie))
    return above + equal[: count - len(above)]
