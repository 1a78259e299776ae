"""`openlora-node rewards`: what people earned, and paying it out."""

from __future__ import annotations

from typing import Annotated

import typer

from node.cli.operate import operate
from node.cli.options import ConfigOption, DataDirOption, JsonOption, settings_from
from node.cli.table import print_json, print_rows

app = typer.Typer(help="Show and claim rewards.", no_args_is_help=True)
AccountOption = Annotated[str | None, typer.Option("--account", help="Only this address, 0x and 40 hex digits.")]


@app.command()
def show(
    account: AccountOption = None, config: ConfigOption = None, data_dir: DataDirOption = None, as_json: JsonOption = False
) -> None:
    """Show what each account earned, what an epoch covers and what was paid.

    Example: openlora-node rewards show --account 0x0000000000000000000000000000000000000001
    """
    rows = operate(settings_from(config, data_dir), "rewards.show", account=account)
    if as_json:
        print_json(rows)
        return
    columns = {"account": "ACCOUNT", "earned_wei": "EARNED", "in_epoch_wei": "IN AN EPOCH", "claimed_wei": "CLAIMED"}
    print_rows(rows, columns, "nobody earned anything yet")


@app.command()
def claim(account: AccountOption = None, config: ConfigOption = None, data_dir: DataDirOption = None) -> None:
    """Claim for one account, or for everyone who is owed something. The money goes only to the account itself.

    Example: openlora-node rewards claim
    """
    rows = operate(settings_from(config, data_dir), "rewards.claim", account=account)
    print_rows(rows, {"account": "ACCOUNT", "paid_wei": "PAID (WEI)", "state": "STATE"}, "nothing to claim")
