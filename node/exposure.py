"""Strangers may reach the node only when its operator said how: with keys, or openly."""

from __future__ import annotations

from node.config import LEDGER_NAME, LOOPBACK_HOSTS, Settings
from node.errors import ConfigError


def check_exposure(settings: Settings) -> None:
    """Before anything is opened, this can tell only whether there may be keys.

    Raises:
        ConfigError: The node would answer other machines, and there can be no keys.
    """
    server = settings.server
    if server.host in LOOPBACK_HOSTS or server.api_keys_file is not None or server.insecure:
        return
    if settings.ledger.url is None and not (settings.data_dir / LEDGER_NAME).exists():
        raise exposed(server.host)


def exposed(host: str) -> ConfigError:
    """What to say of a node without keys on `host`."""
    return ConfigError(
        f"server.host {host} is reachable from other machines; make a key with openlora-node keys create, set "
        "server.api_keys_file, or accept all with --insecure"
    )
