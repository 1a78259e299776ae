"""Options that several commands share, and how they become settings."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from node.config import Settings, load_settings

ConfigOption = Annotated[Path | None, typer.Option("--config", help="TOML file; every key is explained in config/node.toml.")]
DataDirOption = Annotated[Path | None, typer.Option("--data-dir", help="Ledger, keys, caches and the embedded chain live here.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


def settings_from(config: Path | None, data_dir: Path | None, **overrides: Any) -> Settings:
    """Load the settings with what the command line gave; `server_port=9000` overrides `server.port`."""
    given = {key.replace("_", ".", 1): value for key, value in overrides.items() if value is not None}
    if data_dir is not None:
        given["data_dir"] = data_dir.expanduser().resolve()
    return load_settings(config, given)
