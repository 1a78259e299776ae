"""Corpus A, 23 to 29: sources that are forbidden, lie, stall, refuse, change or come in a storm.

24, DNS rebinding: a host is looked up once for every connection and its addresses are checked then
(tests/adapters/test_stores.py has the resolver for it); from outside, an https store on a loopback address stands for a
name with a private address. 25: the cache's limit stands before a source's, so a file that cannot fit is cache_full.
28: here the cache's own limit; test_full_disk.py has a disk.
"""

from __future__ import annotations

import concurrent.futures
import hashlib
import time

import pytest

from tests.adapters.conftest import encode_file
from tests.adapters.test_stores import WEIGHTS, reply

pytestmark = pytest.mark.e2e

FORBIDDEN = {
    "23 link-local": "http://169.254.169.254/latest/meta-data",
    "23 loopback 6": "http://[::1]/a",
    "23 hexadecimal": "http://0x7f.1/a",
    "23 one number": "http://2130706433/a",
    "23 user": "http://user@localhost/a",
    "23 file": "file:///etc/passwd",
    "23 ftp": "ftp://localhost/a",
    "23 foreign bucket": "s3://other/a",
}
HUB_STATUSES = {
    "26 gated": (401, 403, "adapter_gated"),
    "26 forbidden": (403, 403, "adapter_gated"),
    "26 absent": (404, 404, "model_not_found"),
    "26 too many": (429, 503, "source_unavailable"),
    "26 broken": (500, 503, "source_unavailable"),
}


def location(stage, name):
    return f"http://{stage.web.host}/team/{name}"


def publish(stage, name):
    stage.web.publish(f"team/{name}", stage.far.write(name))
    return location(stage, name)


def answer_weights(stage, answer):
    """Let `answer(handler, body)` give the weights, once they are fetched as a whole."""

    def behave(handler, path, body):
        if not path.endswith(WEIGHTS) or handler.headers.get("Range") is not None:
            return False
        answer(handler, body)
        return True

    stage.web.behave = behave


def tag(body):
    return {"ETag": f'"{hashlib.sha256(body).hexdigest()}"'}


@pytest.mark.parametrize("name", FORBIDDEN)
def test_location_outside_the_stores_is_403_and_nobody_is_asked(stage, name):
    asked = len(stage.web.requests)
    stage.refused(lambda: stage.complete(FORBIDDEN[name]), 403, "source_forbidden")
    assert len(stage.web.requests) == asked


def test_24_redirect_is_never_followed(stage):
    where = publish(stage, "moved")

    def send():
        stage.web.behave = lambda handler, path, body: reply(handler, 302, b"", {"Location": "http://169.254.169.254/"}) or True
        return stage.complete(where)

    stage.refused(send, 403, "source_forbidden")


def test_24_host_with_a_private_address_is_not_connected_to(stage):
    asked = len(stage.web.requests)
    stage.refused(lambda: stage.complete(f"https://localhost:{stage.web.server.server_port}/a"), 403, "source_forbidden")
    assert len(stage.web.requests) == asked


LIES = {
    "25 more than announced": lambda handler, body: reply(handler, 200, body + b"x" * 4096, tag(body)),
    "25 compressed": lambda handler, body: reply(handler, 200, body, tag(body) | {"Content-Encoding": "gzip"}),
}


@pytest.mark.parametrize("name", LIES)
def test_source_that_does_not_keep_its_word_is_504(stage, name):
    where = publish(stage, name.replace(" ", "-"))

    def send():
        answer_weights(stage, LIES[name])
        return stage.complete(where)

    stage.refused(send, 504, "source_limit")
    assert not partial_files(stage, name.replace(" ", "-"))


def test_25_source_that_ends_early_is_503_and_goes_on_later(stage):
    where = publish(stage, "early")
    answer_weights(stage, lambda handler, body: reply(handler, 200, body[:100], tag(body) | {"Content-Length": str(len(body))}))
    with stage.watched():
        answer = stage.complete(where)
    assert (answer.status, answer.code) == (503, "source_unavailable")
    assert int(answer.headers["retry-after"]) >= 1
    stage.web.behave = None
    with stage.watched(admitted=1):
        assert stage.complete(where).status == 200


