"""`openlora-node keys`: who may use the node, and how much."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from node.cli.operate import operate
from node.cli.options import ConfigOption, DataDirOption, JsonOption, settings_from
from node.cli.table import print_json, print_rows

app = typer.Typer(help="Create, list, limit and revoke API keys. A running node follows at once.", no_args_is_help=True)

TenantArgument = Annotated[str, typer.Argument(help="The customer the key belongs to; limits hold for all of its keys together.")]
WeightOption = Annotated[int | None, typer.Option(help="Share of the engine when others want it too, 1 to 1000.")]
RequestsOption = Annotated[int | None, typer.Option(help="At most so many requests a minute; 0: no limit.")]
TokensOption = Annotated[int | None, typer.Option(help="At most so many prompt and output tokens a minute; 0: no limit.")]
ConcurrentOption = Annotated[int | None, typer.Option(help="At most so many generations at once; 0: no limit.")]
TokenDayOption = Annotated[int | None, typer.Option(help="Tokens of a UTC day; 0: no limit.")]
TokenMonthOption = Annotated[int | None, typer.Option(help="Tokens of a UTC month; 0: no limit.")]
WeiDayOption = Annotated[int | None, typer.Option(help="Wei of a UTC day; 0: no limit.")]
WeiMonthOption = Annotated[int | None, typer.Option(help="Wei of a UTC month; 0: no limit.")]


@app.command()
def create(
    tenant: TenantArgument,
    scope: Annotated[
        list[str] | None,
        typer.Option(help="inference, adapters:read, adapters:write, metrics or admin; may be repeated. Default: inference."),
    ] = None,
    expires_days: Annotated[float | None, typer.Option(help="The key ends after so many days.")] = None,
    weight: WeightOption = None,
    requests_per_minute: RequestsOption = None,
    tokens_per_minute: TokensOption = None,
    max_concurrent: ConcurrentOption = None,
    tokens_per_day: TokenDayOption = None,
    tokens_per_month: TokenMonthOption = None,
    wei_per_day: WeiDayOption = None,
    wei_per_month: WeiMonthOption = None,
    config: ConfigOption = None,
    data_dir: DataDirOption = None,
) -> None:
    """Make a key and print it, this once: the node keeps only its digest.

    Example: openlora-node keys create acme --tokens-per-day 1000000
    """
    limits = _limits(
        requests_per_minute, tokens_per_minute, max_concurrent, tokens_per_day, tokens_per_month, wei_per_day, wei_per_month
    )
    made = operate(
        settings_from(config, data_dir),
        "keys.create",
        tenant=tenant,
        scopes=scope or ["inference"],
        expires_days=expires_days,
        weight=weight,
        limits=limits,
    )
    typer.echo(f"key {made['key_id']} of {tenant}; it is shown only now", err=True)
    typer.echo(made["key"])


@app.command("list")
def list_keys(config: ConfigOption = None, data_dir: DataDirOption = None, as_json: JsonOption = False) -> None:
    """List all keys, revoked ones too.

    Example: openlora-node keys list --json
    """
    rows = operate(settings_from(config, data_dir), "keys.list")
    if as_json:
        print_json(rows)
        return
    shown = [{**row, "scopes": " ".join(row["scopes"])} for row in rows]
    columns = {"key_id": "KEY ID", "tenant": "TENANT", "state": "STATE", "scopes": "SCOPES"}
    print_rows(shown, columns, "no keys: the node serves whoever reaches it on this machine; make one with: keys create TENANT")


@app.command()
def show(key_id: str, config: ConfigOption = None, data_dir: DataDirOption = None) -> None:
    """Show one key, its tenant's limits, and what the tenant used today and this month.

    Example: openlora-node keys show abcdefghijkl
    """
    print_json(operate(settings_from(config, data_dir), "keys.show", key_id=key_id))


@app.command()
def revoke(key_id: str, config: ConfigOption = None, data_dir: DataDirOption = None) -> None:
    """End a key: its next request is refused; one that runs may finish.

    Example: openlora-node keys revoke abcdefghijkl
    """
    row = operate(settings_from(config, data_dir), "keys.revoke", key_id=key_id)
    typer.echo(f"revoked {row['key_id']} of {row['tenant']}")


@app.command()
def limit(
    tenant: TenantArgument,
    weight: WeightOption = None,
    requests_per_minute: RequestsOption = None,
    tokens_per_minute: TokensOption = None,
    max_concurrent: ConcurrentOption = None,
    tokens_per_day: TokenDayOption = None,
    tokens_per_month: TokenMonthOption = None,
    wei_per_day: WeiDayOption = None,
    wei_per_month: WeiMonthOption = None,
    config: ConfigOption = None,
    data_dir: DataDirOption = None,
) -> None:
    """Change a tenant's weight and limits, from the next request on; what is not named stays.

    Example: openlora-node keys limit acme --weight 3 --max-concurrent 8
    """
    limits = _limits(
        requests_per_minute, tokens_per_minute, max_concurrent, tokens_per_day, tokens_per_month, wei_per_day, wei_per_month
    )
    print_json(operate(settings_from(config, data_dir), "keys.limit", tenant=tenant, weight=weight, limits=limits))


def _limits(
    requests_per_minute: int | None,
    tokens_per_minute: int | None,
    max_concurrent: int | None,
    tokens_per_day: int | None,
    tokens_per_month: int | None,
    wei_per_day: int | None,
    wei_per_month: int | None,
) -> dict[str, Any]:
    """Those that were given."""
    given = {
        "requests_per_minute": requests_per_minute,
        "tokens_per_minute": tokens_per_minute,
        "max_concurrent": max_concurrent,
        "tokens_per_day": tokens_per_day,
        "tokens_per_month": tokens_per_month,
        "wei_per_day": wei_per_day,
        "wei_per_month": wei_per_month,
    }
    return {name: value for name, value in given.items() if value is not None}
