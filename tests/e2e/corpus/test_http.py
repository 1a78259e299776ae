"""Corpus B, 50, 51 and 54: bytes that no well-behaved client sends, bodies that hardly come, paths that pretend to be others.

A chunk's extension is passed over while it arrives, so an endless one ends with the time a body may take: 408.
"""

from __future__ import annotations

import concurrent.futures
import json
import socket

import pytest

from tests.api.test_raw_http import RAW

pytestmark = pytest.mark.e2e

BODY = json.dumps({"model": "good", "prompt": "hi", "max_tokens": 2}).encode()
LENGTH = len(BODY)


def head(stage, method="POST", path="/v1/completions", *lines, length=LENGTH):
    fixed = [
        f"{method} {path} HTTP/1.1",
        "Host: a",
        f"Authorization: Bearer {stage.keys['acme']}",
        "Content-Type: application/json",
    ]
    sized = [f"Content-Length: {length}"] if length is not None else []
    return "\r\n".join([*fixed, *sized, *lines, "", ""]).encode()


def talk(stage, data, timeout_s=20.0):
    """Send bytes and read until the node closes the connection."""
    answer = b""
    with socket.create_connection(stage.address, timeout=timeout_s) as connection:
        try:
            connection.sendall(data)
            while part := connection.recv(65536):
                answer += part
        except ConnectionError:
            pass
    return answer


@pytest.mark.parametrize("name", RAW)
def test_malformed_http_is_refused_and_the_connection_closed(stage, name):
    def once():
        with stage.watched():
            answer = talk(stage, RAW[name])
        assert answer == b"" or (answer.split()[1] in (b"400", b"431") and b'"code":"invalid_http"' in answer)

    once()
    stage.rounds.append(once)


HEADS = {
    "50 bare line feeds": lambda s: b"GET /v1/models HTTP/1.1\nHost: a\nAuthorization: Bearer %b\n\n" % s.keys["acme"].encode(),
    "50 ten thousand headers": lambda s: head(s, "GET", "/live", *[f"X-{i}: y" for i in range(10_000)], length=None),
    "50 header name with a space": lambda s: head(s, "GET", "/live", "X Y: z", length=None),
    "50 negative length": lambda s: head(s, length=-5) + BODY,
    "50 length of 2**70": lambda s: head(s, length=2**70) + BODY,
    "54 method that is none": lambda s: head(s, "BREW", "/v1/completions", length=None),
    "50 chunk extension of a megabyte": lambda s: (
        head(s, "POST", "/v1/completions", "Transfer-Encoding: chunked", length=None)
        + b"5;"
        + b"x" * (1 << 20)
        + b"\r\nhello\r\n"
    ),
    "50 trailers of a megabyte": lambda s: (
        head(s, "POST", "/v1/completions", "Transfer-Encoding: chunked", length=None)
        + b"0\r\nX: "
        + b"y" * (1 << 20)
        + b"\r\n\r\n"
    ),
}


@pytest.mark.parametrize("name", HEADS)
def test_request_head_that_should_not_be_is_refused_and_closed(stage, name):
    def once():
        with stage.watched():
            answer = talk(stage, HEADS[name](stage))
        assert answer == b"" or answer.split()[1] in (b"400", b"408", b"413", b"431"), answer[:200]

    once()
    stage.rounds.append(once)


def test_51_body_in_chunks_of_one_byte_is_read_in_good_time_and_within_its_limit(stage):
    """Three hundred thousand chunks: counted, parsed once, never joined again and again."""
    data = b'{"a": "' + b"x" * 300_000 + b'"}'
    sent = head(stage, "POST", "/v1/completions", "Transfer-Encoding: chunked", "Connection: close", length=None)
    sent += b"".join(b"1\r\n%c\r\n" % byte for byte in data) + b"0\r\n\r\n"
    with concurrent.futures.ThreadPoolExecutor(1) as pool, stage.watched(admitted=1):
        running = pool.submit(talk, stage, sent)
        assert stage.ask_golden() == stage.golden
        answer = running.result(60)
    assert answer.startswith(b"HTTP/1.1 400")


@pytest.mark.parametrize("kind", ["idle after the head", "a byte at a time"])
def test_51_slow_body_is_408_while_others_are_served(stage, kind):
    def trickle():
        with socket.create_connection(stage.address, timeout=20) as connection:
            connection.sendall(head(stage, "POST", "/v1/completions", "Connection: close"))
            connection.settimeout(0.3)
            answer, rest = b"", BODY
            while not answer:
                if kind != "idle after the head":
                    connection.sendall(rest[:1])
                    rest = rest[1:]
                try:
                    answer = connection.recv(65536)
                except TimeoutError:
                    continue
            return answer

    with concurrent.futures.ThreadPoolExecutor(1) as pool, stage.watched(admitted=1):
        running = pool.submit(trickle)
        assert stage.ask_golden() == stage.golden
        answer = running.result(30)
    assert answer.startswith(b"HTTP/1.1 408")
    assert b"body_timeout" in answer or b"Content-Length" in answer


PATHS = {
    "54 two slashes": ("POST", "//v1/completions", 404, "not_found"),
    "54 dot dot": ("POST", "/v1/../admin", 404, "not_found"),
    "54 dot dot after a route": ("POST", "/v1/completions/../../keys.list", 404, "not_found"),
    "54 encoded slash": ("POST", "/v1%2Fcompletions", 404, "not_found"),
    "54 encoded dots": ("GET", "/v1/%2e%2e/keys.list", 404, "not_found"),
    "54 operator's command": ("POST", "/keys.list", 404, "not_found"),
    "54 operator's other command": ("POST", "/epochs.close", 404, "not_found"),
    "54 unknown method": ("PURGE", "/v1/completions", 405, "method_not_allowed"),
    "54 wrong method": ("DELETE", "/v1/models", 405, "method_not_allowed"),
    "54 model that is a path": ("GET", "/v1/models/../../etc/passwd", 404, "model_not_found"),
    "54 receipt that is a path": ("GET", "/v1/receipts/..%2f..%2fledger.sqlite", 404, "receipt_not_found"),
}


@pytest.mark.parametrize("name", PATHS)
def test_path_trick_reaches_nothing(stage, name):
    method, path, status, code = PATHS[name]
    body = BODY if method == "POST" else None

    def send():
        answer = talk(stage, head(stage, method, path, "Connection: close", length=len(body) if body else None) + (body or b""))
        lines, _, content = answer.partition(b"\r\n\r\n")
        return type(stage.send("GET", "/live", tenant=None))(int(lines.split()[1]), {}, content)

    stage.refused(send, status, code)


@pytest.mark.parametrize("host", ["a.", "localhost.", "169.254.169.254", "admin"])
def test_54_host_of_the_request_opens_nothing(stage, host):
    with stage.watched():
        lines = (
            f"POST /keys.list HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {stage.keys['acme']}\r\nConnection: close\r\n\r\n"
        )
        answer = talk(stage, lines.encode())
    assert answer.startswith(b"HTTP/1.1 404")


def test_bytes_refused_again_cost_nothing(stage):
    stage.check_steady()
