"""`openlora-node receipts`: fetch a receipt, or check one with no node, no network and no chain."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from attribution.errors import AttributionError, Unauthenticated
from node.cli.operate import operate
from node.cli.options import ConfigOption, DataDirOption, settings_from
from node.cli.table import print_json
from node.errors import NodeError

if TYPE_CHECKING:  # their cryptography takes as long to import as the whole command line
    from attribution.manifest import Manifest
    from attribution.receipt import VerifiedReceipt

_MAX_FILE_BYTES = 16 << 20

app = typer.Typer(help="Show and verify receipts.", no_args_is_help=True)


@app.command()
def show(request_id: str, config: ConfigOption = None, data_dir: DataDirOption = None) -> None:
    """Print the receipt of a request, ready to be saved and verified.

    Example: openlora-node receipts show REQUEST_ID > receipt.json
    """
    print_json(operate(settings_from(config, data_dir), "receipts.show", request_id=request_id))


@app.command()
def verify(
    file: Annotated[Path, typer.Argument(help="A receipt, or a whole answer that carries one; - for standard input.")],
    operator: Annotated[list[str] | None, typer.Option(help="An operator address you trust; may be repeated.")] = None,
    trust: Annotated[Path | None, typer.Option(help="A file of trusted addresses, one a line, # for comments.")] = None,
    manifest: Annotated[list[Path] | None, typer.Option(help="Compare the shares with this adapter manifest, too.")] = None,
) -> None:
    """Recompute a receipt's record hash, shares, fee and split, and check who signed it. Works offline.

    Exit 0: sound and signed by someone you trust. 65: changed or signed by someone else. 77: nobody was named to trust.

    Example: openlora-node receipts verify receipt.json --operator 0x0000000000000000000000000000000000000001
    """
    from attribution import receipt

    bundle = _read_json(file)
    trusted = [*(operator or ()), *(_trusted(trust) if trust else ())]
    manifests = [_manifest(path) for path in manifest or ()]
    try:
        verified = receipt.verify(_bundle(bundle), trusted, manifests)
    except Unauthenticated as error:
        raise NodeError(str(error), code="receipt_unauthenticated") from error
    except AttributionError as error:
        raise NodeError(str(error), code="receipt_invalid") from error
    _print(verified)


def _bundle(value: Any) -> Any:
    """The receipt itself, or the one inside an answer of the API."""
    carried = value.get("openlora") if isinstance(value, dict) else None
    return carried.get("receipt") if isinstance(carried, dict) else value


def _print(verified: VerifiedReceipt) -> None:
    record = verified.record
    print(f"ok: signed by {verified.signer} for chain {verified.chain_id}")
    print(f"request   {record.request_id}, {record.status} ({record.finish_reason})")
    print(f"tokens    {record.tokens.prompt} in, {record.tokens.output} out")
    print(f"fee       {record.fee_wei} wei")
    for line in record.split:
        print(f"  {line.role:<8} {line.account} {line.amount_wei} wei")


def _read_json(path: Path) -> Any:
    data = _read(path)
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise NodeError(f"{path} is not a JSON receipt; save the node's answer unchanged", code="receipt_invalid") from error


def _read(path: Path) -> bytes:
    try:
        if str(path) == "-":
            return typer.get_binary_stream("stdin").read(_MAX_FILE_BYTES)
        with path.open("rb") as file:
            data = file.read(_MAX_FILE_BYTES + 1)
    except OSError as error:
        raise NodeError(f"{path} cannot be read; check the path and its permissions", code="file_not_found") from error
    if len(data) > _MAX_FILE_BYTES:
        raise NodeError(f"{path} is larger than {_MAX_FILE_BYTES} bytes; that is no receipt", code="receipt_invalid")
    return data


def _trusted(path: Path) -> list[str]:
    lines = (line.partition("#")[0].strip() for line in _read(path).decode(errors="replace").splitlines())
    return [line for line in lines if line]


def _manifest(path: Path) -> Manifest:
    from attribution.manifest import Manifest

    try:
        return Manifest.parse(_read(path))
    except AttributionError as error:
        raise NodeError(f"{path}: {error}", code="receipt_invalid") from error
