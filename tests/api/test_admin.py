import io
import socket
import stat

import aiohttp
import pytest

from node.api.admin import AdminListener
from node.config import TenantSettings
from node.errors import ChainError, NodeError, error_from_json
from node.telemetry.logs import make_logger
from node.tenancy.api_key import Scope
from node.tenancy.door import Door
from node.tenancy.offline import offline_transact
from node.tenancy.store import TenantStore
from node.tenancy.tenant import TenantTerms


class Bench:
    def __init__(self, path, log):
        self.path, self.log = path, log

    async def post(self, operation, **options):
        connector = aiohttp.UnixConnector(path=str(self.path))
        async with (
            aiohttp.ClientSession(connector=connector) as session,
            session.post(f"http://node/{operation}", **options) as got,
        ):
            return got.status, await got.json()


@pytest.fixture
async def admin(tmp_path):
    async def echo(name, count=1):
        return {"name": name, "count": count}

    async def refuse():
        raise ChainError("the epoch waits", code="epoch_pending", retry_after_s=5.0)

    async def break_down():
        raise RuntimeError("a secret")

    path, log = tmp_path / "admin.sock", io.StringIO()
    listener = AdminListener({"echo": echo, "refuse": refuse, "break": break_down}, make_logger("debug", "json", log))
    await listener.open(path)
    yield Bench(path, log)
    await listener.close()
    assert not path.exists()


async def test_operation_gets_its_arguments_and_answers_json(admin):
    assert await admin.post("echo", json={"name": "x", "count": 2}) == (200, {"name": "x", "count": 2})


async def test_socket_is_for_its_owner_alone(admin):
    assert stat.S_IMODE(admin.path.stat().st_mode) == 0o600


async def test_node_error_crosses_with_class_code_and_retry(admin):
    status, body = await admin.post("refuse", json={})

    error = error_from_json(body)
    assert status == 400
    assert (type(error), error.error_code, error.message, error.retry_after_s) == (
        ChainError,
        "epoch_pending",
        "the epoch waits",
        5.0,
    )


async def test_defect_is_logged_and_shows_nothing(admin):
    status, body = await admin.post("break", json={})

    assert (status, body["code"]) == (500, "internal_error")
    assert "a secret" not in str(body)
    assert "a secret" in admin.log.getvalue()


@pytest.mark.parametrize(
    ("operation", "options"),
    [
        ("nothing", {"json": {}}),
        ("echo", {"data": b"not json"}),
        ("echo", {"json": []}),
        ("echo", {"json": {}}),
        ("echo", {"json": {"name": "x", "other": 1}}),
        ("echo", {}),
    ],
    ids=["unknown", "no json", "list", "missing", "surplus", "empty"],
)
async def test_malformed_command_is_a_request_error_and_no_defect(admin, operation, options):
    status, body = await admin.post(operation, **options)

    assert (status, body["kind"]) == (400, "RequestError")
    assert admin.log.getvalue() == ""


async def test_socket_left_by_a_crash_is_replaced(tmp_path):
    path = tmp_path / "admin.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    listener = AdminListener({}, make_logger("debug", "json", io.StringIO()))
    await listener.open(path)
    assert (await Bench(path, None).post("x", json={}))[0] == 400
    await listener.close()


def test_error_of_an_unknown_class_is_still_an_error():
    error = error_from_json({"kind": "FutureError", "message": "m", "code": "c", "param": None, "retry_after_s": None})
    assert (type(error), error.error_code) == (NodeError, "c")


@pytest.fixture
async def port(tmp_path):
    """The operations on a loopback port: its URL, and a store to make keys in."""

    async def echo(name):
        return name

    listener = AdminListener({"echo": echo}, make_logger("debug", "json", io.StringIO()))
    await listener.open(tmp_path / "admin.sock")
    async with offline_transact(f"sqlite:///{tmp_path / 'ledger.sqlite'}") as transact:
        store = TenantStore(transact, lambda: 0)
        await store.load()
        number = await listener.open_port(0, Door(store, TenantSettings(), lambda: 0.0, lambda: 0))
        yield f"http://127.0.0.1:{number}", store
    await listener.close()


async def ask(url, headers):
    async with aiohttp.ClientSession() as session, session.post(f"{url}/echo", json={"name": "x"}, headers=headers) as answer:
        return answer.status, await answer.json()


async def test_port_is_closed_also_on_a_node_without_keys(port):
    status, body = await ask(port[0], {})
    assert (status, body["kind"]) == (401, "AuthError")


async def test_port_opens_for_admin_keys_alone(port):
    url, store = port
    _, admin = await store.create_key(TenantTerms("boss"), [Scope.ADMIN])
    _, other = await store.create_key(TenantTerms("acme"), [scope for scope in Scope if scope is not Scope.ADMIN])
    assert await ask(url, {"Authorization": f"Bearer {admin}"}) == (200, "x")
    status, body = await ask(url, {"Authorization": f"Bearer {other}"})
    assert (status, body["code"]) == (403, "insufficient_scope")
    assert (await ask(url, {"Authorization": "Bearer wrong"}))[0] == 401


async def test_port_answers_to_no_other_name(port):
    url, store = port
    _, admin = await store.create_key(TenantTerms("boss"), [Scope.ADMIN])
    status, _ = await ask(url, {"Authorization": f"Bearer {admin}", "Host": "evil.example"})
    assert status == 400
