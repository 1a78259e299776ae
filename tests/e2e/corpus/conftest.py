"""The stage of the corpus: a started node with a tiny base model, keys, a hub, a web server and a full disk of its own.

Run rule, for every input: the answer has exactly the status and code of its case; then the node is ready, a golden
request gives the same bytes as before, and the ledger has a record for what was admitted, nothing open, and nothing for
what was refused. At the end of every file its inputs are sent once more: memory, descriptors and threads of node and
engine stay within 2 %, and the whole ledger is verified. Builders of bad input are those of the rooms' own tests.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file
from sqlalchemy import func, select

from node.settlement.ledger_reads import LedgerReads
from node.settlement.tables import RECORDS, REQUESTS
from tests.adapters.conftest import AdapterWriter
from tests.adapters.test_hub import Hub
from tests.adapters.test_stores import WebServer
from tests.api.conftest import write_tokenizer

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 4,
    "vocab_size": 300,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "float32",
}
SETTINGS = {
    "OPENLORA_CHAIN__PROFILE": "none",
    "OPENLORA_ENGINE__DETERMINISTIC": "true",
    "OPENLORA_ENGINE__KV_CACHE_BYTES": "8MiB",
    "OPENLORA_MODEL__DTYPE": "float32",
    "OPENLORA_SERVER__BODY_TIMEOUT_S": "1.5",
    "OPENLORA_ADAPTERS__MAX_RANK": "64",
    "OPENLORA_ADAPTERS__NEGATIVE_CACHE_S": "0",  # the second round of a file must do the work of the first
    "OPENLORA_ADAPTERS__FETCH_TIMEOUT_S": "3",
    "OPENLORA_ADAPTERS__FETCH_WORKERS": "4",
    "OPENLORA_ADAPTERS__FETCH_QUEUE_LIMIT": "16",
    "OPENLORA_ADAPTERS__CACHE_BYTES": "64KiB",
    "OPENLORA_TELEMETRY__LOG_LEVEL": "warning",
    "HF_HUB_OFFLINE": "0",
    "HF_HUB_DISABLE_XET": "1",
}
GOLDEN = {"model": "good", "prompt": "hello world", "max_tokens": 6, "temperature": 0, "logprobs": 2}
STEADY = 0.02
_SETTLE_S = 20.0


@dataclass(frozen=True)
class Reply:
    """One HTTP answer."""

    status: int
    headers: dict[str, str]
    raw: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.raw)

    @property
    def code(self) -> str | None:
        """The error's code, in either shape."""
        body = self.json if self.raw.startswith(b"{") else {}
        error = body.get("error")
        return error.get("code") if isinstance(error, dict) else body.get("code")

    @property
    def message(self) -> str:
        error = self.json["error"]
        return error["message"] if isinstance(error, dict) else error


@dataclass(frozen=True)
class Footprint:
    """What the node's two processes hold."""

    rss_bytes: int
    descriptor_count: int
    thread_count: int

    def is_within(self, before: Footprint) -> bool:
        """No more than 2 % above `before` in any of the three."""
        pairs = zip(self.parts, before.parts, strict=True)
        return all(now <= then * (1 + STEADY) for now, then in pairs)

    @property
    def parts(self) -> tuple[int, int, int]:
        return self.rss_bytes, self.descriptor_count, self.thread_count


def footprint(*pids: int) -> Footprint:
    """Summed over processes."""
    rss = sum(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in pids) * os.sysconf("SC_PAGE_SIZE")
    descriptors = sum(len(os.listdir(f"/proc/{pid}/fd")) for pid in pids)
    threads = sum(len(os.listdir(f"/proc/{pid}/task")) for pid in pids)
    return Footprint(rss, descriptors, threads)


