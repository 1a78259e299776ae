"""Whether this node can serve, proved by having served: ready means that the engine made a token."""

from __future__ import annotations

import asyncio

from node.api.doors import Books, Engine
from node.api.gate import Gate
from node.engine.messages import Submit
from node.errors import EngineError, LedgerError, NodeError, OverloadedError
from node.request import Sampling

_PROBE_TENANT = "openlora-readiness"  # not a request: it is never admitted, recorded or paid


class Readiness:
    """Answers health checks.

    Args:
        probe_token_id: Any token of the vocabulary; the one-token prompt of the proof.
        timeout_s: Longest wait for the proof's token.
    """

    def __init__(self, engine: Engine, books: Books, gate: Gate, probe_token_id: int, timeout_s: float = 30.0) -> None:
        self._engine = engine
        self._books = books
        self._gate = gate
        self._probe_token_id = probe_token_id
        self._timeout_s = timeout_s
        self._is_proved = False
        self._probe_count = 0
        self._lock = asyncio.Lock()

    async def check(self) -> None:
        """Return when the node is ready.

        Raises:
            NodeError: What is missing: engine, proof, ledger, or the node is draining.
        """
        fault = self._fault()
        if fault is not None:
            raise fault
        async with self._lock:
            if not self._is_proved:
                await self._prove()

    def _fault(self) -> NodeError | None:
        if not self._engine.is_alive:
            self._is_proved = False  # the next process has to prove itself again
            return EngineError("unhealthy: the engine process is down or restarting", retry_after_s=5.0)
        if not self._books.is_healthy:
            return LedgerError("unhealthy: the ledger does not accept records now", retry_after_s=5.0)
        if self._gate.is_draining:
            return OverloadedError("unhealthy: the node is shutting down", code="draining", retry_after_s=5.0)
        return None

    async def _prove(self) -> None:
        self._probe_count += 1
        submit = Submit(
            sequence_id=f"readiness.{self._probe_count}",
            tenant=_PROBE_TENANT,
            prompt_ids=(self._probe_token_id,),
            terms=(),
            sampling=Sampling(max_new_tokens=1),
        )
        try:
            async with asyncio.timeout(self._timeout_s):
                async for event in self._engine.submit(submit):
                    self._is_proved = self._is_proved or bool(event.tokens)
        except TimeoutError as error:
            self._engine.cancel(submit.sequence_id)
            raise EngineError("unhealthy: the engine made no token in time", retry_after_s=5.0) from error
        if not self._is_proved:
            raise EngineError("unhealthy: the engine made no token", retry_after_s=5.0)
