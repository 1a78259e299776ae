"""Settings: every key documented, every mistake named."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from eth_utils.address import to_checksum_address
from pydantic import BaseModel

from node.config import Settings, load_settings
from node.errors import ConfigError

NODE_TOML = Path(__file__).parents[2] / "config" / "node.toml"


def _defaults(model: BaseModel, prefix: str = "") -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name in type(model).model_fields:
        value = getattr(model, name)
        if isinstance(value, BaseModel):
            values.update(_defaults(value, f"{prefix}{name}."))
        else:
            values[prefix + name] = value
    return values


def test_node_toml_documents_every_key_with_its_default() -> None:
    text = NODE_TOML.read_text()
    documented = load_settings(NODE_TOML)
    defaults = _defaults(Settings())
    active = {f"{section}.{key}" for section, keys in tomllib.loads(text).items() for key in keys}
    section, commented = "", set()
    for line in text.splitlines():
        if header := re.match(r"\[(\w+)\]", line):
            section = header[1] + "."
        if key := re.match(r"# (\w+) = ", line):
            commented.add(section + key[1])
    assert active | commented == set(defaults)
    assert active & commented == set()
    for key in active:
        assert _defaults(documented)[key] == defaults[key], key
    for key in commented - {"data_dir"}:
        assert defaults[key] is None, f"{key} has a default and must not be commented out"


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ("[server]\nprot = 1\n", "server.port"),
        ("[sever]\nport = 1\n", "server"),
        ("[server]\nport = 70000\n", "65535"),
        ('[server]\nport = "eighty"\n', "server.port"),
        ('[engine]\nkv_cache_bytes = "10GBB"\n', "engine.kv_cache_bytes"),
        ("[engine]\nkv_cache_bytes = -1\n", "engine.kv_cache_bytes"),
        ("[split]\nnode_ppm = 1\n", "1,000,000"),
        ('[chain]\nprofile = "mainnet"\n', "openledger-testnet"),
        ('[chain]\nescrow_address = "0x12"\n', "chain.escrow_address"),
        ("[server\n", "not valid TOML"),
    ],
)
def test_load_settings_with_a_mistake_names_it(tmp_path: Path, body: str, named: str) -> None:
    file = tmp_path / "node.toml"
    file.write_text(body)
    with pytest.raises(ConfigError, match=re.escape(named)):
        load_settings(file)


def test_load_settings_with_unknown_environment_variable_names_the_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENLORA_SERVER__PROT", "1")
    with pytest.raises(ConfigError, match="OPENLORA_SERVER__PORT"):
        load_settings()


def test_load_settings_prefers_command_line_then_environment_then_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "node.toml"
    file.write_text("[server]\nport = 1000\nmax_choices = 3\n[engine]\nthreads = 1\n")
    monkeypatch.setenv("OPENLORA_SERVER__PORT", "2000")
    assert load_settings(file).server.port == 2000
    assert load_settings(file).server.max_choices == 3
    assert load_settings(file, {"server.port": 3000}).server.port == 3000


def test_load_settings_with_override_out_of_range_names_it() -> None:
    with pytest.raises(ConfigError, match="65535"):
        load_settings(None, {"server.port": 70000})


def test_load_settings_without_the_file_says_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        load_settings(tmp_path / "absent.toml")


def test_sizes_are_read_with_units(tmp_path: Path) -> None:
    file = tmp_path / "node.toml"
    file.write_text('[engine]\nkv_cache_bytes = "64MiB"\n')
    assert load_settings(file).engine.kv_cache_bytes == 64 * 1024 * 1024


@pytest.mark.parametrize(
    ("section", "key", "url"),
    [("ledger", "url", "postgresql://node:hunter2@db/ledger"), ("chain", "rpc_url", "https://user:hunter2@rpc.example.org/v1")],
)
def test_password_in_a_file_that_others_can_read_is_refused_without_repeating_it(
    tmp_path: Path, section: str, key: str, url: str
) -> None:
    path = tmp_path / "node.toml"
    path.write_text(f'[{section}]\n{key} = "{url}"\n')
    path.chmod(0o640)
    with pytest.raises(ConfigError, match=rf"{section}\.{key}.*0640") as caught:
        load_settings(path)
    assert caught.value.error_code == "secret_permissions"
    assert "hunter2" not in str(caught.value)

    path.chmod(0o600)
    assert getattr(getattr(load_settings(path), section), key) == url


@pytest.mark.parametrize("given", ["0x" + "ab" * 20, "0x" + "AB" * 20])
def test_address_has_one_spelling(given: str) -> None:
    spelled = load_settings(None, {"chain.reserve_address": given}).chain.reserve_address
    assert spelled == to_checksum_address(given)


def test_address_with_a_wrong_checksum_is_refused() -> None:
    spelled = to_checksum_address("0x" + "ab" * 20)
    with pytest.raises(ConfigError, match=r"chain\.reserve_address.*checksum"):
        load_settings(None, {"chain.reserve_address": spelled.swapcase().replace("0X", "0x")})
