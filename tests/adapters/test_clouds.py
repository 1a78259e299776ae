"""Google Cloud Storage and Azure Blob Storage: a server on this machine that speaks as much of both as a reader asks for."""

from __future__ import annotations

import hashlib
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

import pytest

from node.config import StoreSettings
from node.errors import AdapterNotFoundError
from tests.adapters.replies import reply

WEIGHTS = "adapter_model.safetensors"
WHEN = "Wed, 21 Oct 2026 07:28:00 GMT"


class Cloud:
    """Objects of one bucket or container by key. `cut`: after so many bytes the next answer with weights breaks off."""

    def __init__(self):
        self.objects = {}
        self.ranges = []
        self.cut = None
        cloud = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                cloud.answer(self)

            def log_message(self, *_):
                """Nothing on the terminal."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()

    def publish(self, prefix, directory):
        for file in directory.iterdir():
            self.objects[f"{prefix}/{file.name}"] = file.read_bytes()

    def answer(self, handler):
        url = urlsplit(handler.path)
        query, key = parse_qs(url.query), unquote(url.path).split("/", 2)[2:]
        if not key:
            found = {name: body for name, body in self.objects.items() if name.startswith(query["prefix"][0])}
            return reply(handler, 200, (azure_list if "comp" in query else google_list)(found).encode())
        body = self.objects[key[0]]
        if handler.headers.get("If-Match", tag(body)) != tag(body):
            return reply(handler, 412, b"")
        wanted = handler.headers.get("Range")
        self.ranges.append((key[0].rpartition("/")[2], wanted))
        first = int(wanted.removeprefix("bytes=").partition("-")[0]) if wanted else 0
        headers = {"Content-Range": f"bytes {first}-{len(body) - 1}/{len(body)}"} if wanted else {}
        headers |= {"ETag": tag(body), "Last-Modified": WHEN, "Content-Length": str(len(body) - first)}
        shown = body[first:]
        if self.cut is not None and key[0].endswith(WEIGHTS):
            shown, self.cut = shown[: self.cut], None
        return reply(handler, 206 if wanted else 200, shown, headers)


def tag(body):
    return f'"{hashlib.sha256(body).hexdigest()[:16]}"'


def google_list(found):
    rows = "".join(
        f"<Contents><Key>{escape(key)}</Key><LastModified>2026-10-21T07:28:00.000Z</LastModified>"
        f"<ETag>{escape(tag(body))}</ETag><Size>{len(body)}</Size></Contents>"
        for key, body in found.items()
    )
    return f"<ListBucketResult><Name>store</Name><IsTruncated>false</IsTruncated>{rows}</ListBucketResult>"


def azure_list(found):
    rows = "".join(
        f"<Blob><Name>{escape(key)}</Name><Properties><Last-Modified>{WHEN}</Last-Modified><Etag>{escape(tag(body))}</Etag>"
        f"<Content-Length>{len(body)}</Content-Length><Content-Type>x</Content-Type></Properties></Blob>"
        for key, body in found.items()
    )
    return f"<EnumerationResults><Prefix/><Blobs>{rows}</Blobs><NextMarker/></EnumerationResults>"


@pytest.fixture
def cloud():
    served = Cloud()
    yield served
    served.server.shutdown()
    served.server.server_close()


@pytest.fixture(params=["gcs", "azure"])
async def store(request, cloud, make_catalog):
    """(catalog, location below which adapters lie, source)."""
    options = {
        "gcs": {"base_url": cloud.url, "skip_signature": "true", "allow_http": "true"},
        "azure": {"endpoint": cloud.url, "account_name": "account", "skip_signature": "true", "allow_http": "true"},
    }[request.param]
    url = {"gcs": "gs://store/team", "azure": "az://store/team"}[request.param]
    catalog = make_catalog(stores=(StoreSettings(url=url, options=options),))
    yield catalog, url, request.param
    await catalog.close()


@pytest.fixture
def far(writer, tmp_path):
    return type(writer)(tmp_path / "far").write("adapter")


async def test_resolve_adapter_of_a_cloud_is_fetched_once_and_listed(cloud, store, far):
    catalog, url, source = store
    cloud.publish("team/a", far)

    first = await catalog.resolve(f"{url}/a")
    second = await catalog.resolve(f"{url}/a", source)

    assert (first.source, first.adapter_id) == (source, second.adapter_id)
    assert sorted(name for name, _ in cloud.ranges) == ["adapter_config.json", WEIGHTS]
    assert [entry.name for entry in catalog.entries()] == [f"{url}/a"]


async def test_resolve_adapter_of_a_cloud_that_changed_is_fetched_again_after_a_minute(
    cloud, store, far, writer, clock, tmp_path
):
    catalog, url, _ = store
    cloud.publish("team/a", far)
    before = await catalog.resolve(f"{url}/a")
    cloud.publish("team/a", type(writer)(tmp_path / "later").write("adapter", lora_alpha=6))

    clock.now_s += 61

    assert (await catalog.resolve(f"{url}/a")).adapter_id != before.adapter_id


async def test_resolve_broken_download_of_a_cloud_goes_on_where_it_stopped(cloud, store, far):
    catalog, url, _ = store
    cloud.publish("team/a", far)
    cloud.cut = 100

    entry = await catalog.resolve(f"{url}/a")

    assert (entry.directory / WEIGHTS).read_bytes() == (far / WEIGHTS).read_bytes()
    asked = [wanted for name, wanted in cloud.ranges if name == WEIGHTS]
    assert asked[0] is None
    assert asked[1].startswith("bytes=100-")


async def test_resolve_absent_adapter_of_a_cloud_is_not_found(store):
    catalog, url, _ = store
    with pytest.raises(AdapterNotFoundError):
        await catalog.resolve(f"{url}/absent")
