"""`x-openlora-voucher`: base64url of a JSON object {payer, operator, cumulative, deadline, signature}.

Decoded and typed here; whether it is sufficient and covered is the voucher desk's question.
"""

from __future__ import annotations

import base64
import binascii

from node.api.body import parse_object
from node.errors import PaymentError, RequestError
from node.settlement.admission import SignedVoucher
from node.settlement.vouchers import parse_voucher

_MAX_HEADER_CHARS = 4096
_HEADER = "x-openlora-voucher"


def read_voucher(headers: list[str]) -> SignedVoucher | None:
    """The voucher; None without the header.

    Raises:
        PaymentError: voucher_invalid: sent twice, too long, not base64url JSON, or a field is missing or malformed.
    """
    if not headers:
        return None
    if len(headers) > 1 or len(headers[0]) > _MAX_HEADER_CHARS:
        raise PaymentError(f"the {_HEADER} header must come once, with at most {_MAX_HEADER_CHARS} characters", param=_HEADER)
    text = headers[0].strip()
    try:
        raw = base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
        voucher = parse_object(raw, max_depth=2)
    except (binascii.Error, ValueError, RequestError) as error:
        raise PaymentError(f"the {_HEADER} header must be base64url of a JSON object", param=_HEADER) from error
    return parse_voucher(voucher)