@dataclass
class Stage:
    """The node and everything an input may need."""

    node: Any
    keys: dict[str, str]
    hub: Any
    web: Any
    writer: Any
    far: Any
    reads: LedgerReads
    golden: bytes = b""
    rounds: list[Callable[[], None]] = field(default_factory=list)

    def send(
        self, method: str, path: str, body: Any = None, tenant: str | None = "acme", timeout_s: float = 30.0, **headers: str
    ) -> Reply:
        """One request on a connection of its own; a body that is not bytes is sent as JSON."""
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        sent = {"content-type": "application/json", **headers}
        if tenant is not None:
            sent["authorization"] = f"Bearer {self.keys[tenant]}"
        connection = http.client.HTTPConnection(*self.address, timeout=timeout_s)
        try:
            connection.request(method, path, data, sent)
            answer = connection.getresponse()
            return Reply(answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read())
        finally:
            connection.close()

    def post(self, path: str, body: Any, **options: Any) -> Reply:
        return self.send("POST", path, body, **options)

    def complete(self, model: str, **changes: Any) -> Reply:
        """A short completion of one adapter."""
        return self.post("/v1/completions", {**GOLDEN, "model": model, **changes})

    @property
    def address(self) -> tuple[str, int]:
        host, _, port = self.node.url.removeprefix("http://").partition(":")
        return host, int(port)

    @property
    def record_count(self) -> int:
        return self._count(RECORDS)

    @property
    def open_count(self) -> int:
        """Admissions without a record."""
        return self._count(REQUESTS)

    def _count(self, table: Any) -> int:
        return int(self.reads.rows(select(func.count().label("rows")).select_from(table))[0].rows)

    def wait_until(self, is_true: Callable[[], bool], what: str, timeout_s: float = 20.0) -> None:
        """Look until it is so."""
        deadline_s = time.monotonic() + timeout_s
        while not is_true():
            assert time.monotonic() < deadline_s, f"not within {timeout_s:g} s: {what}"
            time.sleep(0.02)

    @contextlib.contextmanager
    def watched(self, admitted: int = 0) -> Iterator[None]:
        """The run rule around one input that must be admitted so many times."""
        before = self.record_count
        yield
        self.wait_until(lambda: self.open_count == 0, "every admission closed")
        assert self.record_count == before + admitted, "records of what was refused"
        assert self.send("GET", "/ready", tenant=None).status == 200
        assert self.ask_golden() == self.golden
        assert (self.open_count, self.record_count) == (0, before + admitted + 1)

    def refused(self, reply: Callable[[], Reply], status: int, code: str | None, words: str = "") -> Reply:
        """Send one input that must be refused, now and again at the end of the file."""

        def once() -> Reply:
            with self.watched():
                answer = reply()
            seen = (answer.status, answer.code)
            assert seen == (status, code), answer.raw[:600]
            assert words in answer.raw.decode() if words else True
            assert len(answer.raw) < 2048
            assert "x-openlora-receipt" not in answer.headers
            return answer

        first = once()
        self.rounds.append(lambda: once() and None)
        return first

    def ask_golden(self) -> bytes:
        """The golden request's answer without what differs by design: ids, time and receipt."""
        answer = self.complete("good")
        assert answer.status == 200, answer.raw
        text = re.sub(rb',"openlora":.*$', b"", answer.raw, flags=re.DOTALL)
        return re.sub(rb'"(id|created)":("[^"]*"|\d+),', b"", text)

    def footprint(self) -> Footprint:
        """After what was sent has been let go of."""
        pids = self.node.process.pid, self.node.child("node.engine.process")
        last = footprint(*pids)
        deadline_s = time.monotonic() + _SETTLE_S
        while time.monotonic() < deadline_s:
            time.sleep(0.3)
            now = footprint(*pids)
            if now == last:
                break
            last = now
        return last

    def check_ledger(self) -> None:
        """Hashes, chain, shares, signatures, and sums that agree with one another."""
        assert self.open_count == 0
        assert self.reads.verify_chain() == self.record_count
        totals, fees, after = self.reads.totals(), 0, 0
        while page := self.reads.records(after, 1000):
            fees += sum(int(item.record["fee_wei"]) for item in page)
            after = page[-1].sequence
        assert totals.recorded_wei == fees
        assert sum(totals.by_status.values()) == totals.records == after

    def check_steady(self) -> None:
        """The file's inputs once more cost nothing; the first two rounds may warm caches and pools up."""
        seen = []
        for _ in range(3):
            before = self.footprint()
            for again in self.rounds:
                again()
            after = self.footprint()
            if after.is_within(before):
                return
            seen.append((before, after))
        raise AssertionError(f"grew in every round: {seen}")


