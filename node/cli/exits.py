"""Exit codes of the command (sysexits), from the error's code. The one place where they are assigned."""

from __future__ import annotations

from node.errors import (
    AdapterError,
    AdapterNotFoundError,
    ChainError,
    ConfigError,
    EngineError,
    KeystoreError,
    LedgerError,
    ModelLoadError,
    NodeError,
    RequestError,
)

FAILURE = 1
USAGE = 64
BAD_DATA = 65
NO_INPUT = 66
UNAVAILABLE = 69
CANNOT_CREATE = 73
TEMPORARY = 75
PERMISSION = 77
CONFIGURATION = 78

_BY_CODE = {
    "port_in_use": UNAVAILABLE,
    "node_not_running": UNAVAILABLE,
    "secret_permissions": PERMISSION,
    "keystore_password": PERMISSION,
    "keystore_permissions": PERMISSION,
    "keystore_missing": NO_INPUT,
    "ledger_locked": TEMPORARY,
    "chain_locked": TEMPORARY,
    "chain_corrupt": BAD_DATA,
    "chain_none": CONFIGURATION,
    "ledger_url": CONFIGURATION,
    "ledger_schema_newer": CONFIGURATION,
    "ledger_corrupt": BAD_DATA,
    "ledger_path": CANNOT_CREATE,
    "model_not_found_on_disk": NO_INPUT,
    "model_corrupt": BAD_DATA,
    "model_too_large": UNAVAILABLE,
    "receipt_invalid": BAD_DATA,
    "receipt_unauthenticated": PERMISSION,
    "receipt_not_found": NO_INPUT,
    "epoch_pending": TEMPORARY,
    "epoch_not_active": TEMPORARY,
    "epoch_unknown": NO_INPUT,
    "epoch_void": BAD_DATA,
    "epoch_unfunded": BAD_DATA,
    "chain_mismatch": CONFIGURATION,
    "contract_missing": CONFIGURATION,
    "chain_full": CANNOT_CREATE,
    "file_not_found": NO_INPUT,
}

_BY_CLASS: tuple[tuple[type[NodeError], int], ...] = (
    (ConfigError, CONFIGURATION),
    (KeystoreError, BAD_DATA),
    (LedgerError, TEMPORARY),
    (ModelLoadError, BAD_DATA),
    (AdapterNotFoundError, NO_INPUT),
    (AdapterError, BAD_DATA),
    (EngineError, UNAVAILABLE),
    (ChainError, UNAVAILABLE),
    (RequestError, USAGE),
)


def exit_code(error: NodeError) -> int:
    """The process exit code for `error`; 1 for what has no code of its own."""
    if error.error_code in _BY_CODE:
        return _BY_CODE[error.error_code]
    return next((code for kind, code in _BY_CLASS if isinstance(error, kind)), FAILURE)
