"""Builds the HTTP application: every route on one screen."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from aiohttp import web

from node.api.adapter_routes import AdapterRoutes
from node.api.answering import Answering
from node.api.chat_template import ChatTemplate
from node.api.connections import take_turns
from node.api.doors import Services
from node.api.embedding_routes import EmbeddingRoutes
from node.api.engine_gauges import read_gauges
from node.api.gate import Gate
from node.api.generation import Limits
from node.api.grammar_desk import GrammarDesk, GrammarLimits
from node.api.idempotency import Replays
from node.api.lorax_routes import LoraxRoutes
from node.api.middleware import LORAX_UNSUPPORTED, announce_limits, answer_errors, authenticate, identify
from node.api.model_routes import ModelRoutes
from node.api.openai_routes import OpenAiRoutes
from node.api.openapi.document import build_document
from node.api.openapi.routes import DocumentRoutes
from node.api.origins import answer_preflights, let_origins_read
from node.api.prompting import Prompting
from node.api.readiness import Readiness
from node.api.recipes import Recipes
from node.api.serve import RequestPath
from node.api.sse import StreamLimits
from node.api.status_routes import StatusRoutes
from node.api.tokenizer import TextTokenizer
from node.api.turnstile import Turnstile
from node.config import LOOPBACK_HOSTS, ServerSettings

GATE = web.AppKey("gate", Gate)
TURNSTILE = web.AppKey("turnstile", Turnstile)
SERVER = web.AppKey("server", ServerSettings)
_TOKENIZER_THREADS = 2


def build_application(services: Services) -> web.Application:
    """The application for `Listener`.

    Raises:
        ModelLoadError: The tokenizer or chat template in `Ready.tokenizer_dir` cannot be read.
    """
    turnstile = Turnstile()
    application = web.Application(
        middlewares=[
            take_turns(turnstile),
            identify(services.new_id),
            answer_errors(services.metrics, services.logger, services.clock),
            answer_preflights(services.server.cors_origins),
            authenticate(
                services.tenancy, is_for_loopback=services.server.host in LOOPBACK_HOSTS and not services.server.insecure
            ),
        ],
        client_max_size=services.server.max_body_bytes,
    )
    gate = Gate(services.server.max_concurrent_requests, services.server.drain_timeout_s)
    application[GATE] = gate
    application[TURNSTILE] = turnstile
    application[SERVER] = services.server
    application.on_response_prepare.append(announce_limits(services.tenancy))
    application.on_response_prepare.append(let_origins_read(services.server.cors_origins))
    answering = _answering(services, gate, application)
    embeddings = EmbeddingRoutes(answering)
    openai, lorax = OpenAiRoutes(answering), LoraxRoutes(answering)
    models = ModelRoutes(
        answering,
        services.catalog,
        services.ready,
        services.server,
        services.version,
        services.payment_terms,
        services.price,
        lambda: services.engine.stats,
    )
    adapters = AdapterRoutes(answering, services.catalog, services.engine, services.ready.model_id)
    probe_id = services.ready.eos_token_ids[0] if services.ready.eos_token_ids else 0
    status = StatusRoutes(answering, Readiness(services.engine, services.books, gate, probe_id), services.books)
    documents = DocumentRoutes(build_document(answering.limits, services.version))
    services.metrics.watch_engine(lambda: read_gauges(services), lambda: services.now().timestamp())
    application.add_routes(
        [
            web.post("/v1/chat/completions", openai.chat),
            web.post("/v1/completions", openai.completion),
            web.get("/v1/models", models.models),
            web.get("/v1/models/{id:.+}", models.model),
            web.get("/v1/receipts/{id}", status.receipt),
            web.post("/v1/load_lora_adapter", adapters.load),
            web.post("/v1/unload_lora_adapter", adapters.unload),
            web.post("/load_lora_adapter", adapters.load_sglang),
            web.post("/unload_lora_adapter", adapters.unload_sglang),
            web.post("/", lorax.compatible),
            web.post("/invocations", lorax.compatible),
            web.post("/generate", lorax.generate),
            web.post("/generate_stream", lorax.generate_stream),
            web.post("/tokenize", models.tokenize),
            web.post("/v1/embeddings", embeddings.embeddings),
            web.post("/embed", embeddings.embed),
            *(web.post(path, lorax.unsupported) for path in LORAX_UNSUPPORTED),
            web.get("/", status.health),
            web.get("/health", status.health),
            web.get("/ping", status.health),
            web.get("/startup", status.health),
            web.get("/live", status.live),
            web.get("/ready", status.health),
            web.get("/info", models.info),
            web.get("/metrics", status.metrics),
            web.get("/openapi.json", documents.document),
            web.get("/api-doc/openapi.json", documents.document),
            web.get("/docs", documents.page),
        ]
    )
    return application


def _answering(services: Services, gate: Gate, application: web.Application) -> Answering:
    directory = Path(services.ready.tokenizer_dir)
    tokenizer = TextTokenizer.open(directory)
    limits = Limits.of(
        services.server,
        vocab_size=services.ready.vocab_size,
        max_model_len=services.ready.max_model_len,
        eos_token_ids=services.ready.eos_token_ids,
        max_terms=services.max_terms,
    )
    executor = ThreadPoolExecutor(_TOKENIZER_THREADS, thread_name_prefix="tokenize")

    async def close_executor(_: web.Application) -> None:
        executor.shutdown(wait=True, cancel_futures=True)

    application.on_cleanup.append(close_executor)
    template = ChatTemplate.open(directory, tokenizer.special, services.now)
    desk = _grammar_desk(services, directory)

    async def close_desk(_: web.Application) -> None:
        await desk.close()

    application.on_cleanup.append(close_desk)
    replays = Replays(services.server.idempotency_s, services.server.idempotency_bytes, services.clock)

    async def close_replays(_: web.Application) -> None:
        await replays.close()

    application.on_shutdown.append(close_replays)
    path = RequestPath(
        gate=gate,
        recipes=Recipes(services.catalog, services.ready.model_id, services.merger),
        prompting=Prompting(tokenizer, template, limits, executor),
        grammars=desk,
        tokenizer=tokenizer,
        books=services.books,
        engine=services.engine,
        tenancy=services.tenancy,
        price=services.price,
        metrics=services.metrics,
        clock=services.clock,
    )
    return Answering(
        path=path,
        limits=limits,
        tokenizer=tokenizer,
        dialect=template.dialect,
        executor=executor,
        metrics=services.metrics,
        random_source=services.random_source,
        clock=services.clock,
        now=services.now,
        base_name=services.ready.model_id,
        max_body_bytes=services.server.max_body_bytes,
        body_timeout_s=services.server.body_timeout_s,
        tenancy=services.tenancy,
        replays=replays,
        stream_limits=StreamLimits(services.server.write_timeout_s, services.server.keep_alive_s, services.clock),
    )


def _grammar_desk(services: Services, directory: Path) -> GrammarDesk:
    ready, server = services.ready, services.server
    limits = GrammarLimits(server.grammar_timeout_s, server.grammar_memory_bytes)
    return GrammarDesk(directory / "tokenizer.json", ready.vocab_size, ready.eos_token_ids, limits)