def write_base(directory: Path) -> Path:
    """A Llama of 2 layers and 8 hidden values with random weights, byte-level tokenizer and chat template."""
    directory.mkdir()
    write_tokenizer(directory)
    special = json.loads((directory / "special_tokens.json").read_text())
    config = {**CONFIG, "bos_token_id": special["bos_token_id"], "eos_token_id": special["eos_token_id"]}
    (directory / "config.json").write_text(json.dumps(config))
    generator = np.random.default_rng(3)
    shapes = {"model.embed_tokens.weight": (300, 8), "model.norm.weight": (8,)}
    for layer in range(2):
        at = f"model.layers.{layer}"
        shapes |= {f"{at}.input_layernorm.weight": (8,), f"{at}.post_attention_layernorm.weight": (8,)}
        shapes |= {f"{at}.self_attn.{name}_proj.weight": (size, 8) for name, size in (("q", 8), ("k", 4), ("v", 4), ("o", 8))}
        shapes |= {
            f"{at}.mlp.gate_proj.weight": (16, 8),
            f"{at}.mlp.up_proj.weight": (16, 8),
            f"{at}.mlp.down_proj.weight": (8, 16),
        }
    weights = {
        name: np.ones(shape, np.float32) if len(shape) == 1 else generator.standard_normal(shape).astype(np.float32) * 0.4
        for name, shape in shapes.items()
    }
    save_file(weights, directory / "model.safetensors")
    return directory


def make_key(kit: Any, data_dir: Path, tenant: str, *options: str) -> str:
    return kit.run_cli("keys", "create", tenant, "--data-dir", str(data_dir), *options).stdout.strip()


@contextlib.contextmanager
def open_stage(kit: Any, root: Path, program: str | None = None, **settings: str) -> Iterator[Stage]:
    """A stage below `root`, with other settings or another program where a file needs a node of its own."""
    writer, far = AdapterWriter(root / "adapters"), AdapterWriter(root / "far")
    writer.write("good")
    hub, web = Hub(), WebServer()
    config = root / "node.toml"
    config.write_text(
        f'[model]\npath = "{write_base(root / "tiny-base")}"\n[adapters]\ndirectory = "{writer.root}"\n'
        f'[[adapters.stores]]\nurl = "http://{web.host}/team"\nallow_private = true\n'
        f'[[adapters.stores]]\nurl = "https://localhost:{web.server.server_port}/"\n'
    )
    data_dir = root / "data"
    keys = {tenant: make_key(kit, data_dir, tenant) for tenant in ("acme", "other")}
    env = kit.environment(**SETTINGS | settings, HF_ENDPOINT=hub.url, HF_HOME=str(root / "hf"))
    node = kit.start_node(data_dir, "--config", str(config), env=env, program=program or kit.command[0])
    reads = LedgerReads(f"sqlite:///{data_dir / 'ledger.sqlite'}")
    try:
        stage = Stage(node, keys, hub, web, writer, far, reads)
        stage.ask_golden()  # a first answer may say less about its cache than the second
        stage.golden = stage.ask_golden()
        yield stage
        reads.close()
        assert node.stop() == 0
    finally:
        if node.process.poll() is None:
            node.kill()
        web.server.shutdown()
        hub.server.shutdown()
        shutil.rmtree(root, ignore_errors=True)


@pytest.fixture(scope="session")
def _stage(kit: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    with open_stage(kit, tmp_path_factory.mktemp("corpus")) as opened:
        yield opened


@pytest.fixture(scope="module")
def stage(_stage: Stage) -> Iterator[Stage]:
    """The stage, with no inputs of another file left to repeat."""
    _stage.rounds.clear()
    _stage.hub.status, _stage.web.behave = None, None
    yield _stage
    _stage.check_ledger()
