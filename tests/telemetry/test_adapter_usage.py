"""Counts of each adapter: by public name, bounded, and never of one that has none."""

from __future__ import annotations

import node.telemetry.adapter_usage as module
from node.telemetry.adapter_usage import OTHERS, AdapterUsage, Usage


def test_each_adapter_of_a_request_counts_it_whole():
    usage = AdapterUsage()
    usage.count(["a", "b"], 3, 5)
    usage.count(["a"], 1, 2)
    usage.count([], 9, 9)

    assert usage.shown({"a": "poet", "b": "bard"}) == {"poet": Usage(2, 4, 7), "bard": Usage(1, 3, 5)}


def test_two_contents_under_one_name_are_one_row():
    usage = AdapterUsage()
    usage.count(["old"], 1, 1)
    usage.count(["new"], 2, 2)

    assert usage.shown({"old": "poet", "new": "poet"}) == {"poet": Usage(2, 3, 3)}


def test_what_has_no_public_name_is_counted_without_one():
    usage = AdapterUsage()
    usage.count(["secret"], 3, 5)
    usage.count(["a"], 1, 1)

    assert usage.shown({"a": "poet"}) == {"poet": Usage(1, 1, 1), OTHERS: Usage(1, 3, 5)}


def test_series_and_counts_are_bounded_and_nothing_is_lost(monkeypatch):
    monkeypatch.setattr(module, "SHOWN", 2)
    monkeypatch.setattr(module, "COUNTED", 3)
    usage, ids = AdapterUsage(), [f"id-{index}" for index in range(6)]
    for adapter_id in ids:
        usage.count([adapter_id], 1, 1)

    shown = usage.shown({adapter_id: adapter_id for adapter_id in ids})

    assert list(shown) == ["id-0", "id-1", OTHERS]
    assert shown[OTHERS] == Usage(4, 4, 4)
    assert usage.shown({adapter_id: adapter_id for adapter_id in ids}) == shown  # asking changes nothing
