"""Who contributed how much, in parts per million: recipe weights across adapters, manifest shares within one."""

from __future__ import annotations

import re
from collections.abc import Mapping

from attribution.errors import SplitError
from attribution.money import PPM, split

WEIGHT_DECIMALS = 18
_WEIGHT = re.compile(r"-?(0|[1-9][0-9]{0,8})(\.[0-9]{1,18})?")


def parse_weight(text: str) -> int:
    """A recipe weight as an exact integer, in units of 10**-18.

    Raises:
        SplitError: Not a plain decimal of at most 9 digits before and 18 after the point.
    """
    if not _WEIGHT.fullmatch(text):
        raise SplitError(f"weight {text[:40]!r} is not a plain decimal with at most 9 digits before and 18 after the point")
    whole, _, fraction = text.lstrip("-").partition(".")
    value = int(whole + fraction.ljust(WEIGHT_DECIMALS, "0"))
    return -value if text.startswith("-") else value


def adapter_shares(weights: Mapping[str, str], tie: bytes) -> dict[str, int]:
    """Parts per million of every adapter of a recipe, by the magnitude of its weight. They sum to 1,000,000.

    A subtracted adapter (negative weight) shaped the answer as much as an added one, so magnitudes count.

    Args:
        weights: Decimal weight by adapter id. Not empty.
        tie: Decides equal remainders; see `attribution.money.split`.

    Raises:
        SplitError: A malformed weight, or every weight is zero.
    """
    return split(PPM, {key: abs(parse_weight(text)) for key, text in weights.items()}, tie)
