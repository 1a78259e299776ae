"""Rows of W1 from several tables on one engine."""

QUICK = ("--device", "cpu", "--repeat", "1", "--skip-graphs", "--prompt-tokens", "8", "--new-tokens", "3")
ROOM = ("--adapter-bytes", str(64 << 20), "--host-bytes", str(32 << 20))


def test_tables_together_measure_a_row_of_two_once(rows_of):
    machine, *rows = rows_of("bench_workloads", *QUICK, *ROOM, "--table", "draws", "ranks")
    assert machine["row"] == "machine"
    found = [(row["draw"], row["rank"]) for row in rows]
    assert found == [(draw, "16") for draw in ("distinct", "uniform", "zipf", "identical")] + [
        ("round robin", rank) for rank in ("64", "16", "8", "mixed")
    ]
    again = rows_of("bench_workloads", *QUICK, *ROOM, "--table", "ranks", "ranks")[len(rows) + 1 :]
    assert [row["rank"] for row in again if row["row"] == "W1"] == ["64", "16", "8", "mixed"]


def test_draws_name_as_many_adapters_as_they_say(rows_of):
    rows = rows_of("bench_workloads", *QUICK, *ROOM, "--table", "draws")[1:]
    distinct = {row["draw"]: row["distinct_adapters"] for row in rows}
    assert distinct["distinct"] == 64
    assert distinct["identical"] == 1
    assert 1 < distinct["zipf"] < distinct["uniform"] < 64
