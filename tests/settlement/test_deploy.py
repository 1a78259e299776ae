import json

import pytest

from node.config import ChainSettings
from node.errors import ChainError, ConfigError
from node.settlement.chain_profiles import PROFILES, resolve
from node.settlement.deploy import DeploymentTerms, contract_address, describe, ensure_deployed
from node.settlement.settlement_contracts import ContractAddresses
from node.settlement.signer import LocalSigner
from node.settlement.wallet import Wallet

FUNDER = LocalSigner(b"\x03" * 32)
TERMS = DeploymentTerms(FUNDER.address, 5, 3600)


def forbidden():
    raise AssertionError("nothing may be deployed again")


def test_deploy_twice_deploys_once(chain_world, tmp_path):
    path = tmp_path / "chain" / "deployment.json"
    first = ensure_deployed(path, chain_world.chain, lambda: Wallet(chain_world.chain, FUNDER, poll_s=0.01), TERMS)
    assert ensure_deployed(path, chain_world.chain, forbidden, TERMS) == first
    assert len(set(first.code_hashes.values())) == 4


def test_deploy_with_an_existing_token_makes_three_contracts(chain_world, tmp_path):
    token = chain_world.deployment.addresses.token
    nonce = chain_world.chain.nonce(FUNDER.address)
    terms = DeploymentTerms(FUNDER.address, 5, 3600, token)
    wallet = Wallet(chain_world.chain, FUNDER, poll_s=0.01)
    deployment = ensure_deployed(tmp_path / "deployment.json", chain_world.chain, lambda: wallet, terms)
    assert deployment.addresses.token == token
    assert chain_world.chain.nonce(FUNDER.address) == nonce + 3


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"chain_id": 5}, "chain_mismatch"),
        ({"genesis_hash": "0x00"}, "chain_mismatch"),
        ({"code_hashes": {}}, "contract_missing"),
        ({"version": 2}, "contract_missing"),
        ({"addresses": {}}, "contract_missing"),
        ({"unknown": 1}, "contract_missing"),
    ],
)
def test_deployment_file_that_does_not_fit_the_chain_is_refused(chain_world, tmp_path, changes, code):
    path = tmp_path / "deployment.json"
    path.write_bytes(chain_world.deployment.to_json())
    path.write_text(json.dumps({**json.loads(path.read_bytes()), **changes}))
    with pytest.raises(ChainError) as caught:
        ensure_deployed(path, chain_world.chain, forbidden, TERMS)
    assert caught.value.error_code == code


def test_describe_address_without_code_names_the_setting(chain_world):
    nowhere = "0x" + "77" * 20
    addresses = chain_world.deployment.addresses
    with pytest.raises(ChainError, match=r"chain\.escrow_address"):
        describe(chain_world.chain, ContractAddresses(addresses.token, addresses.rewards, nowhere, addresses.registry))


def test_contract_address_follows_from_sender_and_nonce():
    # The first two contracts of this account, as in the address vectors that go-ethereum tests `CreateAddress` with.
    sender = "0x970e8128ab834e8eac17ab8e3812f010678cf791"
    assert contract_address(sender, 0).lower() == "0x333c3310824b7c685133f2bedb2ca4b8b4df633d"
    assert contract_address(sender, 1).lower() == "0x8bda78331c916a08481428e4b07c96d3e916d165"


def test_profiles_keep_their_chain_ids():
    assert {name: profile.chain_id for name, profile in PROFILES.items()} == {
        "embedded": 31_611,
        "anvil": 31_337,
        "openledger-testnet": 161_201,
        "openledger": 1_612,
    }


@pytest.mark.parametrize(
    "settings",
    [
        {"profile": "custom"},
        {"profile": "custom", "rpc_url": "https://rpc.example"},
        {"profile": "custom", "rpc_url": "ftp://rpc.example", "chain_id": 5},
        {"profile": "openledger", "chain_id": 5},
        {"profile": "embedded", "rpc_url": "http://127.0.0.1:1"},
    ],
)
def test_profile_settings_that_contradict_are_refused(settings):
    with pytest.raises(ConfigError):
        resolve(ChainSettings(**settings))


def test_profile_none_and_overrides():
    assert resolve(ChainSettings(profile="none")) is None
    own = resolve(ChainSettings(profile="openledger", rpc_url="https://rpc.example"))
    assert (own.chain_id, own.rpc_url, own.is_development) == (1_612, "https://rpc.example", False)
