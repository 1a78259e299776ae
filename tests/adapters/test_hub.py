"""The hub source against a small server that speaks the hub's protocol: real HTTP, the real library."""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import gguf
import huggingface_hub.constants
import numpy as np
import pytest

from node.errors import (
    AdapterChangedError,
    AdapterForbiddenError,
    AdapterInvalidError,
    AdapterNotFoundError,
    AdapterUnavailableError,
)

COMMIT, LATER = "1" * 40, "2" * 40
TOKEN = "hf_secret_token"


class Hub:
    """Repositories by name. `requests` records (method, path, token)."""

    def __init__(self):
        self.repositories = {}
        self.status = None
        self.is_damaging = False
        self.pieces = []  # bytes of the weights after which a connection ends, one for each time they are asked for
        self.knows_ranges = True
        self.ranges = []  # (file, range) asked for
        self.surplus = b""
        self.download_status = None
        self.storage = None  # another server's address, to which downloads are sent
        self.hides_private = False  # as the public hub answers those who show a token of their own
        self.requests = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                hub.answer(self)

            def do_HEAD(self):
                hub.answer(self)

            def log_message(self, *_):
                """Nothing on the terminal."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.05,))
        self.thread.start()

    def publish(self, name, directory, *, commit=COMMIT, token=None, extra=()):
        files = {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}
        files |= dict.fromkeys(extra, b"")
        self.repositories[name] = (commit, token, files)

    def answer(self, handler):
        path, token = handler.path.partition("?")[0], (handler.headers.get("Authorization") or "").removeprefix("Bearer ")
        self.requests.append((handler.command, path, token))
        parts = path.strip("/").split("/")
        name = "/".join(parts[2:4] if parts[0] == "api" else parts[:2])
        if self.status is not None:
            return send(handler, self.status, b"{}", {"Retry-After": "7"})
        if name not in self.repositories:
            return send(handler, 404, b"{}", {"X-Error-Code": "RepoNotFound"})
        commit, needed, files = self.repositories[name]
        if needed is not None and token != needed:
            if self.hides_private:
                return send(handler, 404, b"{}", {"X-Error-Code": "RepoNotFound"})
            return send(handler, 401, b"{}", {"X-Error-Code": "GatedRepo"})
        if parts[0] == "api":
            siblings = [described(file, content) for file, content in files.items()]
            info = {"id": name, "sha": commit, "private": needed is not None, "gated": False, "siblings": siblings}
            return send(handler, 200, json.dumps(info).encode(), {})
        content = files["/".join(parts[4:])]
        if self.is_damaging:
            content = content[:-1] + bytes([content[-1] ^ 1])
        marks = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": commit}
        if self.storage is not None:
            return send(handler, 302, b"", {"Location": self.storage + handler.path})
        if self.download_status is not None:
            return send(handler, self.download_status, b"{}", {"Retry-After": "3600"})
        status, first, wanted = 200, 0, handler.headers.get("Range")
        if wanted is not None:
            self.ranges.append((parts[-1], wanted))
            if self.knows_ranges:
                status, first = 206, int(wanted.removeprefix("bytes=").partition("-")[0])
                marks["Content-Range"] = f"bytes {first}-{len(content) - 1}/{len(content)}"
        content = content[first:] + self.surplus
        marks["Content-Length"] = str(len(content))
        if self.pieces and parts[-1].endswith(".safetensors"):
            content = content[: self.pieces.pop(0)]
        return send(handler, status, content, marks)


def described(file, content):
    """A file as the hub lists it; large ones are kept by their digest."""
    sibling = {"rfilename": file, "size": len(content)}
    if file.endswith(".safetensors"):
        sibling["lfs"] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest(), "pointerSize": 130}
    return sibling


def send(handler, status, body, headers):
    handler.send_response(status)
    for key, value in ({"Content-Type": "application/json", "Content-Length": str(len(body))} | headers).items():
        handler.send_header(key, value)
    handler.end_headers()
    if handler.command != "HEAD":
        handler.wfile.write(body)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    served = Hub()
    yield served
    served.server.shutdown()
    served.thread.join()
    served.server.server_close()


@pytest.fixture
async def hub_catalog(hub, make_catalog):
    made = make_catalog(endpoint=hub.url, allow_hub=True)
    yield made
    await made.close()


@pytest.fixture
def published(hub, writer, tmp_path):
    directory = type(writer)(tmp_path / "far").write("adapter")
    hub.publish("owner/name", directory, extra=["README.md", "optimizer.pt"])
    return directory


async def test_resolve_hub_adapter_fetches_its_files_once_and_nothing_else(hub, hub_catalog, published):
    first = await hub_catalog.resolve("owner/name")
    second = await hub_catalog.resolve("owner/name", "hub")

    fetched = [path for method, path, _ in hub.requests if method == "GET" and "/resolve/" in path]
    assert (first.source, first.revision, first.adapter_id) == ("hub", COMMIT, second.adapter_id)
    assert sorted(path.rsplit("/", 1)[1] for path in fetched) == ["adapter_config.json", "adapter_model.safetensors"]
    assert [entry.name for entry in hub_catalog.entries()] == ["owner/name"]
    assert not any(path.is_symlink() for path in first.directory.iterdir())


async def test_resolve_hub_file_that_arrives_damaged_is_refused_and_fetched_anew(hub, hub_catalog, published, clock):
    hub.is_damaging = True
    with pytest.raises(AdapterUnavailableError, match="SHA-256"):
        await hub_catalog.resolve("owner/name")

    hub.is_damaging = False
    clock.now_s += 61
    entry = await hub_catalog.resolve("owner/name")

    sent = (published / "adapter_model.safetensors").read_bytes()
    assert (entry.directory / "adapter_model.safetensors").read_bytes() == sent


@pytest.mark.parametrize("knows_ranges", [True, False])
async def test_resolve_hub_broken_download_goes_on_where_it_stopped(hub, hub_catalog, published, clock, knows_ranges):
    hub.pieces, hub.knows_ranges = [1000, 0, 500] if knows_ranges else [1000, 200, 0], knows_ranges
    with pytest.raises(AdapterUnavailableError):
        await hub_catalog.resolve("owner/name")

    clock.now_s += 61
    entry = await hub_catalog.resolve("owner/name")

    sent = (published / "adapter_model.safetensors").read_bytes()
    assert len(sent) > 1500
    kept = [1000, 1000, 1500] if knows_ranges else [1000, 1000, 1000]
    assert [wanted for _, wanted in hub.ranges] == [f"bytes={size}-" for size in kept]
    assert (entry.directory / "adapter_model.safetensors").read_bytes() == sent


async def test_resolve_hub_connection_that_breaks_once_is_taken_up_again_at_once(hub, hub_catalog, published):
    hub.pieces = [1000]
    entry = await hub_catalog.resolve("owner/name")

    assert hub.ranges == [("adapter_model.safetensors", "bytes=1000-")]
    assert entry.source == "hub"


async def test_resolve_hub_file_beyond_its_listed_size_is_cut_off(hub, hub_catalog, published):
    hub.surplus = b"x" * 5000
    with pytest.raises(AdapterUnavailableError) as caught:
        await hub_catalog.resolve("owner/name")

    assert caught.value.error_code == "source_limit"


async def test_resolve_hub_download_told_to_wait_an_hour_says_so_at_once(hub, hub_catalog, published):
    hub.download_status = 429
    with pytest.raises(AdapterUnavailableError) as caught:
        await hub_catalog.resolve("owner/name")

    assert caught.value.retry_after_s == 300


async def test_resolve_hub_storage_elsewhere_is_followed_without_the_token(hub, hub_catalog, published):
    storage = Hub()
    try:
        hub.publish("owner/name", published, token=TOKEN)
        storage.publish("owner/name", published)
        hub.storage = storage.url.replace("127.0.0.1", "localhost")
        entry = await hub_catalog.resolve("owner/name", token=TOKEN)
    finally:
        storage.server.shutdown()
        storage.thread.join()
        storage.server.server_close()

    assert entry.source == "hub"
    assert {token for _, _, token in hub.requests} == {TOKEN}
    assert {token for _, _, token in storage.requests} == {""}


async def test_resolve_hub_pull_request_by_its_reference(hub, hub_catalog, published):
    entry = await hub_catalog.resolve("owner/name@refs/pr/2")

    assert (entry.name, entry.revision) == ("owner/name@refs/pr/2", COMMIT)
    assert "/api/models/owner/name/revision/refs%2Fpr%2F2" in [path for _, path, _ in hub.requests]
    assert (entry.directory.parent / ".ref-refs%2Fpr%2F2.json").is_file()


async def test_resolve_hub_branch_that_moved_is_followed_after_a_minute(hub, hub_catalog, published, writer, clock, tmp_path):
    before = await hub_catalog.resolve("owner/name")
    hub.publish("owner/name", type(writer)(tmp_path / "later").write("adapter", lora_alpha=6), commit=LATER)
    assert (await hub_catalog.resolve("owner/name")).adapter_id == before.adapter_id

    clock.now_s += 61
    after = await hub_catalog.resolve("owner/name")

    assert (after.revision, after.adapter_id != before.adapter_id) == (LATER, True)


async def test_resolve_private_hub_adapter_is_open_to_its_token_only_and_never_listed(hub, hub_catalog, published):
    hub.publish("owner/name", published, token=TOKEN)

    assert (await hub_catalog.resolve("owner/name", token=TOKEN)).revision == COMMIT
    for other in (None, "hf_other"):
        with pytest.raises(AdapterForbiddenError) as caught:
            await hub_catalog.resolve("owner/name", token=other)
        assert caught.value.error_code == "adapter_gated"
        assert "hf_" not in caught.value.message

    assert hub_catalog.entries() == ()


async def test_resolve_private_hub_adapter_whose_token_lost_its_right_is_refused_at_the_next_request(hub, hub_catalog, published):
    hub.publish("owner/name", published, token=TOKEN)
    await hub_catalog.resolve("owner/name", token=TOKEN)
    hub.publish("owner/name", published, token="hf_new")

    with pytest.raises(AdapterForbiddenError):
        await hub_catalog.resolve("owner/name", token=TOKEN)


async def test_resolve_private_hub_adapter_is_asked_about_as_often_as_the_operator_says(hub, make_catalog, published, clock):
    hub.publish("owner/name", published, token=TOKEN)
    catalog = make_catalog(endpoint=hub.url, allow_hub=True, private_recheck_s=30.0)
    await catalog.resolve("owner/name", token=TOKEN)
    asked = len(hub.requests)
    await catalog.resolve("owner/name", token=TOKEN)
    assert len(hub.requests) == asked

    hub.publish("owner/name", published, token="hf_new")
    clock.now_s += 31
    with pytest.raises(AdapterForbiddenError):
        await catalog.resolve("owner/name", token=TOKEN)
    await catalog.close()


@pytest.mark.parametrize("token", [None, "hf_own"])
async def test_resolve_hub_name_that_the_operator_closed_is_answered_and_worked_for_like_an_absent_one(
    hub, hub_catalog, published, token
):
    await hub_catalog.resolve("owner/name@main")
    answers = []
    for name in ("owner/name", "owner/name@main", "owner/nobody"):
        hub.requests.clear()
        with pytest.raises(AdapterNotFoundError) as caught:
            await hub_catalog.resolve(name, token=token, sees=lambda name: name != "owner/name")
        answers.append((caught.value.message.replace(name, "NAME"), caught.value.error_code, len(hub.requests)))
        assert not any("owner/name" in path for _, path, _ in hub.requests)
    assert answers[0] == answers[1] == answers[2]


@pytest.mark.parametrize(
    ("status", "kind", "code", "retry_after_s"),
    [
        (401, AdapterForbiddenError, "adapter_gated", None),
        (403, AdapterForbiddenError, "adapter_gated", None),
        (404, AdapterNotFoundError, "adapter_not_found", None),
        (429, AdapterUnavailableError, "source_unavailable", 7),
        (500, AdapterUnavailableError, "source_unavailable", 7),
        (418, AdapterUnavailableError, "source_unavailable", 10),
    ],
)
async def test_resolve_hub_refusal_is_mapped_remembered_and_says_no_token(
    hub, hub_catalog, published, writer, clock, status, kind, code, retry_after_s
):
    writer.write("good")
    hub.status = status
    asked = []
    for _ in range(2):
        with pytest.raises(kind) as caught:
            await hub_catalog.resolve("owner/name", token=TOKEN)
        asked.append(len(hub.requests))
        assert (caught.value.error_code, caught.value.retry_after_s) == (code, retry_after_s)
        assert TOKEN not in caught.value.message
    assert asked[0] == asked[1] > 0
    assert (await hub_catalog.resolve("good")).name == "good"

    hub.status = None
    clock.now_s += 61
    assert (await hub_catalog.resolve("owner/name", token=TOKEN)).revision == COMMIT


async def test_resolve_public_hub_adapter_outlives_an_outage(hub, hub_catalog, published, clock):
    before = await hub_catalog.resolve("owner/name")
    hub.status = 503
    clock.now_s += 61

    assert (await hub_catalog.resolve("owner/name")).adapter_id == before.adapter_id


async def test_resolve_hub_without_connection_is_unavailable(make_catalog, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
    catalog = make_catalog(endpoint="http://127.0.0.1:9", allow_hub=True)

    with pytest.raises(AdapterUnavailableError) as caught:
        await catalog.resolve("owner/name")

    assert caught.value.is_retryable
    await catalog.close()


async def test_resolve_hub_offline_serves_what_was_fetched_before_and_nothing_private(
    hub, hub_catalog, make_catalog, published, monkeypatch
):
    hub.publish("owner/private", published, token=TOKEN)
    before = await hub_catalog.resolve("owner/name")
    await hub_catalog.resolve("owner/private", token=TOKEN)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    offline = make_catalog(endpoint=hub.url, allow_hub=True)

    assert (await offline.resolve("owner/name")).adapter_id == before.adapter_id
    with pytest.raises(AdapterForbiddenError):
        await offline.resolve("owner/private", token=TOKEN)
    with pytest.raises(AdapterUnavailableError, match="HF_HUB_OFFLINE"):
        await offline.resolve("owner/unseen")
    await offline.close()


@pytest.mark.parametrize(
    ("files", "code"),
    [
        (["adapter_config.json", "adapter_model.bin"], "adapter_format_unsupported"),
        (["adapter_config.json", "adapter_model.safetensors", "modeling.py"], "adapter_code_refused"),
    ],
)
async def test_resolve_hub_repository_with_code_or_pickles_is_refused_before_any_download(
    hub, hub_catalog, tmp_path, files, code
):
    (tmp_path / "odd").mkdir()
    hub.publish("owner/odd", tmp_path / "odd", extra=files)

    with pytest.raises(AdapterInvalidError) as caught:
        await hub_catalog.resolve("owner/odd")

    assert caught.value.error_code == code
    assert not any("/resolve/" in path for _, path, _ in hub.requests)


async def test_resolve_hub_file_beyond_the_limit_is_refused_before_any_download(hub, make_catalog, published):
    catalog = make_catalog(endpoint=hub.url, allow_hub=True, max_adapter_bytes=100)

    with pytest.raises(AdapterInvalidError) as caught:
        await catalog.resolve("owner/name")

    assert caught.value.error_code == "adapter_too_large"
    assert not any("/resolve/" in path for _, path, _ in hub.requests)
    await catalog.close()


async def test_resolve_staged_files_changed_under_their_commit_is_a_digest_mismatch(hub, hub_catalog, published, writer):
    entry = await hub_catalog.resolve("owner/name")
    (entry.directory / "adapter_config.json").unlink()
    (entry.directory / "adapter_config.json").write_text(json.dumps(writer.config(lora_alpha=9)))

    with pytest.raises(AdapterChangedError) as caught:
        await hub_catalog.resolve("owner/name")

    assert caught.value.error_code == "adapter_digest_mismatch"


async def test_resolve_hub_repository_with_ludwigs_output_is_the_adapter_inside(hub, hub_catalog, published, tmp_path):
    outer = tmp_path / "ludwig"
    (outer / "model").mkdir(parents=True)
    shutil.copytree(published, outer / "model" / "model_weights")
    (outer / "model" / "model_hyperparameters.json").write_text("{}")
    hub.publish("owner/ludwig", outer, extra=["training_statistics.json"])

    found = await hub_catalog.resolve("owner/ludwig")

    assert found.adapter_id == (await hub_catalog.resolve("owner/name")).adapter_id


async def test_resolve_hub_repository_with_a_gguf_adapter(hub, hub_catalog, writer, tmp_path):
    far = type(writer)(tmp_path / "far")
    peft = far.write("peft", target_modules=["v_proj"], tensors=_only_v(far.tensors()))
    hub.publish("owner/peft", peft)
    gguf_directory = tmp_path / "gguf"
    gguf_directory.mkdir()
    _write_gguf(gguf_directory / "adapter.gguf", _only_v(far.tensors()))
    hub.publish("owner/gguf", gguf_directory, extra=["README.md"])

    found = await hub_catalog.resolve("owner/gguf")

    assert found.adapter_id == (await hub_catalog.resolve("owner/peft")).adapter_id
    assert [path.name for path in found.directory.iterdir() if not path.name.startswith(".")] == ["adapter.gguf"]


def _only_v(tensors):
    return {name: tensor for name, tensor in tensors.items() if "v_proj" in name}


def _write_gguf(path, tensors):
    out = gguf.GGUFWriter(path, "llama")
    out.add_type(gguf.GGUFType.ADAPTER)
    out.add_string("adapter.type", "lora")
    out.add_float32("adapter.lora.alpha", 4.0)
    for name, (_, shape, raw) in tensors.items():
        layer, side = name.split(".layers.")[1].split(".")[0], "a" if ".lora_A." in name else "b"
        out.add_tensor(f"blk.{layer}.attn_v.weight.lora_{side}", np.frombuffer(raw, np.float32).reshape(shape))
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
