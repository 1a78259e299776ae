"""Log lines: machine-readable, at the level asked for, without secrets or texts."""

from __future__ import annotations

import io
import json
import logging

from node.telemetry.logs import make_logger, passing_on


def test_json_lines_carry_time_level_event_and_fields():
    stream = io.StringIO()
    make_logger("info", "json", stream).info("request", route="/v1/models", status=200)
    line = json.loads(stream.getvalue())
    assert (line["event"], line["level"], line["route"], line["status"]) == ("request", "info", "/v1/models", 200)
    assert line["ts"].endswith("Z")


def test_lines_below_the_level_are_left_out():
    stream = io.StringIO()
    logger = make_logger("warning", "json", stream)
    logger.info("quiet")
    logger.warning("loud")
    assert [json.loads(line)["event"] for line in stream.getvalue().splitlines()] == ["loud"]


def test_secrets_and_texts_are_replaced():
    stream = io.StringIO()
    make_logger("info", "json", stream).info("x", api_token="hf_secret", hub_token="hf_other", prompt="my diary", messages=[1, 2])
    text = stream.getvalue()
    assert "secret" not in text
    assert "other" not in text
    assert "diary" not in text
    assert json.loads(text)["messages"] == "[2 items]"


def test_console_form_is_no_json():
    stream = io.StringIO()
    make_logger("info", "console", stream).info("started", port=8080)
    assert "port" in stream.getvalue()
    assert not stream.getvalue().startswith("{")


def test_what_modules_say_is_passed_on_at_its_level_while_the_block_runs():
    stream = io.StringIO()
    source = logging.getLogger("node.engine.process")
    with passing_on(make_logger("info", "json", stream)):
        source.info("start: %s", "memory opened")
        source.warning("the kernels are not built")
        logging.getLogger("somebody.else").warning("not ours")
    source.warning("after")
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [(line["level"], line["event"]) for line in lines] == [
        ("info", "start: memory opened"),
        ("warning", "the kernels are not built"),
    ]
    assert {line["source"] for line in lines} == {"node.engine.process"}
    assert not logging.getLogger("node").handlers


def test_stderr_that_is_closed_does_not_end_whoever_says_something(monkeypatch):
    monkeypatch.setattr(logging, "raiseExceptions", False)
    stream = io.StringIO()
    with passing_on(make_logger("info", "json", stream)):
        stream.close()
        logging.getLogger("node.engine.process").warning("nobody hears it")
