"""`openlora-node adapters`: what the running node serves."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from node.adapters.disk_cache import open_disk_cache
from node.cli.operate import operate
from node.cli.options import ConfigOption, DataDirOption, JsonOption, settings_from
from node.cli.table import print_json, print_rows
from node.config import parse_size

app = typer.Typer(help="List, add and inspect adapters of the running node.", no_args_is_help=True)


@app.command("list")
def list_adapters(config: ConfigOption = None, data_dir: DataDirOption = None, as_json: JsonOption = False) -> None:
    """List the adapters the node serves, and where each one is: resident, host, waiting or disk.

    Example: openlora-node adapters list --json
    """
    rows = operate(settings_from(config, data_dir), "adapters.list")
    if as_json:
        print_json(rows)
        return
    columns = {
        "name": "NAME",
        "rank": "RANK",
        "size": "BYTES",
        "state": "STATE",
        "owner": "FOR",
        "trainer": "TRAINER",
        "adapter_id": "ADAPTER ID",
    }
    rows = [{**row, "owner": row["owner"] or "everybody"} for row in rows]
    print_rows(rows, columns, "no adapters; add one with: openlora-node adapters add DIRECTORY")


@app.command()
def fetching(config: ConfigOption = None, data_dir: DataDirOption = None, as_json: JsonOption = False) -> None:
    """Show the downloads under way, of all tenants, and how far each one is.

    Example: openlora-node adapters fetching
    """
    rows = operate(settings_from(config, data_dir), "adapters.fetching")
    if as_json:
        print_json(rows)
        return
    shown = [{**row, "total_bytes": "unknown" if row["total_bytes"] is None else row["total_bytes"]} for row in rows]
    print_rows(shown, {"name": "NAME", "done_bytes": "BYTES", "total_bytes": "OF"}, "nothing is being fetched")


@app.command()
def add(
    directory: Annotated[Path, typer.Argument(help="Holds adapter_config.json and adapter_model.safetensors.")],
    name: Annotated[str | None, typer.Option(help="Serve it under this name instead of the directory's.")] = None,
    owner: Annotated[str | None, typer.Option(help="Only this tenant may use it; it does not exist for others.")] = None,
    allow: Annotated[list[str] | None, typer.Option(help="Another tenant that may use it; may be repeated.")] = None,
    config: ConfigOption = None,
    data_dir: DataDirOption = None,
) -> None:
    """Check an adapter and serve it from now on, also after a restart, until it is removed.

    Example: openlora-node adapters add ./my-adapter --name support-v2 --owner acme
    """
    entry = operate(
        settings_from(config, data_dir),
        "adapters.add",
        directory=str(directory.absolute()),
        name=name,
        owner=owner,
        allowed=allow or [],
    )
    typer.echo(f"serving {entry['name']} ({entry['adapter_id']})")


@app.command()
def remove(name: str, config: ConfigOption = None, data_dir: DataDirOption = None) -> None:
    """Stop serving an adapter that was added; its files stay where they are, and requests that run end as they would.

    Example: openlora-node adapters remove support-v2
    """
    operate(settings_from(config, data_dir), "adapters.remove", name=name)
    typer.echo(f"{name} is no longer served")


@app.command()
def gc(
    to: Annotated[
        str | None, typer.Option(help="Size to shrink to, for example 5GiB or 0; default: adapters.cache_bytes.")
    ] = None,
    config: ConfigOption = None,
    data_dir: DataDirOption = None,
    as_json: JsonOption = False,
) -> None:
    """Remove the adapters fetched to disk that were used longest ago. What was used in the last ten minutes stays.

    Example: openlora-node adapters gc --to 5GiB
    """
    cache = open_disk_cache(settings_from(config, data_dir))
    removed = cache.collect(cache.limit_bytes if to is None else _size(to))
    left = cache.entries()
    if as_json:
        shown = [{"directory": str(entry.directory), "size_bytes": entry.size_bytes} for entry in removed]
        print_json({"removed": shown, "left_count": len(left), "left_bytes": sum(entry.size_bytes for entry in left)})
        return
    for entry in removed:
        typer.echo(f"removed {entry.directory.relative_to(cache.root)} ({entry.size_bytes} bytes)")
    typer.echo(f"{len(removed)} removed, {len(left)} left ({sum(entry.size_bytes for entry in left)} bytes)")


def _size(text: str) -> int:
    try:
        return int(parse_size(text))
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--to") from error


@app.command()
def show(name: str, config: ConfigOption = None, data_dir: DataDirOption = None) -> None:
    """Show one adapter: its hash, shape, trainer and the people behind its data.

    Example: openlora-node adapters show lincoln
    """
    print_json(operate(settings_from(config, data_dir), "adapters.show", name=name))


@app.command()
def restrict(
    name: str,
    owner: Annotated[str, typer.Option(help="The tenant it belongs to.")],
    allow: Annotated[list[str] | None, typer.Option(help="Another tenant that may use it; may be repeated.")] = None,
    ahead: Annotated[bool, typer.Option("--ahead", help="The adapter is not known here yet.")] = False,
    config: ConfigOption = None,
    data_dir: DataDirOption = None,
) -> None:
    """Make an adapter private: from the next request on it does not exist for other tenants.

    Example: openlora-node adapters restrict lincoln --owner acme --allow beta
    """
    settings = settings_from(config, data_dir)
    row = operate(settings, "adapters.restrict", name=name, owner=owner, allowed=allow or [], ahead=ahead)
    typer.echo(f"{row['name']} is for {', '.join([row['owner'], *row['allowed']])} alone")


@app.command()
def release(name: str, config: ConfigOption = None, data_dir: DataDirOption = None) -> None:
    """Make a private adapter public again.

    Example: openlora-node adapters release lincoln
    """
    operate(settings_from(config, data_dir), "adapters.release", name=name)
    typer.echo(f"{name} is for everybody")
