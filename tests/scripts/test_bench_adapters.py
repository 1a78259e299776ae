"""Rows about adapter memory."""

LARGE = ("--rows", "zipf", "--rank", "8", "--large", "100", "--large-slots", "20", "--large-staged", "20")


def test_large_pool_draws_more_adapters_than_there_are_slots(rows_of):
    rows = rows_of("bench_adapters", *LARGE, "--requests", "40", "--turns", "2")
    turns = [row for row in rows if row["row"] == "zipf"]
    assert [row["adapters"] for row in turns] == [64, 100, 100, 64]
    assert all(row["slots"] == 20 for row in turns)
    assert turns[-1]["drawn_so_far"] > 20
    assert all(row["loads"] > 0 for row in turns), "every turn pushes adapters out"
    assert rows[-1]["row"] == "zipf ratio"
    assert rows[-1]["pairs"] == 1


def test_churn_loads_every_adapter_in_every_pass(rows_of):
    few = ("--rank", "8", "--adapters", "12", "--slots", "4", "--staged", "30", "--passes", "2")
    row = rows_of("bench_adapters", "--rows", "churn", *few)[-1]
    assert [found["loads"] >= 8 for found in row["passes"]] == [True, True]
