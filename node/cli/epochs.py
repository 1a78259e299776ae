"""`openlora-node epochs`: turn paid requests into a reward root on the chain."""

from __future__ import annotations

import typer

from node.cli.operate import operate
from node.cli.options import ConfigOption, DataDirOption, JsonOption, settings_from
from node.cli.table import print_json, print_rows

app = typer.Typer(help="List and close reward epochs.", no_args_is_help=True)


@app.command("list")
def list_epochs(config: ConfigOption = None, data_dir: DataDirOption = None, as_json: JsonOption = False) -> None:
    """List the epochs of this node and their state on the chain.

    Example: openlora-node epochs list
    """
    rows = operate(settings_from(config, data_dir), "epochs.list")
    if as_json:
        print_json(rows)
        return
    columns = {"epoch_id": "EPOCH", "state": "STATE", "records": "RECORDS", "total_wei": "TOTAL (WEI)", "root": "ROOT"}
    print_rows(rows, columns, "no epochs yet; paid requests enter one with: openlora-node epochs close")


@app.command()
def close(config: ConfigOption = None, data_dir: DataDirOption = None) -> None:
    """Collect the payers' vouchers, build the cumulative tree and submit its root.

    Example: openlora-node epochs close
    """
    summary = operate(settings_from(config, data_dir), "epochs.close")
    if summary is None:
        typer.echo("nothing to close: no paid request since the last epoch")
        return
    print_json(summary)
