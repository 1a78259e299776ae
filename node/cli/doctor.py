"""`openlora-node doctor`: is this machine ready, and if not, the one line that mends it."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import socket
import stat
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import typer

from node.cli.finding import Finding
from node.cli.options import ConfigOption, DataDirOption, JsonOption, settings_from
from node.cli.table import print_json
from node.config import Settings
from node.errors import NodeError

_DISK_BYTES_WANTED = 2 << 30
_MARKS = {"ok": "[green]ok[/]  ", "warn": "[yellow]warn[/]", "fail": "[red]fail[/]"}


def doctor(config: ConfigOption = None, data_dir: DataDirOption = None, as_json: JsonOption = False) -> None:
    """Check this machine: exit 0 when all is well, 1 with warnings, 2 when the node cannot start.

    Example: openlora-node doctor --json
    """
    findings = list(examine(settings_from(config, data_dir)))
    if as_json:
        print_json([{"subject": f.subject, "state": f.state, "detail": f.detail, "remedy": f.remedy} for f in findings])
    else:
        _print(findings)
    states = {finding.state for finding in findings}
    raise typer.Exit(2 if "fail" in states else 1 if "warn" in states else 0)


def examine(settings: Settings) -> Iterator[Finding]:
    """Run every check in the order in which starting would meet them."""
    before: tuple[Callable[[Settings], Finding], ...] = (_python, _torch, _kernels)
    after: tuple[Callable[[Settings], Finding], ...] = (_model, _disk, _port, _keys, _http, _chain)
    for check in before:
        yield check(settings)
    yield from _gpu(settings)
    for check in after:
        yield check(settings)


def _python(_: Settings) -> Finding:
    version = ".".join(map(str, sys.version_info[:3]))
    if (3, 11) <= sys.version_info[:2] <= (3, 12):
        return Finding("python", "ok", version)
    return Finding("python", "fail", version, "use Python 3.11 or 3.12")


def _torch(_: Settings) -> Finding:
    version = importlib.metadata.version("torch")
    major, minor = (int(part) for part in version.split(".")[:2])
    if (2, 11) <= (major, minor) < (2, 14):
        return Finding("torch", "ok", version)
    return Finding("torch", "fail", version, "install torch >= 2.11 and < 2.14")


def _kernels(settings: Settings) -> Finding:
    from node.kernels.ops import Kernels

    try:
        kernels = Kernels.load(settings.engine.kernels)
    except NodeError as error:
        return Finding("kernels", "fail", error.message, "python -m node.kernels.build")
    if kernels.name == "reference" and settings.engine.kernels != "reference":
        return Finding("kernels", "warn", "torch reference, slow", "install g++, then: python -m node.kernels.build")
    return Finding("kernels", "ok", kernels.name)


def _gpu(settings: Settings) -> Iterator[Finding]:
    from node.cli.doctor_gpu import gpu_facts, gpu_findings  # imports torch

    return gpu_findings(settings, gpu_facts())


def _model(settings: Settings) -> Finding:
    from node.models.source import resolve

    try:
        files = resolve(settings.model.path, settings.model.revision)
    except NodeError as error:
        return Finding("model", "fail", error.message, "set model.path")
    return Finding("model", "ok", f"{settings.model.path} in {files.directory}")


def _disk(settings: Settings) -> Finding:
    parent = next(path for path in (settings.data_dir, *settings.data_dir.absolute().parents) if path.exists())
    if not os.access(parent, os.W_OK):
        return Finding("data directory", "fail", f"{parent} cannot be written", "choose another with --data-dir")
    free = shutil.disk_usage(parent).free
    detail = f"{settings.data_dir}, {free >> 20:,} MiB free"
    if free < _DISK_BYTES_WANTED:
        return Finding("data directory", "warn", detail, f"free {_DISK_BYTES_WANTED >> 20:,} MiB")
    return Finding("data directory", "ok", detail)


def _port(settings: Settings) -> Finding:
    where = f"{settings.server.host}:{settings.server.port}"
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((settings.server.host, settings.server.port))
        except OSError:
            return Finding("port", "warn", f"{where} is in use or not ours", "start with --port 0 or another port")
    return Finding("port", "ok", where)


def _keys(settings: Settings) -> Finding:
    directory = settings.data_dir / "keys"
    if not directory.exists():
        return Finding("keys", "ok", f"none yet; the first start creates them in {directory}")
    open_files = [path for path in directory.iterdir() if _is_open_to_others(path)]
    if open_files:
        return Finding("keys", "fail", f"{open_files[0]} can be read by others", f"chmod 600 {open_files[0]}")
    return Finding("keys", "ok", str(directory))


def _is_open_to_others(path: Path) -> bool:
    return bool(stat.S_IMODE(path.stat().st_mode) & 0o077)


def _http(_: Settings) -> Finding:
    from aiohttp import http_parser

    if http_parser.HttpRequestParser is http_parser.HttpRequestParserPy:
        return Finding("http parser", "warn", "aiohttp runs its Python parser", "install an aiohttp wheel with extensions")
    return Finding("http parser", "ok", f"aiohttp {importlib.metadata.version('aiohttp')}, C parser")


def _chain(settings: Settings) -> Finding:
    profile = settings.chain.profile
    if profile == "none":
        return Finding("chain", "warn", "no chain: usage is recorded and nobody can be paid", "set chain.profile")
    if profile == "embedded":
        return Finding("chain", "ok", "embedded development chain, started with the node")
    from node.settlement.chain_probe import probe

    try:
        return Finding("chain", "ok", probe(settings.chain))
    except NodeError as error:
        return Finding("chain", "fail", error.message, "check chain.rpc_url and the network")


def _print(findings: list[Finding]) -> None:
    from rich.console import Console

    console = Console(highlight=False)
    for finding in findings:
        # Soft: a path that is broken over two lines cannot be copied.
        console.print(f"{_MARKS[finding.state]}  {finding.subject:<15} {finding.detail}", soft_wrap=True)
        if finding.remedy:
            console.print(f"      {'':<15} -> {finding.remedy}", soft_wrap=True)