def test_25_source_of_a_byte_a_second_is_504_while_others_are_served(stage):
    where = publish(stage, "slow")

    def trickle(handler, body):
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(body)))
        handler.send_header("ETag", tag(body)["ETag"])
        handler.end_headers()
        try:
            for index in range(6):
                handler.wfile.write(body[index : index + 1])
                handler.wfile.flush()
                time.sleep(1)
        except OSError:
            pass
        handler.close_connection = True

    answer_weights(stage, trickle)
    with concurrent.futures.ThreadPoolExecutor(1) as pool, stage.watched(admitted=1):
        slow = pool.submit(stage.complete, where)
        assert stage.ask_golden() == stage.golden
        answer = slow.result(30)
        stage.web.behave = None
        assert (answer.status, answer.code) == (504, "source_limit")


@pytest.mark.parametrize("name", HUB_STATUSES)
def test_hub_that_refuses_is_said_by_name_without_the_token(stage, name):
    status, expected, code = HUB_STATUSES[name]

    def send():
        stage.hub.status = status
        answer = stage.complete("owner/name", api_token="hf_secret_token")
        stage.hub.status = None
        return answer

    answer = stage.refused(send, expected, code)
    assert b"hf_secret" not in answer.raw
    assert expected != 503 or int(answer.headers["retry-after"]) == 7


def test_26_gated_repository_opens_with_its_token_alone(stage):
    stage.hub.publish("owner/gated", stage.far.write("gated"), token="hf_right")
    stage.refused(lambda: stage.complete("owner/gated"), 403, "adapter_gated")
    stage.refused(lambda: stage.complete("owner/gated", api_token="hf_wrong"), 403, "adapter_gated")
    with stage.watched(admitted=1):
        assert stage.complete("owner/gated", api_token="hf_right").status == 200
    stage.refused(lambda: stage.complete("owner/gated"), 403, "adapter_gated")


def test_27_files_that_change_under_their_commit_are_409(stage):
    stage.hub.publish("owner/pinned", stage.far.write("pinned"))
    with stage.watched(admitted=1):
        assert stage.complete("owner/pinned").status == 200
    config = next((stage.node.data_dir / "adapters").rglob("owner*pinned*/*/adapter_config.json"))
    changed = config.read_text().replace('"lora_alpha": 4', '"lora_alpha": 9')
    config.unlink()
    config.write_text(changed)
    stage.refused(lambda: stage.complete("owner/pinned"), 409, "adapter_digest_mismatch")


def test_28_adapter_that_does_not_fit_the_cache_is_507_and_others_go_on(stage):
    tensors = stage.far.tensors()
    stage.hub.publish("owner/large", stage.far.write("large"))
    stage.hub.repositories["owner/large"][2][WEIGHTS] = padded(encode_file(tensors), 200_000)
    stage.refused(lambda: stage.complete("owner/large"), 507, "cache_full")
    assert not partial_files(stage, "large")


def padded(file, count):
    length = int.from_bytes(file[:8], "little")
    return (length + count).to_bytes(8, "little") + file[8 : 8 + length] + b" " * count + file[8 + length :]


def partial_files(stage, name):
    return list((stage.node.data_dir / "adapters").rglob(f"*{name}*/.part-*/{WEIGHTS}"))


def test_29_storm_of_unknown_adapters_is_429_beyond_the_queue_and_the_hot_one_is_served(stage):
    stage.web.behave = None
    slow = stage.hub.answer
    stage.hub.answer = lambda handler: (time.sleep(0.3), slow(handler))
    try:
        with concurrent.futures.ThreadPoolExecutor(64) as pool, stage.watched(admitted=3):
            storm = [pool.submit(stage.complete, f"storm/a{index}") for index in range(300)]
            for _ in range(3):
                assert stage.ask_golden() == stage.golden
            answers = [future.result(60) for future in storm]
    finally:
        stage.hub.answer = slow
    seen = {(answer.status, answer.code) for answer in answers}
    assert seen == {(404, "model_not_found"), (429, "adapter_queue_full")}
    assert all(int(answer.headers["retry-after"]) >= 1 for answer in answers if answer.status == 429)


def test_sources_that_misbehave_again_cost_nothing(stage):
    stage.check_steady()
