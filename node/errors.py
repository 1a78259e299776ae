"""The error tree of the node.

    NodeError
    |-- RequestError              the caller's body or parameters
    |   |-- ContextLengthError    prompt and answer do not fit the model
    |   |-- UnsupportedError      a named feature this node does not have
    |   |-- GrammarError          a schema, pattern or grammar for the answer that cannot be used
    |   `-- ModelNotFoundError    `model` is neither the base nor an adapter
    |-- AdapterError              a named adapter cannot be used
    |   |-- AdapterIdError        the name itself is malformed
    |   |-- AdapterNotFoundError  no source has it
    |   |-- AdapterForbiddenError the source refuses us, or we refuse the source
    |   |-- AdapterInvalidError   the files are there and are not a LoRA adapter of this base
    |   |-- AdapterChangedError   other bytes under a pinned hash
    |   `-- AdapterUnavailableError  the source or the cache fails now; later may work
    |-- AuthError                 no key, wrong key, key without the right
    |-- PaymentError              voucher missing, malformed, too small, not covered
    |-- OverloadedError           a queue is full
    |-- EngineError               the engine process died, stalled or refused the work
    |-- LedgerError               the ledger did not commit
    |-- ChainError                RPC, transaction, contract
    |-- KeystoreError             key files and passwords
    |-- ConfigError               a setting, before anything starts
    `-- ModelLoadError            the base model cannot be run

Every message says what happened, the value, the limit and the remedy. `code` is stable and is what programs match on.
HTTP status and process exit codes are assigned in one place each: `node.api.errors` and `node.cli.exits`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar


class NodeError(Exception):
    """Anything the node reports to a user, with a stable code.

    Raised as itself for a defect of the node (internal_error) and by the command line about the files it is given
    (receipt_invalid, receipt_unauthenticated, file_not_found).

    Args:
        message: What happened, the offending value, the limit and the remedy. Never the text of a library's exception.
        code: Overrides the class's code where one class covers several documented codes.
        param: The request field at fault, in the client's own spelling (`messages[2].content`), or None.
        retry_after_s: Seconds after which a retry may succeed, or None when a retry does not help.
    """

    code: ClassVar[str] = "internal_error"

    def __init__(
        self, message: str, *, code: str | None = None, param: str | None = None, retry_after_s: float | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.error_code = code or type(self).code
        self.param = param
        self.retry_after_s = retry_after_s

    @property
    def is_retryable(self) -> bool:
        """Whether the same request may succeed later without change."""
        return self.retry_after_s is not None

    def to_json(self) -> dict[str, Any]:
        """The error for another process of this node; `error_from_json` is the inverse."""
        return {
            "kind": type(self).__name__,
            "message": self.message,
            "code": self.error_code,
            "param": self.param,
            "retry_after_s": self.retry_after_s,
        }


def error_from_json(values: Mapping[str, Any]) -> NodeError:
    """The error that `NodeError.to_json` described, of the same class, so that it has the same exit code and HTTP status."""
    kinds = {kind.__name__: kind for kind in every_error(NodeError)}
    kind = kinds.get(values["kind"], NodeError)
    return kind(values["message"], code=values["code"], param=values["param"], retry_after_s=values["retry_after_s"])


def every_error(kind: type[NodeError]) -> list[type[NodeError]]:
    """`kind` and all classes below it."""
    return [kind, *(found for child in kind.__subclasses__() for found in every_error(child))]


class RequestError(NodeError):
    """The request itself is wrong; sending it again cannot help.

    Codes: invalid_request, invalid_json, not_found, method_not_allowed, unsupported_media_type, body_too_large, body_timeout,
    receipt_not_found, key_not_found, adapter_exists, idempotency_key_reused, invalid_http.
    """

    code = "invalid_request"


class ContextLengthError(RequestError):
    """Prompt tokens plus requested tokens exceed the model's context."""

    code = "context_length_exceeded"


