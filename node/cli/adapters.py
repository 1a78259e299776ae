"""`openlora-node adapters`: what the running node serves."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from node.cli.operate import operate
from node.cli.options import ConfigOption, DataDirOption, JsonOption, settings_from
from node.cli.table import print_json, print_rows

app = typer.Typer(help="List, add and inspect adapters of the running node.", no_args_is_help=True)


@app.command("list")
def list_adapters(config: ConfigOption = None, data_dir: DataDirOption = None, as_json: JsonOption = False) -> None:
    """List the adapters the node serves.

    Example: openlora-node adapters list --json
    """
    rows = operate(settings_from(config, data_dir), "adapters.list")
    if as_json:
        print_json(rows)
        return
    columns = {"name": "NAME", "rank": "RANK", "size": "BYTES", "trainer": "TRAINER", "adapter_id": "ADAPTER ID"}
    print_rows(rows, columns, "no adapters; add one with: openlora-node adapters add DIRECTORY")


@app.command()
def add(
    directory: Annotated[Path, typer.Argument(help="Holds adapter_config.json and adapter_model.safetensors.")],
    name: Annotated[str | None, typer.Option(help="Serve it under this name instead of the directory's.")] = None,
    config: ConfigOption = None,
    data_dir: DataDirOption = None,
) -> None:
    """Check an adapter and serve it from now on.

    Example: openlora-node adapters add ./my-adapter --name support-v2
    """
    entry = operate(settings_from(config, data_dir), "adapters.add", directory=str(directory.absolute()), name=name)
    typer.echo(f"serving {entry['name']} ({entry['adapter_id']})")


@app.command()
def show(name: str, config: ConfigOption = None, data_dir: DataDirOption = None) -> None:
    """Show one adapter: its hash, shape, trainer and the people behind its data.

    Example: openlora-node adapters show lincoln
    """
    print_json(operate(settings_from(config, data_dir), "adapters.show", name=name))
