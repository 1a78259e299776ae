"""Adapters from object stores and web servers: a real S3 server (moto), a real web server, real sockets."""

from __future__ import annotations

import asyncio
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import boto3
import pytest
from moto.server import ThreadedMotoServer

from node.adapters import staging
from node.config import StoreSettings
from node.errors import (
    AdapterForbiddenError,
    AdapterIdError,
    AdapterInvalidError,
    AdapterNotFoundError,
    AdapterUnavailableError,
    ConfigError,
)
from tests.adapters.replies import reply

WEIGHTS = "adapter_model.safetensors"


class WebServer:
    """Files by path. `behave(handler, path, body)` may answer in another way; `requests` records (path, range)."""

    def __init__(self):
        self.files = {}
        self.requests = []
        self.behave = None
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                server.answer(self)

            def log_message(self, *_):
                """Nothing on the terminal."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.host = f"localhost:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()

    def publish(self, path, directory):
        for file in directory.iterdir():
            self.files[f"/{path}/{file.name}"] = file.read_bytes()

    def answer(self, handler):
        wanted = handler.headers.get("Range")
        self.requests.append((handler.path, wanted))
        body = self.files.get(handler.path)
        if body is None:
            return reply(handler, 404, b"")
        if self.behave is not None and self.behave(handler, handler.path, body):
            return None
        tag = {"ETag": f'"{hashlib.sha256(body).hexdigest()}"'}
        if wanted is None:
            return reply(handler, 200, body, tag)
        first, _, last = wanted.removeprefix("bytes=").partition("-")
        part = body[int(first) : int(last) + 1 if last else len(body)]
        return reply(handler, 206, part, tag | {"Content-Range": f"bytes {first}-{int(first) + len(part) - 1}/{len(body)}"})


@pytest.fixture
def web():
    served = WebServer()
    yield served
    served.server.shutdown()
    served.server.server_close()


@pytest.fixture
def far(writer, tmp_path):
    return type(writer)(tmp_path / "far").write("adapter")


@pytest.fixture
async def web_catalog(web, make_catalog):
    made = make_catalog(stores=(StoreSettings(url=f"http://{web.host}/team", allow_private=True),))
    yield made
    await made.close()


@pytest.fixture
def location(web):
    return f"http://{web.host}/team/adapter"


async def test_resolve_web_adapter_is_fetched_once_and_listed(web, web_catalog, far, location):
    web.publish("team/adapter", far)

    first = await web_catalog.resolve(location)
    second = await web_catalog.resolve(location, "http")

    assert (first.source, first.adapter_id, len(first.revision)) == ("http", second.adapter_id, 40)
    assert [path for path, wanted in web.requests if wanted is None] == [
        "/team/adapter/adapter_config.json",
        f"/team/adapter/{WEIGHTS}",
    ]
    assert [entry.name for entry in web_catalog.entries()] == [location]


async def test_resolve_web_adapter_that_changed_is_fetched_again_after_a_minute(
    web, web_catalog, far, location, writer, clock, tmp_path
):
    web.publish("team/adapter", far)
    before = await web_catalog.resolve(location)
    web.publish("team/adapter", type(writer)(tmp_path / "later").write("adapter", lora_alpha=6))

    clock.now_s += 61
    after = await web_catalog.resolve(location)

    assert before.adapter_id != after.adapter_id
    assert before.revision != after.revision


async def test_resolve_broken_download_goes_on_where_it_stopped(web, web_catalog, far, location, clock):
    web.publish("team/adapter", far)

    def cut(handler, path, body):
        if path.endswith(WEIGHTS) and handler.headers.get("Range") is None:
            reply(handler, 200, body[:100], {"Content-Length": str(len(body)), "ETag": f'"{hashlib.sha256(body).hexdigest()}"'})
            return True
        return False

    web.behave = cut
    with pytest.raises(AdapterUnavailableError):
        await web_catalog.resolve(location)
    web.behave = None
    clock.now_s += 61
    entry = await web_catalog.resolve(location)

    assert (f"/team/adapter/{WEIGHTS}", "bytes=100-") in web.requests
    assert (entry.directory / WEIGHTS).read_bytes() == (far / WEIGHTS).read_bytes()


async def test_resolve_file_that_changes_between_two_parts_starts_over(web, web_catalog, far, location, clock):
    web.publish("team/adapter", far)

    def move(handler, path, body):
        if path.endswith(WEIGHTS) and handler.headers.get("Range") is None:
            reply(handler, 200, body, {"ETag": '"another"'})
            return True
        return False

    web.behave = move
    with pytest.raises(AdapterUnavailableError, match="changed while it was fetched"):
        await web_catalog.resolve(location)
    web.behave = None
    clock.now_s += 61

    assert (await web_catalog.resolve(location)).source == "http"


@pytest.mark.parametrize("kind", ["longer", "compressed", "slow"])
async def test_resolve_source_beyond_its_word_is_cut_off_and_leaves_nothing(
    web, web_catalog, far, location, kind, tmp_path, monkeypatch
):
    web.publish("team/adapter", far)
    monkeypatch.setattr(staging, "GRACE_S", 0.0)
    monkeypatch.setattr(staging, "SLOWEST_BYTES_PER_S", 10**12 if kind == "slow" else 0)

    def lie(handler, path, body):
        if handler.headers.get("Range") is not None or not path.endswith(WEIGHTS):
            return False
        tag = {"ETag": f'"{hashlib.sha256(body).hexdigest()}"'}
        if kind == "compressed":
            reply(handler, 200, body, tag | {"Content-Encoding": "gzip"})
        else:
            sent = body + b"x" * 4096 if kind == "longer" else body
            reply(handler, 200, sent, tag)
        return True

    web.behave = lie
    with pytest.raises(AdapterUnavailableError) as caught:
        await web_catalog.resolve(location)

    assert caught.value.error_code == "source_limit"
    assert not list((tmp_path / "data").rglob(WEIGHTS))


async def test_resolve_redirect_is_never_followed(web, web_catalog, far, location):
    web.publish("team/adapter", far)
    web.behave = lambda handler, path, body: reply(handler, 302, b"", {"Location": "http://169.254.169.254/"}) or True

    with pytest.raises(AdapterForbiddenError) as caught:
        await web_catalog.resolve(location)

    assert caught.value.error_code == "source_forbidden"


@pytest.mark.parametrize(
    "text",
    [
        "http://169.254.169.254/latest/meta-data", "http://[::1]/a", "http://0x7f.1/a", "http://2130706433/a", "http://user@localhost/a",
        "file:///etc/passwd", "ftp://localhost/a", "s3://other/a", "https://localhost/team/adapter",
    ],
)  # fmt: skip
async def test_resolve_location_outside_the_stores_asks_nobody(web, web_catalog, text):
    with pytest.raises(AdapterForbiddenError) as caught:
        await web_catalog.resolve(text)

    assert caught.value.error_code == "source_forbidden"
    assert web.requests == []


@pytest.mark.parametrize("address", ["127.0.0.1", "10.1.2.3", "169.254.169.254", "::1", "fd00::1", "::ffff:127.0.0.1", "0.0.0.0"])
async def test_resolve_host_with_a_private_address_is_not_connected_to(make_catalog, address):
    catalog = make_catalog(stores=(StoreSettings(url="https://host.example"),), resolve=lambda host, port: [address])
    with pytest.raises(AdapterForbiddenError, match="not on the public internet"):
        await catalog.resolve("https://host.example/a")
    await catalog.close()


async def test_resolve_host_is_looked_up_once_for_every_connection(web, make_catalog, far):
    """A second look-up could answer with another address than the one that was checked."""
    web.publish("team/adapter", far)
    asked = []

    def resolve(host, port):
        asked.append(host)
        return ["127.0.0.1"]

    port = web.server.server_port
    catalog = make_catalog(stores=(StoreSettings(url=f"http://host.example:{port}/team", allow_private=True),), resolve=resolve)
    entry = await catalog.resolve(f"http://host.example:{port}/team/adapter")
    await catalog.close()

    assert entry.source == "http"
    assert len(asked) == len(web.requests)


async def test_resolve_known_location_is_asked_about_while_unknown_ones_fill_the_queue(web, make_catalog, far, location, clock):
    for name in ("adapter", "slow", "late"):
        web.publish(f"team/{name}", far)
    catalog = make_catalog(stores=(StoreSettings(url=f"http://{web.host}/team", allow_private=True),), fetch_queue_limit=1)
    await catalog.resolve(location)
    begun, go_on = threading.Event(), threading.Event()

    def hold(handler, path, body):
        if path.startswith("/team/slow/"):
            begun.set()
            go_on.wait(20)
        return False

    web.behave = hold
    slow = asyncio.create_task(catalog.resolve(location.replace("adapter", "slow")))
    await asyncio.to_thread(begun.wait, 20)
    with pytest.raises(AdapterUnavailableError) as caught:
        await catalog.resolve(location.replace("adapter", "late"))
    clock.now_s += 61
    asked = len(web.requests)

    assert (await catalog.resolve(location)).name == location

    assert len(web.requests) > asked
    assert caught.value.error_code == "adapter_queue_full"
    go_on.set()
    assert (await slow).rank == 2
    await catalog.close()


async def test_resolve_progress_of_a_download_is_shown_while_it_runs(web, web_catalog, far, location):
    web.publish("team/adapter", far)
    seen, go_on, loop = [], threading.Event(), asyncio.get_running_loop()

    def hold(handler, path, body):
        if path.endswith(WEIGHTS) and handler.headers.get("Range") is None:
            seen.extend(asyncio.run_coroutine_threadsafe(web_catalog.fetching(), loop).result())
            go_on.set()
        return False

    web.behave = hold
    await web_catalog.resolve(location)

    total = sum((far / name).stat().st_size for name in ("adapter_config.json", WEIGHTS))
    assert go_on.is_set()
    assert [(item.name, item.total_bytes) for item in seen] == [(location, total)]
    assert seen[0].done_bytes == (far / "adapter_config.json").stat().st_size
    assert await web_catalog.fetching() == ()


@pytest.mark.parametrize(
    "store",
    [
        {"url": "http://host.example"}, {"url": "ftp://host.example"}, {"url": "s3://Bucket"}, {"url": "nonsense"},
        {"url": "s3://bucket", "options": {"regoin": "eu-west-1"}},
    ],
)  # fmt: skip
def test_catalog_with_a_store_that_makes_no_sense_refuses_to_start(make_catalog, store):
    with pytest.raises(ConfigError, match=r"adapters\.stores"):
        make_catalog(stores=(StoreSettings(**store),))


# ---- S3


@pytest.fixture(scope="module")
def s3_url():
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(s3_url, request):
    name = f"bucket-{abs(hash(request.node.name)) % 10**9}"
    client = boto3.client("s3", endpoint_url=s3_url, region_name="us-east-1", aws_access_key_id="k", aws_secret_access_key="s")
    client.create_bucket(Bucket=name)
    return client, name


@pytest.fixture
async def s3_catalog(s3_url, bucket, make_catalog):
    options = {"endpoint": s3_url, "region": "us-east-1", "access_key_id": "k", "secret_access_key": "s", "allow_http": "true"}
    made = make_catalog(stores=(StoreSettings(url=f"s3://{bucket[1]}/team", options=options),))
    yield made
    await made.close()


def upload(bucket, prefix, directory, extra=()):
    client, name = bucket
    for file in directory.iterdir():
        client.put_object(Bucket=name, Key=f"{prefix}/{file.name}", Body=file.read_bytes())
    for extra_name in extra:
        client.put_object(Bucket=name, Key=f"{prefix}/{extra_name}", Body=b"x")


@pytest.mark.parametrize("spelling", ["s3://{}/team/a", "{}/team/a"])
async def test_resolve_s3_adapter_in_lorax_spelling_too(s3_catalog, bucket, far, spelling):
    upload(bucket, "team/a", far, extra=["README.md", "checkpoint/optimizer.bin"])

    entry = await s3_catalog.resolve(spelling.format(bucket[1]), "s3")

    assert entry.source == "s3"
    assert entry.name == f"s3://{bucket[1]}/team/a"
    assert sorted(path.name for path in entry.directory.iterdir()) == [".used", "adapter_config.json", WEIGHTS]


async def test_resolve_s3_adapter_that_is_absent_or_holds_pickles_is_refused(s3_catalog, bucket, far):
    upload(bucket, "team/script", far, extra=["handler.py"])
    with pytest.raises(AdapterNotFoundError):
        await s3_catalog.resolve(f"s3://{bucket[1]}/team/absent")
    with pytest.raises(AdapterInvalidError) as caught:
        await s3_catalog.resolve(f"s3://{bucket[1]}/team/script")

    assert caught.value.error_code == "adapter_code_refused"


async def test_resolve_s3_malformed_location_is_refused(s3_catalog):
    with pytest.raises(AdapterIdError):
        await s3_catalog.resolve("s3://bucket/a b", "s3")


async def test_resolve_pbase_adapter_through_its_endpoint_and_the_store(web, s3_url, bucket, make_catalog, far):
    upload(bucket, "team/uuid/run/model_weights", far)
    web.files["/v2/repos/poet/version/3"] = json.dumps({"adapterPath": "uuid/run/model_weights/"}).encode()
    options = {"endpoint": s3_url, "region": "us-east-1", "access_key_id": "k", "secret_access_key": "s", "allow_http": "true"}
    catalog = make_catalog(
        stores=(StoreSettings(url=f"s3://{bucket[1]}/team", options=options),),
        pbase_url=f"http://{web.host}",
        pbase_store=f"s3://{bucket[1]}/team",
    )
    entry = await catalog.resolve("poet/3", "pbase", "pb_token")
    with pytest.raises(AdapterForbiddenError):
        await catalog.resolve("poet/3", "pbase")
    with pytest.raises(AdapterNotFoundError):
        await catalog.resolve("poet/4", "pbase", "pb_token")

    assert (entry.source, entry.name) == ("pbase", "poet/3")
    assert catalog.entries() == ()
    await catalog.close()


async def test_resolve_source_the_node_does_not_have_names_the_setting(make_catalog):
    catalog = make_catalog()
    with pytest.raises(AdapterForbiddenError, match=r"adapters\.pbase_url"):
        await catalog.resolve("poet/3", "pbase", "token")
    with pytest.raises(AdapterForbiddenError, match=r"adapters\.stores"):
        await catalog.resolve("bucket/a", "gcs")
    await catalog.close()


async def test_location_that_does_not_exist_for_the_caller_is_looked_for_like_one_that_does_not_exist(
    web, web_catalog, far, location
):
    web.publish("team/adapter", far)
    await web_catalog.resolve(location)
    found = []
    for asked in (location, f"http://{web.host}/team/nothing"):
        web.requests.clear()
        for _ in range(2):
            with pytest.raises(AdapterNotFoundError) as caught:
                await web_catalog.resolve(asked, sees=lambda name: name != location)
        kinds = [path.rpartition("/")[2] for path, _ in web.requests]
        found.append((caught.value.message.replace(asked, "NAME"), caught.value.error_code, kinds))
    assert found[0] == found[1]
    assert found[0][2] != []
    assert (await web_catalog.resolve(location)).name == location
