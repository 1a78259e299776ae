"""Opening the ledger's database: one node at a time, migrated, and with every failure explained."""

from __future__ import annotations

import fcntl
import os
import sqlite3
from pathlib import Path
from typing import Any, TextIO

from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import URL, Connection, Engine, create_engine, event, make_url, text
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError
from sqlalchemy.pool import NullPool

from node.errors import LedgerError

MIGRATIONS = Path(__file__).parent / "migrations"
_ADVISORY_KEY = 0x6F6C6564  # "oled": one writer for each PostgreSQL database


class DatabaseLock:
    """Held by the one node that writes a ledger. The operating system or the server lets go of it when the process dies."""

    def __init__(self, url: URL, engine: Engine) -> None:
        self._file: TextIO | None = None
        self._session: Connection | None = None
        if url.get_backend_name() == "sqlite":
            self._file = _lock_file(Path(f"{url.database}.lock"))
        else:
            self._session = engine.connect()
            if not self._session.execute(text("SELECT pg_try_advisory_lock(:key)"), {"key": _ADVISORY_KEY}).scalar():
                self._session.close()
                raise _locked(url.render_as_string(hide_password=True))
            self._session.commit()

    def release(self) -> None:
        """Let another node open the ledger."""
        if self._file is not None:
            self._file.close()
        if self._session is not None:
            self._session.close()


def parse_url(url: str) -> URL:
    """Check a ledger URL.

    Raises:
        LedgerError: Not a URL, another database, no file name, or a path that cannot hold a database.
    """
    try:
        parsed = make_url(url)
    except ArgumentError as error:
        raise LedgerError(
            "ledger.url is not a database URL; write sqlite:///PATH or postgresql+psycopg://HOST/NAME", code="ledger_url"
        ) from error
    backend = parsed.get_backend_name()
    if backend == "sqlite":
        _check_path(parsed.database)
    elif backend != "postgresql":
        raise LedgerError(f"ledger.url names {backend}; the ledger runs on sqlite and postgresql", code="ledger_url")
    elif parsed.drivername == "postgresql":
        parsed = parsed.set(drivername="postgresql+psycopg")
    return parsed


def make_engine(url: URL, *, busy_timeout_ms: int = 5000, read_only: bool = False) -> Engine:
    """An engine whose every transaction is durable when it has committed (SQLite: WAL, synchronous=FULL).

    Args:
        url: From `parse_url`.
        busy_timeout_ms: How long a transaction waits for another process's lock.
        read_only: Refuse writes; transactions then do not take the write lock.

    Raises:
        LedgerError: The PostgreSQL driver is not installed.
    """
    try:
        if url.get_backend_name() != "sqlite":
            return create_engine(url, isolation_level="SERIALIZABLE", pool_pre_ping=True)
        engine = create_engine(url, poolclass=NullPool)
    except (NoSuchModuleError, ModuleNotFoundError) as error:
        raise LedgerError("the PostgreSQL driver is not installed; install openlora-node[postgres]") from error
    _tune_sqlite(engine, busy_timeout_ms, read_only)
    return engine


def migrate(engine: Engine) -> None:
    """Bring the schema up to this version, in one transaction.

    Raises:
        LedgerError: ledger_schema_newer when a later version of the node wrote it; ledger_corrupt when it is no database.
    """
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    known = {script.revision for script in ScriptDirectory.from_config(config).walk_revisions()}
    with engine.begin() as connection:
        for revision in MigrationContext.configure(connection).get_current_heads():
            if revision not in known:
                raise LedgerError(
                    f"the ledger has schema {revision}; this node knows up to {max(known)}. Run the newer node",
                    code="ledger_schema_newer",
                )
        config.attributes["connection"] = connection
        command.upgrade(config, "head")


def explain(error: BaseException, url: URL) -> LedgerError:
    """What a database's refusal means for the operator. The library's own words stay out of it."""
    where = url.render_as_string(hide_password=True)
    cause = error.orig if isinstance(error, DBAPIError) else error
    number = getattr(cause, "sqlite_errorcode", None)
    primary = number & 0xFF if isinstance(number, int) else None
    if primary in (sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT):
        return LedgerError(f"{where} is damaged or not a ledger; restore a backup", code="ledger_corrupt")
    if primary in (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM):
        return LedgerError(f"{where} cannot be written; check owner and permissions of the file and its directory")
    if primary == sqlite3.SQLITE_FULL:
        return LedgerError(f"the disk under {where} is full; free some space", retry_after_s=30.0)
    return LedgerError(f"the ledger at {where} does not commit; the node serves again once it does", retry_after_s=5.0)


def _tune_sqlite(engine: Engine, busy_timeout_ms: int, read_only: bool) -> None:
    @event.listens_for(engine, "connect")
    def _connected(connection: Any, _: Any) -> None:
        connection.isolation_level = None  # the driver would begin transactions on its own, and too late
        connection.execute(f"PRAGMA busy_timeout = {busy_timeout_ms:d}")
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("PRAGMA foreign_keys = ON")
        if read_only:
            connection.execute("PRAGMA query_only = ON")

    @event.listens_for(engine, "begin")
    def _begun(connection: Connection) -> None:
        # A write transaction that starts as a reader can fail half-way with SQLITE_BUSY_SNAPSHOT.
        connection.exec_driver_sql("BEGIN" if read_only else "BEGIN IMMEDIATE")


def _check_path(name: str | None) -> None:
    if not name or name == ":memory:":
        raise LedgerError("ledger.url names no file; a ledger must survive the process, write sqlite:///PATH", code="ledger_url")
    path = Path(name)
    if path.is_dir():
        raise LedgerError(
            f"the ledger path {path} is a directory; name a file in it, such as {path / 'ledger.sqlite'}", code="ledger_path"
        )
    if not path.parent.is_dir():
        raise LedgerError(
            f"the ledger's directory {path.parent} does not exist; create it or change ledger.url", code="ledger_path"
        )
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise LedgerError(f"the ledger {path} cannot be written; check its owner and permissions", code="ledger_path")


def _lock_file(path: Path) -> TextIO:
    try:
        file = path.open("a+", encoding="ascii")
    except OSError as error:
        raise LedgerError(
            f"the lock file {path} cannot be written; check owner and permissions of its directory", code="ledger_path"
        ) from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        raise _locked(str(path)) from error
    return file


def _locked(where: str) -> LedgerError:
    return LedgerError(
        f"another node writes this ledger ({where}); stop it, or give this one its own data directory", code="ledger_locked"
    )
