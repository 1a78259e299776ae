import sqlite3

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import Table, create_engine, text
from sqlmodel import SQLModel

from node.errors import LedgerError
from node.settlement import intents, outbox_tables, tables
from node.settlement.ledger_database import DatabaseLock, make_engine, migrate, parse_url
from node.tenancy import tables as tenancy_tables

MODULES = (tables, intents, outbox_tables, tenancy_tables)


@pytest.fixture
def url(tmp_path):
    return parse_url(f"sqlite:///{tmp_path / 'ledger.sqlite'}")


def test_migrate_gives_exactly_the_tables_the_code_describes(url):
    described = {value.name for module in MODULES for value in vars(module).values() if isinstance(value, Table)}
    engine = make_engine(url)
    migrate(engine)

    with create_engine(url).connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": False})
        differences = compare_metadata(context, SQLModel.metadata)
        present = set(connection.execute(text("SELECT name FROM sqlite_master WHERE type = 'table'")).scalars())
    assert described <= present
    assert [item for item in differences if item[0] != "remove_table" or item[1].name in described] == []


def test_migrate_twice_changes_nothing(url):
    engine = make_engine(url)
    migrate(engine)
    migrate(engine)

    with engine.begin() as connection:
        assert connection.execute(text("SELECT count(*) FROM alembic_version")).scalar() == 1


def test_engine_is_durable_and_fails_on_a_second_writer(url):
    engine = make_engine(url, busy_timeout_ms=1)
    migrate(engine)
    with engine.begin() as connection:
        pragmas = [
            connection.execute(text(f"PRAGMA {name}")).scalar() for name in ("journal_mode", "synchronous", "foreign_keys")
        ]
        other = sqlite3.connect(url.database, timeout=0)
        with pytest.raises(sqlite3.OperationalError, match="locked"):
            other.execute("BEGIN IMMEDIATE")
    assert pragmas == ["wal", 2, 1]


def test_read_only_engine_refuses_to_write(url):
    migrate(make_engine(url))

    with (
        pytest.raises(Exception, match="readonly"),
        make_engine(url, read_only=True).begin() as connection,
    ):
        connection.execute(text("DELETE FROM ledger_meta"))


def test_lock_is_free_again_after_its_release(url):
    engine = make_engine(url)
    first = DatabaseLock(url, engine)
    with pytest.raises(LedgerError) as caught:
        DatabaseLock(url, engine)
    first.release()

    assert caught.value.error_code == "ledger_locked"
    DatabaseLock(url, engine).release()


def test_parse_url_plain_postgresql_means_psycopg():
    assert parse_url("postgresql://user:secret@db/ledger").drivername == "postgresql+psycopg"


@given(st.lists(st.integers(0, 2**256 - 1), min_size=2))
def test_wei_text_keeps_value_and_order(amounts):
    column = tables.Wei()
    texts = [column.process_bind_param(amount, None) for amount in amounts]

    assert [column.process_result_value(item, None) for item in texts] == amounts
    assert {len(item) for item in texts} == {tables.WEI_DIGITS}
    assert sorted(texts) == [column.process_bind_param(amount, None) for amount in sorted(amounts)]
