"""The events of one sequence, as its reader finds them."""

from __future__ import annotations

import pytest

from node.engine.messages import SequenceEvent
from node.engine.stream import SequenceStream
from node.request import DrawnToken


@pytest.fixture
def abandoned() -> list[str]:
    return []


@pytest.fixture
def stream(abandoned: list[str]) -> SequenceStream:
    return SequenceStream("s", "tenant", abandoned.append)


def event(*token_ids: int, **more: object) -> SequenceEvent:
    return SequenceEvent(sequence_id="s", tokens=tuple(DrawnToken(token_id) for token_id in token_ids), **more)


async def test_stream_read_in_time_gives_events_as_they_were(stream: SequenceStream) -> None:
    for sent in (event(1, cached_prompt_tokens=4), event(2), event(3, finish_reason="stop")):
        stream.put(sent)
        assert await anext(stream) == sent
    with pytest.raises(StopAsyncIteration):
        await anext(stream)


async def test_stream_read_late_joins_the_tokens_that_wait(stream: SequenceStream) -> None:
    for sent in (event(1, cached_prompt_tokens=4), event(2), event(3, 4, finish_reason="length")):
        stream.put(sent)
    assert [found async for found in stream] == [event(1, 2, 3, 4, cached_prompt_tokens=4, finish_reason="length")]


@pytest.mark.parametrize("reason", ["error", "cancelled"])
async def test_stream_read_late_keeps_a_bad_end_apart_from_the_tokens_before_it(stream: SequenceStream, reason: str) -> None:
    end = event(finish_reason=reason, error_code="engine_unavailable")
    for sent in (event(1), event(2), end):
        stream.put(sent)
    assert [found async for found in stream] == [event(1, 2), end]


async def test_stream_read_late_keeps_what_only_one_event_has(stream: SequenceStream) -> None:
    first = event(1, prompt_logprobs=(None, -1.0))
    for sent in (event(), first, event(2, finish_reason="stop")):
        stream.put(sent)
    assert [found async for found in stream] == [event(), event(1, 2, prompt_logprobs=(None, -1.0), finish_reason="stop")]


async def test_stream_closed_early_abandons_its_sequence_once(stream: SequenceStream, abandoned: list[str]) -> None:
    stream.put(event(1))
    await stream.aclose()
    await stream.aclose()
    assert abandoned == ["s"]
    with pytest.raises(StopAsyncIteration):
        await anext(stream)


async def test_stream_closed_after_its_end_abandons_nothing(stream: SequenceStream, abandoned: list[str]) -> None:
    stream.put(event(1, finish_reason="stop"))
    assert [found async for found in stream] == [event(1, finish_reason="stop")]
    await stream.aclose()
    assert abandoned == []
