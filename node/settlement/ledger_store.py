"""The ledger's database under lock, and the one writer on it. Opened by the node's ledger process, or by tests and benchmarks in
their own."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Collection
from dataclasses import dataclass

from sqlalchemy import Connection, Engine, insert, select
from sqlalchemy.exc import SQLAlchemyError

from attribution.receipt import receipt_domain
from attribution.signing import Signer
from node.errors import LedgerError
from node.settlement.ledger_database import DatabaseLock, explain, make_engine, migrate, parse_url
from node.settlement.ledger_writer import HEALED_KEY, LedgerWriter
from node.settlement.tables import META

TENANT_SALT_KEY = "tenant_salt"


@dataclass(frozen=True, slots=True)
class WriterOptions:
    """How the writer works.

    Attributes:
        group_commit_ms: Between the beginnings of two commits; what comes meanwhile shares the second.
        queue_limit: Pieces of work that may wait for the writer.
        busy_timeout_ms: How long a commit waits for another process on the same SQLite file.
        retry_s: Pause between attempts while the database does not commit.
    """

    group_commit_ms: float = 2.0
    queue_limit: int = 8192
    busy_timeout_ms: int = 5000
    retry_s: float = 1.0


@dataclass(frozen=True, slots=True)
class LedgerStore:
    """An open ledger. Everything here blocks.

    Attributes:
        engine: For short transactions beside the writer's.
        interrupted: How many requests an earlier crash had left open.
    """

    engine: Engine
    writer: LedgerWriter
    tenant_salt: bytes
    interrupted: int
    lock: DatabaseLock

    @classmethod
    def open(
        cls,
        url: str,
        options: WriterOptions,
        *,
        signer: Signer,
        chain_id: int,
        clock_ms: Callable[[], int],
        settled: Callable[[], None] = lambda: None,
        lost: Collection[str] | None = None,
    ) -> LedgerStore:
        """Lock, migrate and load the ledger, close what a crash left open, and start the writer.

        Args:
            settled: Called by the writer's thread after each group of work.
            lost: See `LedgerWriter.load`.

        Raises:
            LedgerError: ledger_locked, ledger_schema_newer, ledger_corrupt, or ledger_unavailable with the reason.
        """
        parsed = parse_url(url)
        engine = make_engine(parsed, busy_timeout_ms=options.busy_timeout_ms)
        lock: DatabaseLock | None = None
        try:
            lock = DatabaseLock(parsed, engine)
            migrate(engine)
            with engine.begin() as connection:
                salt = _single_values(connection, clock_ms())
            writer = LedgerWriter(
                engine,
                clock_ms=clock_ms,
                signer=signer,
                domain=receipt_domain(chain_id),
                group_commit_ms=options.group_commit_ms,
                retry_s=options.retry_s,
                queue_limit=options.queue_limit,
                explain=lambda error: explain(error, parsed),
                settled=settled,
            )
            interrupted = writer.load(lost)
        except (SQLAlchemyError, OSError, LedgerError) as error:
            engine.dispose()
            if lock is not None:
                lock.release()
            raise error if isinstance(error, LedgerError) else explain(error, parsed) from error
        writer.start()
        return cls(engine, writer, salt, interrupted, lock)

    def close(self) -> None:
        """Commit what waits, then let go of the database."""
        self.writer.stop()
        self.engine.dispose()
        self.lock.release()


def _single_values(connection: Connection, now_ms: int) -> bytes:
    """Make the ledger's single values at first open; the tenant salt."""
    known = {row.key: row.value for row in connection.execute(select(META))}
    for key, value in ((TENANT_SALT_KEY, secrets.token_hex(32)), (HEALED_KEY, str(now_ms))):
        if key not in known:
            connection.execute(insert(META).values(key=key, value=value))
            known[key] = value
    return bytes.fromhex(known[TENANT_SALT_KEY])
