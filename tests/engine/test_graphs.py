"""Which batch sizes are recorded, and what is launched when nothing is."""

import pytest
import torch

from node.engine.device import choose_device, device_name
from node.engine.graphs import Adapted, GraphKey, StepGraphs, buckets_for
from node.errors import ConfigError


@pytest.mark.parametrize(("limit", "last"), [(1, 1), (3, 4), (16, 16), (17, 24), (256, 256), (257, 320), (400, 448)])
def test_last_bucket_holds_the_largest_batch(limit, last):
    buckets = buckets_for(limit)
    assert buckets[-1] == last
    assert list(buckets) == sorted(set(buckets))
    assert all(size < limit for size in buckets[:-1])


@pytest.mark.parametrize("rows", range(1, 17))
def test_bucket_is_the_smallest_that_holds_the_rows(rows):
    graphs = StepGraphs(lambda key: (torch.zeros(1),), buckets_for(16), is_recording=False)
    bucket = graphs.bucket(rows)
    assert bucket >= rows
    assert not any(rows <= other < bucket for other in graphs.buckets)


def test_without_recording_every_step_is_launched():
    launched = []
    graphs = StepGraphs(lambda key: launched.append(key) or (torch.zeros(1),), buckets_for(4), is_recording=False)
    for _ in range(3):
        graphs.step(GraphKey(4, Adapted.LAYERS))
    assert launched == [GraphKey(4, Adapted.LAYERS)] * 3


def test_device_of_a_machine_without_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto").type == choose_device("cpu").type == "cpu"
    assert device_name(choose_device("auto")) == "cpu"
    with pytest.raises(ConfigError, match="no NVIDIA GPU"):
        choose_device("cuda")


def test_gpu_older_than_supported_is_passed_over(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert choose_device("auto").type == "cpu"
    with pytest.raises(ConfigError, match=r"7\.5"):
        choose_device("cuda")
