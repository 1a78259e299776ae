"""The events of one sequence, as its reader finds them."""

from __future__ import annotations

import asyncio

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


async def reading(stream: SequenceStream) -> asyncio.Task[SequenceEvent]:
    """A reader that waits for the next event."""
    task = asyncio.ensure_future(anext(stream))
    await asyncio.sleep(0)
    return task


async def test_stream_with_a_taker_wakes_its_reader_only_for_the_end_that_both_get(stream: SequenceStream) -> None:
    taken: list[SequenceEvent] = []
    stream.hand_to(lambda event: not taken.append(event))
    reader = await reading(stream)
    for sent in (event(1), event(2), event(3, finish_reason="stop")):
        stream.put(sent)
    assert taken == [event(1), event(2), event(3, finish_reason="stop")]
    assert await reader == event(3, finish_reason="stop")


async def test_stream_joins_what_was_added_before_it_is_handed_over(stream: SequenceStream) -> None:
    taken: list[SequenceEvent] = []
    stream.hand_to(lambda event: not taken.append(event))
    reader = await reading(stream)
    stream.add(event(1))
    stream.add(event(2))
    stream.hand_over()
    assert taken == [event(1, 2)]
    reader.cancel()


async def test_stream_whose_taker_refuses_keeps_the_order(stream: SequenceStream) -> None:
    taken: list[SequenceEvent] = []
    stream.hand_to(lambda event: event.tokens[0].token_id == 1 and not taken.append(event))
    reader = await reading(stream)
    for sent in (event(1), event(2), event(1), event(4)):
        stream.put(sent)
    assert taken == [event(1)]
    assert await reader == event(2, 1, 4)


async def test_stream_whose_reader_is_busy_offers_nothing(stream: SequenceStream) -> None:
    stream.hand_to(lambda event: pytest.fail("offered"))
    stream.put(event(1))
    assert await anext(stream) == event(1)
    stream.put(event(2))
    assert await anext(stream) == event(2)


async def test_stream_raises_to_its_reader_what_its_taker_raises(stream: SequenceStream) -> None:
    def take(_: SequenceEvent) -> bool:
        raise ValueError("a defect")

    stream.hand_to(take)
    reader = await reading(stream)
    stream.put(event(1))
    with pytest.raises(ValueError, match="a defect"):
        await reader


async def test_stream_closed_by_another_task_ends_its_reader(stream: SequenceStream) -> None:
    reader = await reading(stream)
    await stream.aclose()
    with pytest.raises(StopAsyncIteration):
        await reader
