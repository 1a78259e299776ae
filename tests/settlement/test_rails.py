"""The embedded chain as a node opens it, and what happens to it while the node runs."""

import asyncio
import io
import json
import os
import signal
from pathlib import Path

import pytest

from node.config import load_settings
from node.errors import ChainError, ConfigError
from node.settlement.embedded_chain_process import EmbeddedChainReady
from node.settlement.embedded_chain_watch import EmbeddedChainWatch
from node.settlement.keys import KeyDirectory
from node.settlement.rails import FUNDER, open_rails
from node.telemetry.logs import make_logger

SUBMITTER = "0x" + "44" * 20


def settings_of(tmp_path, **chain):
    given = {f"chain.{name}": value for name, value in chain.items()}
    return load_settings(None, {"data_dir": tmp_path, **given})


def cheap_keys(tmp_path):
    return KeyDirectory(tmp_path / "keys", scrypt_n=2)


@pytest.fixture
def log():
    return io.StringIO()


def events(log):
    return [json.loads(line)["event"] for line in log.getvalue().splitlines()]


def chain_process_of(data_dir):
    """The process whose arguments name this test's chain directory."""
    wanted = os.fsencode(data_dir / "chain")
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if wanted in entry.read_bytes().split(b"\0"):
                return int(entry.parent.name)
        except OSError:
            continue
    raise AssertionError("the chain does not run")


async def test_embedded_rails_deploy_once_and_outlive_the_chains_death(tmp_path, log):
    settings, keys = settings_of(tmp_path, challenge_delay_s=3), cheap_keys(tmp_path)
    logger = make_logger("debug", "json", log)
    async with open_rails(settings, keys, SUBMITTER, logger) as rails:
        assert rails.faucet is not None
        assert await asyncio.to_thread(rails.contracts.challenge_delay_s) == 3
        before = await asyncio.to_thread(rails.chain.head)
        os.kill(chain_process_of(tmp_path), signal.SIGKILL)

        async with asyncio.timeout(60):
            while "embedded_chain_restarted" not in events(log):
                await asyncio.sleep(0.05)
        assert await asyncio.to_thread(rails.chain.head) == before
        assert await asyncio.to_thread(rails.contracts.challenge_delay_s) == 3

    async with open_rails(settings, keys, SUBMITTER, logger) as again:
        assert again.contracts.addresses == rails.contracts.addresses
        assert await asyncio.to_thread(again.chain.head) == before


async def test_profile_none_has_no_rails(tmp_path, log):
    settings, logger = settings_of(tmp_path, profile="none"), make_logger("debug", "json", log)
    async with open_rails(settings, cheap_keys(tmp_path), SUBMITTER, logger) as rails:
        assert rails is None
    assert not (tmp_path / "chain").exists()


async def test_contracts_named_in_part_are_refused_and_the_chain_is_ended(tmp_path, log):
    settings = settings_of(tmp_path, token_address="0x" + "11" * 20)
    with pytest.raises(ConfigError, match=r"chain\.rewards_address, chain\.escrow_address"):
        async with open_rails(settings, cheap_keys(tmp_path), SUBMITTER, make_logger("debug", "json", log)):
            pytest.fail("opened")
    with pytest.raises(AssertionError, match="does not run"):
        chain_process_of(tmp_path)


async def test_contracts_are_named_or_known_where_money_is_real(chain_world, tmp_path, log):
    world, logger = chain_world, make_logger("debug", "json", log)
    real = {"profile": "custom", "rpc_url": world.ready.rpc_url, "chain_id": world.ready.chain_id}
    with pytest.raises(ConfigError, match=r"chain\.token_address"):
        async with open_rails(settings_of(tmp_path / "a", **real), cheap_keys(tmp_path / "a"), SUBMITTER, logger):
            pytest.fail("opened")

    addresses = world.deployment.addresses
    named = {f"{name}_address": getattr(addresses, name).lower() for name in ("token", "rewards", "escrow", "registry")}
    settings = settings_of(tmp_path / "b", **real, **named)
    async with open_rails(settings, cheap_keys(tmp_path / "b"), SUBMITTER, logger) as rails:
        assert rails.contracts.addresses == addresses
        assert rails.faucet is None
    assert not cheap_keys(tmp_path / "b").has(FUNDER)


class FakeProcess:
    """A chain process that dies when told, and whose next starts may fail."""

    def __init__(self):
        self.process_id, self.starts, self.failing, self.is_closed = 7, 0, 0, False

    def close(self):
        self.process_id, self.is_closed = None, True

    def start(self):
        self.starts += 1
        if self.failing:
            self.failing -= 1
            raise ChainError("locked", code="chain_locked")
        self.process_id, self.is_closed = 8, False
        return EmbeddedChainReady("http://127.0.0.1:1", 1, "0x")


async def test_watch_tries_again_until_the_chain_starts(log):
    process = FakeProcess()
    watch = EmbeddedChainWatch(process, make_logger("debug", "json", log), poll_s=0.001)
    watch.open()
    process.failing, process.process_id = 2, None
    async with asyncio.timeout(10):
        while "embedded_chain_restarted" not in events(log):
            await asyncio.sleep(0.001)
    await watch.close()

    assert process.starts == 3
    assert events(log).count("embedded_chain_not_restarted") == 2
    assert process.is_closed


async def test_watch_that_was_never_opened_still_ends_the_process(log):
    process = FakeProcess()
    await EmbeddedChainWatch(process, make_logger("debug", "json", log)).close()
    assert process.is_closed
