"""A whole API over fakes of the rooms below it: an engine that follows a script, a catalog of two adapters, books in memory."""

from __future__ import annotations

import asyncio
import io
import itertools
import json
import random
import threading
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from aiohttp.test_utils import TestClient, TestServer
from prometheus_client import CollectorRegistry
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from node.api.application import build_application
from node.api.doors import Closing, Opening, Services
from node.api.listener import Listener
from node.api.tokenizer import TextTokenizer
from node.config import ServerSettings, TenantSettings
from node.engine.messages import Ready, SequenceEvent, Stats, Submit
from node.engine.stream import SequenceStream
from node.errors import AdapterIdError, AdapterNotFoundError, LedgerError, NodeError, RequestError
from node.request import DrawnToken, TokenLogprob
from node.telemetry.logs import make_logger
from node.telemetry.metrics import NodeMetrics
from node.tenancy.api_key import ALL_BUT_ADMIN, ApiKey, digest_of, id_of
from node.tenancy.door import Door
from node.tenancy.meter import Meter, TokenPrice
from node.tenancy.store import TenantStore
from node.tenancy.tenancy import Tenancy

BASE_NAME = "tiny-base"
BASE_ID = "b" * 64
TEMPLATE = (
    "{% for message in messages %}{% if message['role'] not in ('system', 'user', 'assistant') %}"
    "{{ raise_exception('unknown role') }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def write_tokenizer(directory: Path) -> None:
    """A byte-level tokenizer of 256 bytes, some merges and three control tokens: every text is encodable, characters split."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {char: index for index, char in enumerate(alphabet)}
    merges = [("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), ("\u0120", "w"), ("o", "r"), ("\u0120w", "or")]
    for left, right in merges:
        vocabulary.setdefault(left + right, len(vocabulary))
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")])
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    special = {
        "bos_token": "<|im_start|>",
        "bos_token_id": tokenizer.token_to_id("<|im_start|>"),
        "eos_token": "<|im_end|>",
        "eos_token_id": tokenizer.token_to_id("<|im_end|>"),
        "add_bos": False,
    }
    (directory / "special_tokens.json").write_text(json.dumps(special), encoding="utf-8")


@dataclass(frozen=True)
class FakeEntry:
    name: str
    adapter_id: str
    directory: Path = Path("/adapters")
    source: str = "local"
    rank: int = 8
    manifest: Any = None
    manifest_hash: str | None = "c" * 64


class FakeCatalog:
    def __init__(self) -> None:
        self.known = {"alice": FakeEntry("alice", "1" * 64), "org/bob": FakeEntry("org/bob", "2" * 64)}
        self.faults: dict[str, NodeError] = {}
        self.asked: list[tuple[str, str | None, str | None]] = []
        self.targets: dict[str, str] = {}

    async def resolve(
        self, name: str, source: str | None = None, token: str | None = None, *, sees: Callable[[str], bool], owner: str
    ) -> FakeEntry:
        self.asked.append((name, source, token))
        if name in self.faults:
            raise self.faults[name]
        if ".." in name or "," in name:
            raise AdapterIdError(f"adapter name {name!r} is malformed")
        if name not in self.known or not sees(name):
            raise AdapterNotFoundError(f"no source knows the adapter {name!r}")
        return self.known[name]

    def entries(self, sees: Callable[[str], bool], owner: str) -> list[FakeEntry]:
        return [entry for entry in self.known.values() if sees(entry.name)]

    async def register(self, name, target, source=None, token=None, *, owner, replaces, sees):
        self.asked.append((target, source, token))
        before = self.known.get(name)
        if before is not None and not replaces:
            raise RequestError(f"{name} is loaded", code="adapter_exists")
        if target not in self.known:
            raise AdapterNotFoundError(f"no source knows the adapter {target!r}")
        self.known[name] = FakeEntry(name, self.known[target].adapter_id)
        self.targets[name] = target
        return self.known[name], before

    def target(self, name, owner):
        return self.targets.get(name)

    async def unregister(self, name, *, owner, sees):
        if name not in self.known:
            raise AdapterNotFoundError(f"the adapter {name} is not loaded here")
        return self.known.pop(name), True


class FakeSequence(SequenceStream):
    """The node's own stream of events, filled by a task; ends without a word where the script does."""

    def __init__(self, events: AsyncIterator[SequenceEvent], submit: Submit) -> None:
        super().__init__(submit.sequence_id, submit.tenant, lambda _: None)
        self._task = asyncio.create_task(self._fill(events))

    async def _fill(self, events: AsyncIterator[SequenceEvent]) -> None:
        async for event in events:
            self.put(event)
        if not self.is_finished:
            self.is_finished = True
            await self.aclose()


def scored(submit):
    """The prompt's log-probabilities: -1 for every token, 0.5 less for the token after it, and so on."""
    yield None
    for token_id in submit.prompt_ids[1:]:
        top = [TokenLogprob((token_id + k + 1) % 256, -0.5 - k) for k in range(submit.sampling.prompt_top)]
        yield DrawnToken(token_id, -1.0, tuple(top))


@dataclass
class FakeEngine:
    """Answers every sequence with `answer`, token by token, then an end-of-sequence id, or "length" when the budget is spent.

    `hold_after` stops after that many tokens and waits for a cancel; `fail_after` ends there with an error event.
    """

    tokenizer: TextTokenizer
    eos_id: int
    answer: str = "hello world"
    answer_ids: list[int] | None = None
    embedding: bytes | None = None
    choice_answers: tuple[tuple[str, float], ...] = ()  # text and log-probability of each token, by choice
    hold_after: int | None = None
    fail_after: int | None = None
    die_after: int | None = None
    is_alive: bool = True
    stats: Stats = field(default_factory=lambda: Stats(running=1, kv_blocks_total=10, kv_blocks_used=5, adapter_slots=4))
    submits: list[Submit] = field(default_factory=list)
    cancelled: list[str] = field(default_factory=list)
    wishes: list[tuple[str, str]] = field(default_factory=list)
    held: asyncio.Event = field(default_factory=asyncio.Event)
    may_begin: asyncio.Event | None = None  # nothing is answered before it is set
    _waits: dict[str, asyncio.Event] = field(default_factory=dict)

    def submit(self, submit: Submit) -> FakeSequence:
        return FakeSequence(self._events(submit), submit)

    async def _events(self, submit: Submit) -> AsyncIterator[SequenceEvent]:
        self.submits.append(submit)
        self._waits[submit.sequence_id] = asyncio.Event()
        if self.may_begin is not None:
            await self.may_begin.wait()
        if submit.embeds:
            yield SequenceEvent(sequence_id=submit.sequence_id, finish_reason="length", embedding=self.embedding)
            return
        text = self.choice_answers[submit.choice_index][0] if self.choice_answers else self.answer
        ids = list(self.answer_ids if self.answer_ids is not None else self.tokenizer.encode(text))
        ids.append(self.eos_id)
        for index, token_id in enumerate(ids):
            await asyncio.sleep(0)
            if index == self.fail_after:
                yield SequenceEvent(
                    sequence_id=submit.sequence_id, finish_reason="error", error_code="engine_failed", error_message="it broke"
                )
                return
            if index == self.die_after:
                self.is_alive = False
                return
            if index == self.hold_after:
                self.held.set()
                await self._waits[submit.sequence_id].wait()
                yield SequenceEvent(sequence_id=submit.sequence_id, finish_reason="cancelled")
                return
            event = self._event(submit, index, token_id)
            yield event
            if event.finish_reason is not None:
                return

    def _event(self, submit: Submit, index: int, token_id: int) -> SequenceEvent:
        sampling = submit.sampling
        finish = "stop" if token_id in sampling.stop_token_ids else None
        if finish is None and index + 1 == sampling.max_new_tokens:
            finish = "length"
        top = tuple(TokenLogprob(token_id + k, -0.5 - k) for k in range(max(0, sampling.logprobs)))
        logprob = self.choice_answers[submit.choice_index][1] if self.choice_answers else -0.5
        drawn = DrawnToken(token_id, logprob if sampling.logprobs >= 0 else None, top)
        is_first = index == 0
        prefill = tuple(scored(submit)) if is_first and sampling.prompt_logprobs else None
        return SequenceEvent(
            sequence_id=submit.sequence_id,
            tokens=(drawn,),
            prompt_logprobs=prefill,
            cached_prompt_tokens=1 if is_first else 0,
            finish_reason=finish,
        )

    def prefetch(self, term) -> None:
        self.wishes.append(("prefetch", term.adapter_id))

    def evict(self, adapter_id: str) -> None:
        self.wishes.append(("evict", adapter_id))

    def cancel(self, sequence_id: str) -> None:
        self.cancelled.append(sequence_id)
        if sequence_id in self._waits:
            self._waits[sequence_id].set()


class FakeBooks:
    """Keeps what was opened and closed; can refuse either."""

    def __init__(self) -> None:
        self.is_healthy = True
        self.opened: list[Opening] = []
        self.closed: list[Closing] = []
        self.open_fault: NodeError | None = None
        self.close_fault: NodeError | None = None
        self.closed_event = asyncio.Event()

    async def open(self, opening: Opening) -> None:
        await asyncio.sleep(0)
        if self.open_fault is not None:
            raise self.open_fault
        self.opened.append(opening)

    async def close(self, closing: Closing) -> dict[str, Any]:
        await asyncio.sleep(0)
        if not any(opening.request_id == closing.request_id for opening in self.opened):
            raise LedgerError(f"request {closing.request_id} is not open")
        self.closed.append(closing)
        self.closed_event.set()
        if self.close_fault is not None:
            self.is_healthy = False
            raise self.close_fault
        return {"schema": "openlora.receipt/1", "receipt": {"requestId": closing.request_id}}

    async def receipt(self, request_id: str, tenant: str) -> dict[str, Any] | None:
        is_theirs = any((opening.request_id, opening.tenant) == (request_id, tenant) for opening in self.opened)
        if not is_theirs or not any(closing.request_id == request_id for closing in self.closed):
            return None
        return {"schema": "openlora.receipt/1", "receipt": {"requestId": request_id}}


@dataclass
class Bench:
    """The parts of one API under test."""

    services: Services
    engine: FakeEngine
    catalog: FakeCatalog
    books: FakeBooks
    tokenizer: TextTokenizer
    log: io.StringIO
    store: TenantStore

    def one_closing(self) -> Closing:
        """The only closing there is: more or none would be a bug in itself."""
        assert len(self.books.opened) == len(self.books.closed) == 1
        return self.books.closed[0]


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(directory)
    return directory


@pytest.fixture(scope="session")
def tokenizer(tokenizer_dir: Path) -> TextTokenizer:
    return TextTokenizer.open(tokenizer_dir)


@pytest.fixture
def make_bench(tokenizer_dir: Path) -> Callable[..., Bench]:
    """Build a bench; keyword arguments override the server's settings, `keys` (tenant: key) turns API keys on."""

    def make(keys: dict[str, str] | None = None, **server: Any) -> Bench:
        text = TextTokenizer.open(tokenizer_dir)
        eos_id = text.special.eos_token_id
        assert eos_id is not None
        engine, catalog, books, log = FakeEngine(text, eos_id), FakeCatalog(), FakeBooks(), io.StringIO()
        counter = itertools.count(1)
        tenancy = make_tenancy(keys or {})
        settings = {"max_body_bytes": 1 << 20, "drain_timeout_s": 5.0, **server}
        services = Services(
            engine=engine,
            catalog=catalog,
            books=books,
            ready=make_ready(tokenizer_dir, eos_id),
            server=ServerSettings(**settings),
            max_terms=4,
            tenancy=tenancy,
            price=TokenPrice(1, 3),
            metrics=NodeMetrics(CollectorRegistry()),
            logger=make_logger("debug", "json", log),
            random_source=random.Random(7),
            new_id=lambda: f"req-{next(counter)}",
            clock=time.monotonic,
            now=lambda: datetime(2026, 1, 2, tzinfo=UTC),
            version="0.0.0-test",
        )
        return Bench(services, engine, catalog, books, text, log, tenancy.store)

    return make


class MemoryDatabase:
    """Where a tenant store's changes go when nobody needs them back."""

    async def __call__(self, work: Any) -> Any:
        return None


def make_tenancy(keys: dict[str, str]) -> Tenancy:
    """Tenants in memory; one key each, with every scope but admin."""
    store = TenantStore(MemoryDatabase(), lambda: 0)
    for tenant, secret in keys.items():
        digest = digest_of(secret)
        key = ApiKey(id_of(secret, digest), tenant, digest, ALL_BUT_ADMIN, 0, is_imported=True)
        store._keys[key.key_id] = key
    now = datetime(2026, 1, 2, tzinfo=UTC)
    return Tenancy(store, Door(store, TenantSettings(), time.monotonic, lambda: 0), Meter(time.monotonic, lambda: now))


def make_ready(tokenizer_dir: Path, eos_id: int) -> Ready:
    return Ready(
        model_id=BASE_NAME,
        base_id=BASE_ID,
        architecture="LlamaForCausalLM",
        dtype="float32",
        device="cpu",
        kernels="reference",
        vocab_size=300,
        max_model_len=512,
        eos_token_ids=(eos_id,),
        tokenizer_dir=str(tokenizer_dir),
        linears=(),
        kv_block_count=10,
        kv_block_size=16,
        max_rank=64,
    )


@pytest.fixture
def bench(make_bench: Callable[..., Bench]) -> Bench:
    return make_bench()


@pytest.fixture
async def make_client() -> AsyncIterator[Callable[[Bench], Any]]:
    """Start an in-process HTTP client for a bench; the test server cancels handlers on hang-up, as `Listener` does."""
    clients: list[TestClient] = []

    async def make(bench: Bench) -> TestClient:
        server = TestServer(build_application(bench.services))
        client = TestClient(server)
        await client.start_server()
        clients.append(client)
        return client

    yield make
    for client in clients:
        await client.close()


@pytest.fixture
async def client(bench: Bench, make_client: Callable[[Bench], Any]) -> TestClient:
    return await make_client(bench)


@pytest.fixture
def live_url(bench: Bench) -> Any:
    """The API on a real socket, its event loop on a thread: for clients that run outside this process."""
    ports: list[int] = []
    started, stop = threading.Event(), threading.Event()

    async def serve() -> None:
        bench.engine.held, bench.books.closed_event = asyncio.Event(), asyncio.Event()
        listener = Listener(build_application(bench.services))
        ports.append(await listener.open("127.0.0.1", 0))
        started.set()
        await asyncio.to_thread(stop.wait)
        await listener.close(1.0)

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    assert started.wait(30)
    yield f"http://127.0.0.1:{ports[0]}"
    stop.set()
    thread.join(30)


@pytest.fixture
def ledger_fault() -> NodeError:
    return LedgerError("the ledger did not commit", retry_after_s=5.0)
