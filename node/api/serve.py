"""The request path: from a validated request to an answer with a receipt. Every shape of request goes through here.

gate -> grammar judged -> adapters by content -> tokens -> price and durable admission -> engine -> text -> record -> receipt
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

import msgspec

from node.api.choice import Choice
from node.api.doors import Books, Engine, Opening
from node.api.exchange import Exchange
from node.api.gate import Gate
from node.api.generation import Generation
from node.api.grammar_desk import GrammarDesk
from node.api.prompting import Prompting
from node.api.recipes import Recipes
from node.api.tokenizer import TextTokenizer
from node.engine.messages import Submit
from node.errors import EngineError, LedgerError
from node.request import AdapterTerm
from node.settlement.admission import SignedVoucher
from node.telemetry.metrics import NodeMetrics
from node.tenancy.meter import TokenPrice, Visit
from node.tenancy.tenancy import Tenancy
from node.tenancy.tenant import Tenant


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks, under which id: `tenant` keys fairness, limits and the prefix cache, `voucher` is who signed to pay."""

    request_id: str
    tenant: Tenant
    route: str
    voucher: SignedVoucher | None = None


class RequestPath:
    """Admits requests, runs them and closes their books, each exactly once whatever happens in between."""

    def __init__(
        self,
        gate: Gate,
        recipes: Recipes,
        prompting: Prompting,
        grammars: GrammarDesk,
        tokenizer: TextTokenizer,
        books: Books,
        engine: Engine,
        tenancy: Tenancy,
        price: TokenPrice,
        metrics: NodeMetrics,
        clock: Callable[[], float],
    ) -> None:
        self._gate = gate
        self._recipes = recipes
        self._prompting = prompting
        self._grammars = grammars
        self._tokenizer = tokenizer
        self._books = books
        self._engine = engine
        self._tenancy = tenancy
        self._price = price
        self._metrics = metrics
        self._clock = clock

    @asynccontextmanager
    async def admitted(self, generation: Generation, caller: Caller) -> AsyncIterator[Exchange]:
        """Run one request; leaving the block closes its books if `Exchange.commit` has not.

        Raises:
            NodeError: Refused before admission (nothing is recorded), or failed after it (recorded as failed, fee 0).
        """
        started_s = self._clock()
        async with self._gate.entered(caller.tenant.name):
            with self._tenancy.meter.entered(caller.tenant) as visit:
                self._refuse_when_unwell()
                exchange = await self._admit(generation, caller, visit)
                exchange.arrived_s = started_s
                try:
                    yield exchange
                except (asyncio.CancelledError, ConnectionError):
                    await self._end(exchange, "cancelled", "cancelled")
                    raise
                except BaseException:
                    await self._end(exchange, "failed", "error")
                    raise
                else:
                    await self._end(exchange, "cancelled", "cancelled")
                finally:
                    self._settle(exchange, visit)
                    self._measure(exchange, caller.route, started_s)

    def _refuse_when_unwell(self) -> None:
        """Before anything costs anything: no engine, no answer; no ledger, no record, so no answer either."""
        if not self._engine.is_alive:
            raise EngineError("the engine process is down and being restarted; retry in a few seconds", retry_after_s=5.0)
        if not self._books.is_healthy:
            raise LedgerError("the ledger does not accept records now, so nothing is served; retry later", retry_after_s=5.0)

    async def _admit(self, generation: Generation, caller: Caller, visit: Visit) -> Exchange:
        constraint = generation.constraint
        if constraint is not None:
            await self._grammars.check(caller.tenant.name, constraint.grammar, constraint.param)
        resolved = await self._recipes.resolve(
            generation, self._tenancy.sees(caller.tenant.name), self._tenancy.owner(caller.tenant.name)
        )
        prompts = await self._prompting.tokenize(generation)
        budget = self._prompting.budget(generation, prompts)
        opening = Opening(
            request_id=caller.request_id,
            tenant=caller.tenant.name,
            recipe=resolved.entries,
            prompts=prompts,
            max_output_tokens=budget * generation.choice_count * len(prompts),
            voucher=caller.voucher,
            merge=resolved.merge,
        )
        prompt_count = sum(len(ids) for ids in prompts)
        visit.reserve(prompt_count + opening.max_output_tokens, self._price.fee_wei(prompt_count, opening.max_output_tokens))
        exchange = self._prepare(generation, opening, resolved.terms, caller.tenant.weight, budget)
        await self._open_books(exchange)
        return exchange

    def _settle(self, exchange: Exchange, visit: Visit) -> None:
        """Book for the tenant what the ledger counts for it (`ledger_usage`)."""
        if exchange.is_charged:
            prompt, output = exchange.prompt_token_count, exchange.delivered_token_count
            visit.settle(prompt + output, self._price.fee_wei(prompt, output))

    def _prepare(
        self, generation: Generation, opening: Opening, terms: tuple[AdapterTerm, ...], weight: int, budget: int
    ) -> Exchange:
        sampling = msgspec.structs.replace(generation.sampling, max_new_tokens=budget)
        end_ids = frozenset(sampling.stop_token_ids)
        submits: list[Submit] = []
        choices: list[Choice] = []
        for prompt_index, prompt_ids in enumerate(opening.prompts):
            for choice_index in range(generation.choice_count):
                index = len(submits)
                submits.append(
                    Submit(
                        sequence_id=f"{opening.request_id}.{index}",
                        tenant=opening.tenant,
                        prompt_ids=prompt_ids,
                        terms=terms,
                        sampling=sampling,
                        choice_index=choice_index,
                        weight=weight,
                        grammar=None if generation.constraint is None else generation.constraint.grammar,
                        embeds=generation.embeds,
                    )
                )
                choices.append(Choice(index, prompt_index, self._tokenizer, generation.stop, end_ids))
        return Exchange(opening, tuple(submits), tuple(choices), self._engine, self._books, self._clock, generation.is_stream)

    async def _open_books(self, exchange: Exchange) -> None:
        """A client that hangs up during the commit may leave an admission behind: it is closed as cancelled before we go on, for
        the ledger works in the order in which it is told. Not a task of its own, which would be three turns of the event loop."""
        try:
            await self._books.open(exchange.opening)
        except asyncio.CancelledError:
            await self._end(exchange, "cancelled", "cancelled")
            raise

    async def _end(self, exchange: Exchange, status: str, finish_reason: str) -> None:
        """Abandon, where nothing was committed. A ledger that fails here has said so through its health; the caller's own error
        or hang-up is the one to go on with."""
        if exchange.receipt is not None:
            return
        try:
            await exchange.abandon(status, finish_reason)
        except LedgerError:
            return
        finally:
            await exchange.settled()

    def _measure(self, exchange: Exchange, route: str, started_s: float) -> None:
        outcome = "ok" if exchange.receipt is not None else "unfinished"
        metrics, now_s = self._metrics, self._clock()
        metrics.requests.labels(route, outcome).inc()
        metrics.prompt_tokens.inc(exchange.prompt_token_count)
        metrics.output_tokens.inc(exchange.output_token_count)
        metrics.request_seconds.observe(now_s - started_s)
        metrics.lorax_seconds.observe(now_s - started_s)
        adapters = (item.entry.adapter_id for item in exchange.opening.recipe)
        metrics.adapter_usage.count(adapters, exchange.prompt_token_count, exchange.output_token_count)
        metrics.lorax_validation.observe(exchange.started_s - started_s)
        metrics.lorax_inference.observe(now_s - exchange.started_s)
        metrics.lorax_token_seconds.observe((now_s - exchange.started_s) / max(1, exchange.output_token_count))
        metrics.lorax_budget.observe(exchange.opening.max_output_tokens)
        metrics.lorax_input.observe(exchange.prompt_token_count)
        metrics.lorax_output.observe(exchange.output_token_count)
        if exchange.first_token_s is not None:
            metrics.first_token_seconds.observe(exchange.first_token_s - started_s)
            if exchange.output_token_count > len(exchange.choices):
                steps = exchange.output_token_count / len(exchange.choices) - 1
                metrics.token_seconds.observe((now_s - exchange.first_token_s) / steps)
