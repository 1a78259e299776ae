"""A receipt for every answer, checked by the command in a process that knows nothing but the file and whom to trust."""

from __future__ import annotations

import copy
import json
import os
import subprocess

import pytest

from attribution import receipt
from attribution.errors import RecordError

pytestmark = pytest.mark.e2e

PROMPT = "Fellow citizens, the state of our Union is"
STRANGER = "0x00000000000000000000000000000000000000A1"
LONG = {"inputs": PROMPT, "parameters": {"max_new_tokens": 200, "adapter_id": "lincoln", "adapter_source": "local"}}


@pytest.fixture(scope="module")
def answer(node):
    return node.post("/v1/completions", {"model": "lincoln", "prompt": PROMPT, "max_tokens": 8, "temperature": 0})


@pytest.fixture
def verify(kit, tmp_path):
    """`receipts verify` on a bundle: in a directory of its own, with no data directory, node or network setting."""

    def run(bundle, *options):
        file = tmp_path / "receipt.json"
        file.write_text(json.dumps(bundle))
        environment = kit.environment(HOME=str(tmp_path), XDG_DATA_HOME=str(tmp_path), http_proxy="http://127.0.0.1:9")
        command = [*kit.command, "receipts", "verify", str(file), *options]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path, env=environment, check=False)

    return run


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"model": "reagan", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3}),
        ("/v1/completions", {"model": "roosevelt", "prompt": ["Once", "Twice"], "n": 2, "max_tokens": 3}),
        (
            "/generate",
            {"inputs": "Once", "parameters": {"max_new_tokens": 3, "adapter_id": "lincoln", "adapter_source": "local"}},
        ),
    ],
)
def test_every_answer_carries_the_receipt_that_the_node_gives_later(node, path, body):
    answer = node.post(path, body)
    request_id = answer.headers["x-openlora-receipt"]
    assert answer.body["openlora"]["request_id"] == request_id
    assert node.get(f"/v1/receipts/{request_id}").body == answer.bundle
    verified = receipt.verify(answer.bundle, [node.operator])
    assert verified.record.status == "ok"
    assert sum(int(line.amount_wei) for line in verified.record.split) == int(verified.record.fee_wei) > 0


@pytest.mark.parametrize("path", ["/v1/completions", "/generate_stream"])
def test_every_stream_ends_with_its_receipt(node, path):
    openai_body = {"model": "lincoln", "prompt": "Once", "max_tokens": 3, "stream": True}
    body = openai_body if path.startswith("/v1") else {"inputs": "Once", "parameters": {"max_new_tokens": 3}}
    with node.stream(path, body) as stream:
        events = list(stream)
    bundles = [event["openlora"]["receipt"] for event in events if "openlora" in event]
    assert bundles == [events[-1]["openlora"]["receipt"]]
    request_id = {name.lower(): value for name, value in stream.headers.items()}["x-openlora-receipt"]
    assert receipt.verify(bundles[0], [node.operator]).record.request_id == request_id


def test_records_of_a_node_form_one_chain(node):
    body = {"prompt": "Once", "max_tokens": 1, "model": "lincoln"}
    first, second = (node.post("/v1/completions", body).bundle["record"] for _ in range(2))
    assert second["sequence"] == first["sequence"] + 1
    assert "0x" + second["previous_hash"] == node.get(f"/v1/receipts/{first['request_id']}").body["receipt"]["recordHash"]


def test_verify_accepts_the_operator_and_prints_fee_and_split(node, answer, verify):
    done = verify(answer.bundle, "--operator", node.operator)
    assert done.returncode == 0, done.stderr
    assert f"ok: signed by {node.operator}" in done.stdout
    assert f"fee       {answer.fee_wei} wei" in done.stdout
    assert done.stdout.count(" wei\n") == 1 + len(answer.bundle["record"]["split"])


def test_verify_trusts_the_addresses_of_a_trust_file(node, answer, verify, tmp_path):
    trust = tmp_path / "trusted"
    trust.write_text(f"# operators we know\n{STRANGER}\n\n{node.operator}  # ours\n")
    assert verify(answer.bundle, "--trust", str(trust)).returncode == 0
    trust.write_text(f"{STRANGER}\n")
    assert verify(answer.bundle, "--trust", str(trust)).returncode == 65


def test_verify_compares_the_shares_with_the_manifest(node, answer, verify):
    manifests = {name: f"config/demo/adapters/{name}/manifest.json" for name in ("lincoln", "reagan")}
    root = os.path.dirname(os.path.dirname(os.path.dirname(__file__)))
    for path in manifests.values():
        done = verify(answer.bundle, "--operator", node.operator, "--manifest", os.path.join(root, path))
        assert done.returncode == 0, done.stderr


def test_verify_without_anyone_to_trust_says_unauthenticated(answer, verify):
    done = verify(answer.bundle)
    assert done.returncode == 77
    assert "unauthenticated" in done.stderr
    assert "ok:" not in done.stdout


def test_verify_fails_for_any_other_signer(answer, verify):
    done = verify(answer.bundle, "--operator", STRANGER)
    assert done.returncode == 65
    assert "not trusted" in done.stderr


