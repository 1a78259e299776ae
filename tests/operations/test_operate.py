"""How a command finds the books: in the running node, or by itself when no node runs."""

import asyncio
import socket

import pytest

from node.api.admin import AdminListener
from node.cli import operate as operate_module
from node.cli.exits import exit_code
from node.cli.operate import operate
from node.config import admin_socket, load_settings
from node.errors import ChainError, EngineError, LedgerError
from node.settlement.keys import KeyDirectory
from node.telemetry.logs import make_logger


@pytest.fixture
def settings(tmp_path):
    return load_settings(None, {"data_dir": tmp_path / "data", "chain.profile": "none"})


@pytest.fixture
def with_keys(settings):
    KeyDirectory(settings.data_dir / "keys", scrypt_n=2).open()


async def asked(settings, operation, **arguments):
    """`operate` has a loop of its own, so it runs on a thread."""
    return await asyncio.to_thread(operate, settings, operation, **arguments)


@pytest.fixture
async def serve(settings):
    """Serve operations where a running node would."""
    opened = []

    async def start(**operations):
        path = admin_socket(settings)
        path.parent.mkdir(mode=0o700, parents=True)
        listener = AdminListener(
            {name.replace("_", ".", 1): work for name, work in operations.items()}, make_logger("error", "json")
        )
        await listener.open(path)
        opened.append(listener)

    yield start
    for listener in opened:
        await listener.close()


@pytest.mark.parametrize("operation", ["rewards.show", "adapters.list"])
def test_command_where_no_node_ever_ran_creates_nothing(settings, operation):
    with pytest.raises(EngineError) as caught:
        operate(settings, operation, account=None)
    assert (caught.value.error_code, exit_code(caught.value)) == ("node_not_running", 69)
    assert not settings.data_dir.exists()


def test_command_without_a_node_opens_the_books_itself_and_lets_go(settings, with_keys):
    for _ in range(2):
        with pytest.raises(ChainError) as caught:
            operate(settings, "epochs.list")
        assert (caught.value.error_code, exit_code(caught.value)) == ("chain_none", 78)


def test_socket_that_a_killed_node_left_is_passed_over(settings, with_keys):
    path = admin_socket(settings)
    path.parent.mkdir(mode=0o700)
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    with pytest.raises(ChainError, match="none"):
        operate(settings, "epochs.list")


async def test_running_node_answers_and_its_errors_keep_their_exit_code(settings, serve):
    async def show(account):
        return [account]

    async def close():
        raise LedgerError("busy", code="ledger_locked", retry_after_s=1.0)

    await serve(rewards_show=show, epochs_close=close)

    assert await asked(settings, "rewards.show", account="0x1") == ["0x1"]
    with pytest.raises(LedgerError) as caught:
        await asked(settings, "epochs.close")
    assert (exit_code(caught.value), caught.value.retry_after_s) == (75, 1.0)


async def test_node_that_does_not_finish_in_time_is_an_error_not_a_traceback(settings, serve, monkeypatch):
    monkeypatch.setattr(operate_module, "_TIMEOUT_S", 0.05)

    async def close():
        await asyncio.Event().wait()

    await serve(epochs_close=close)
    with pytest.raises(EngineError, match="did not finish"):
        await asked(settings, "epochs.close")


async def test_node_that_dies_meanwhile_is_an_error_and_the_command_is_not_repeated(settings):
    path, count = admin_socket(settings), []
    path.parent.mkdir(mode=0o700, parents=True)

    async def hang_up(reader, writer):
        count.append(1)
        await reader.readline()
        writer.close()

    server = await asyncio.start_unix_server(hang_up, str(path))
    with pytest.raises(EngineError, match="broke off"):
        await asked(settings, "epochs.close")
    server.close()
    assert count == [1]
