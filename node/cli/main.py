"""`openlora-node`: the command. Each sub-command is a module; imports happen inside it, so that `--help` is instant."""

from __future__ import annotations

import sys

import typer
from typer.core import TyperGroup

from node import __version__
from node.cli import adapters, demo, doctor, epochs, keys, receipts, rewards, start
from node.cli.exits import exit_code
from node.errors import NodeError


class _InOrder(TyperGroup):
    """List commands in the order a newcomer meets them."""

    def list_commands(self, ctx: object) -> list[str]:
        return list(self.commands)


app = typer.Typer(
    name="openlora-node",
    cls=_InOrder,
    help="Serve many LoRA adapters over one base model, and pay the people behind every answer.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    epilog="Start here: openlora-node demo",
)
app.command(name="start")(start.start)
app.command(name="demo")(demo.demo)
app.command(name="doctor")(doctor.doctor)
app.add_typer(adapters.app, name="adapters")
app.add_typer(keys.app, name="keys")
app.add_typer(receipts.app, name="receipts")
app.add_typer(epochs.app, name="epochs")
app.add_typer(rewards.app, name="rewards")


def _print_version(is_wanted: bool) -> None:
    if is_wanted:
        typer.echo(f"openlora-node {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: bool = typer.Option(False, "--version", callback=_print_version, is_eager=True, help="Print the version."),
) -> None:
    pass


def main() -> None:
    """Run the command; a `NodeError` becomes one line on stderr and its exit code."""
    try:
        app()
    except NodeError as error:
        typer.secho(f"error [{error.error_code}]: {error.message}", err=True, fg=typer.colors.RED)
        sys.exit(exit_code(error))


if __name__ == "__main__":
    main()