def _set(path, value):
    def change(bundle):
        inner = bundle
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = value(inner[path[-1]])

    return change


def _flip(text):
    return text[:-1] + ("0" if text[-1] != "0" else "1")


CHANGES = {
    "a byte of the signature": _set(["signature"], lambda text: text[:20] + _flip(text[20:21]) + text[21:]),
    "the fee in the receipt": _set(["receipt", "feeWei"], lambda fee: str(int(fee) + 1)),
    "the fee in the record": _set(["record", "fee_wei"], lambda fee: str(int(fee) + 1)),
    "an amount of the split": _set(["record", "split", 0, "amount_wei"], lambda wei: str(int(wei) - 1)),
    "an adapter's share": _set(["record", "recipe", "adapters", 0, "share_ppm"], lambda ppm: ppm - 1),
    "an adapter's hash": _set(["record", "recipe", "adapters", 0, "adapter_id"], _flip),
    "the token count": _set(["record", "tokens", "output"], lambda count: count + 1),
    "the output digest": _set(["record", "output_digest"], _flip),
    "the base model": _set(["record", "base_id"], _flip),
    "the price": _set(["record", "price", "output_token_wei"], lambda wei: str(int(wei) * 2)),
    "the finish time": _set(["record", "finished_ms"], lambda ms: ms + 1),
    "the signer's name": _set(["signer"], lambda _: STRANGER),
    "the chain": _set(["chain_id"], lambda chain_id: chain_id + 1),
    "the record before it": _set(["record", "previous_hash"], _flip),
}


@pytest.mark.parametrize("what", ["the fee in the record", "a byte of the signature"])
def test_verify_command_fails_when_something_was_changed(node, answer, verify, what):
    changed = copy.deepcopy(answer.bundle)
    CHANGES[what](changed)
    done = verify(changed, "--operator", node.operator)
    assert done.returncode == 65
    assert "receipt_invalid" in done.stderr


@pytest.mark.parametrize("what", CHANGES)
def test_verification_fails_for_every_change(node, answer, what):
    changed = copy.deepcopy(answer.bundle)
    CHANGES[what](changed)
    assert changed != answer.bundle
    with pytest.raises((RecordError, receipt.SignatureError)):
        receipt.verify(changed, [node.operator, STRANGER])


def test_receipt_is_about_the_tokens_of_the_answer_and_no_others(node):
    parameters = {"max_new_tokens": 6, "details": True, "decoder_input_details": True}
    answer = node.post("/generate", {"inputs": PROMPT, "parameters": parameters})
    details = answer.body["details"]
    prompt = [token["id"] for token in details["prefill"]]
    output = [token["id"] for token in details["tokens"]]
    receipt.verify_tokens(answer.bundle, [prompt], [output])
    with pytest.raises(RecordError):
        receipt.verify_tokens(answer.bundle, [prompt], [[*output[:-1], output[-1] + 1]])
    with pytest.raises(RecordError):
        receipt.verify_tokens(answer.bundle, [prompt[1:]], [output])


def test_stream_that_the_client_leaves_is_recorded_as_cancelled_with_what_was_delivered(node):
    with node.stream("/generate_stream", LONG) as stream:
        whole = [event["token"]["id"] for event in stream]
    with node.stream("/generate_stream", LONG) as stream:
        seen = [event["token"]["id"] for event, _ in zip(stream, range(3), strict=False)]
        request_id = {name.lower(): value for name, value in stream.headers.items()}["x-openlora-receipt"]
    bundle = node.receipt(request_id)
    record = receipt.verify(bundle, [node.operator]).record
    assert record.status == "cancelled"
    assert len(seen) <= record.tokens.output < len(whole)
    assert whole[: len(seen)] == seen
    prompt = [token["id"] for token in node.post("/tokenize", {"inputs": PROMPT}).body]
    receipt.verify_tokens(bundle, [prompt], [whole[: record.tokens.output]])
    price = record.price
    assert int(record.fee_wei) == len(prompt) * int(price.input_token_wei) + record.tokens.output * int(price.output_token_wei)


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/v1/completions", {"model": "no-such-model", "prompt": "x"}, 404),
        ("/v1/completions", {"model": "lincoln", "prompt": "x", "max_tokens": -1}, 400),
        ("/generate", {"inputs": "x", "parameters": {"adapter_id": "nobody/nothing", "adapter_source": "local"}}, 424),
    ],
)
def test_refused_request_has_no_record(node, path, body, status):
    answer = node.post(path, body)
    assert answer.status == status
    assert "x-openlora-receipt" not in answer.headers
    missing = node.get(f"/v1/receipts/{answer.headers['x-request-id']}")
    assert (missing.status, missing.body["error"]["code"]) == (404, "receipt_not_found")


def test_show_prints_the_bundle_ready_to_be_verified(node, answer, verify):
    shown = node.cli("receipts", "show", answer.headers["x-openlora-receipt"]).stdout
    assert json.loads(shown) == answer.bundle
    assert verify(json.loads(shown), "--operator", node.operator).returncode == 0
    assert node.cli("receipts", "show", "unknown", check=False).returncode == 66