class UnsupportedError(RequestError):
    """The request names a feature this node does not offer. Codes: param_not_supported,
    modality_not_supported, not_implemented (a whole route)."""

    code = "param_not_supported"


class GrammarError(RequestError):
    """The form asked of the answer cannot be held. Codes: schema_invalid, schema_too_complex."""

    code = "schema_invalid"


class ModelNotFoundError(RequestError):
    """`model` is neither the base model nor a known adapter."""

    code = "model_not_found"


class AdapterError(NodeError):
    """A named adapter cannot be used; the node and every other adapter are unaffected."""

    code = "adapter_error"


class AdapterIdError(AdapterError):
    """The adapter name does not follow the grammar of names."""

    code = "adapter_id_invalid"


class AdapterNotFoundError(AdapterError):
    """No configured source knows the adapter. Code adapter_unloaded: the caller took its name back."""

    code = "adapter_not_found"


class AdapterForbiddenError(AdapterError):
    """Codes: source_forbidden (we refuse the source), adapter_gated (the source refuses us)."""

    code = "source_forbidden"


class AdapterInvalidError(AdapterError):
    """The files are not a usable LoRA adapter of this base model.

    Codes: adapter_format_unsupported, adapter_corrupt, adapter_header_too_large, adapter_too_many_tensors, adapter_dtype,
    adapter_rank_unsupported, adapter_base_mismatch, adapter_nonfinite, adapter_config_invalid, adapter_code_refused,
    adapter_feature_unsupported, adapter_manifest_invalid, adapter_too_large.
    """

    code = "adapter_corrupt"


class AdapterChangedError(AdapterError):
    """The bytes under a pinned hash or revision are not the bytes that were pinned."""

    code = "adapter_digest_mismatch"


class AdapterUnavailableError(AdapterError):
    """Fetching or caching fails now. Codes: source_unavailable, source_limit, cache_full, adapter_queue_full."""

    code = "source_unavailable"


class AuthError(NodeError):
    """Codes: invalid_api_key (missing, wrong, expired or revoked), insufficient_scope (the key has no right to do that)."""

    code = "invalid_api_key"


class PaymentError(NodeError):
    """Codes: payment_required, voucher_invalid, voucher_too_small, deposit_too_small, budget_exceeded (of the tenant)."""

    code = "voucher_invalid"


class OverloadedError(NodeError):
    """A bounded queue is full, or a tenant's share is used up. Codes: queue_full, draining, rate_limit_exceeded (requests or
    tokens a minute, or too many wrong API keys), concurrency_limit."""

    code = "queue_full"


class EngineError(NodeError):
    """Codes: engine_unavailable (process down or restarting), engine_failed (this request failed inside it),
    incomplete_generation (it ended without a last token), node_not_running (no node to ask on this data directory)."""

    code = "engine_unavailable"


class LedgerError(NodeError):
    """Codes: ledger_unavailable, ledger_locked, ledger_schema_newer, ledger_corrupt, ledger_path, ledger_url."""

    code = "ledger_unavailable"


class ChainError(NodeError):
    """The chain, its contracts or what an epoch needs of them.

    Codes: chain_unreachable, chain_mismatch, chain_none (this node settles nowhere), contract_missing, transaction_failed,
    transaction_unknown; of the embedded chain chain_locked, chain_corrupt, chain_full; of epochs epoch_pending, epoch_unfunded,
    epoch_unknown, epoch_void, epoch_not_active.
    """

    code = "chain_unreachable"


class KeystoreError(NodeError):
    """Codes: keystore_password, keystore_damaged, keystore_permissions, keystore_missing."""

    code = "keystore_damaged"


class ConfigError(NodeError):
    """A setting is unknown, malformed, out of range or unsafe. Codes: config_invalid, port_in_use, secret_permissions."""

    code = "config_invalid"


class ModelLoadError(NodeError):
    """Codes: model_not_found_on_disk, model_unsupported, model_corrupt, model_too_large."""

    code = "model_unsupported"
