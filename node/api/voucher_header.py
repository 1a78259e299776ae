"""`x-openlora-voucher`: base64url of a JSON object {payer, operator, cumulative, deadline, signature}.

Decoded and typed here; whether it is signed, sufficient and covered is the voucher desk's question.
"""

from __future__ import annotations

import base64
import binascii
import re
from typing import Any

from node.api.body import parse_object
from node.errors import PaymentError, RequestError

_MAX_HEADER_CHARS = 4096
_ADDRESS = re.compile(r"0x[0-9a-fA-F]{40}")
_SIGNATURE = re.compile(r"0x[0-9a-fA-F]{130}")


def read_voucher(headers: list[str]) -> dict[str, Any] | None:
    """The voucher, with `cumulative` and `deadline` as integers; None without the header.

    Raises:
        PaymentError: Sent twice, too long, not base64url JSON, or a field is missing or malformed.
    """
    if not headers:
        return None
    if len(headers) > 1 or len(headers[0]) > _MAX_HEADER_CHARS:
        raise _malformed(f"send it once, with at most {_MAX_HEADER_CHARS} characters")
    text = headers[0].strip()
    try:
        raw = base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
        voucher = parse_object(raw, max_depth=2)
    except (binascii.Error, ValueError, RequestError) as error:
        raise _malformed("it must be base64url of a JSON object") from error
    return {
        "payer": _matching(voucher, "payer", _ADDRESS, "an address of 0x and 40 hex digits"),
        "operator": _matching(voucher, "operator", _ADDRESS, "an address of 0x and 40 hex digits"),
        "cumulative": _whole(voucher, "cumulative", 1 << 256),
        "deadline": _whole(voucher, "deadline", 1 << 64),
        "signature": _matching(voucher, "signature", _SIGNATURE, "0x and 130 hex digits"),
    }


def _matching(voucher: dict[str, Any], key: str, pattern: re.Pattern[str], rule: str) -> str:
    value = voucher.get(key)
    if not isinstance(value, str) or not pattern.fullmatch(value):
        raise _malformed(f"`{key}` must be {rule}")
    return value


def _whole(voucher: dict[str, Any], key: str, limit: int) -> int:
    """A JSON integer, or its decimal text: wei amounts exceed what many JSON writers keep exact."""
    value = voucher.get(key)
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) <= 78:
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < limit:
        raise _malformed(f"`{key}` must be a whole number from 0, below 2**{limit.bit_length() - 1}")
    return value


def _malformed(rule: str) -> PaymentError:
    return PaymentError(f"the x-openlora-voucher header is malformed: {rule}", param="x-openlora-voucher")
