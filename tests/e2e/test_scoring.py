"""`/v1/completions` with `echo` and `logprobs`, as evaluation harnesses score texts: against transformers and PEFT in float32.

The harness sends the prompt as token ids, asks for at most one new token and for one alternative: a continuation's likelihood
is the sum of its tokens' log-probabilities, and it is greedy where every one of them is the largest of its alternatives.
"""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.e2e

CONTEXT, CONTINUATIONS = "The capital of France is", (" Paris", " Berlin, of course")
MODELS = ("", "lincoln")
TOLERANCE = 1e-3


@pytest.fixture(scope="module")
def exact(kit, tmp_path_factory):
    """A node that computes in float32."""
    env = kit.environment(OPENLORA_MODEL__DTYPE="float32", OPENLORA_CHAIN__PROFILE="none")
    node = kit.start_node(tmp_path_factory.mktemp("scoring"), env=env)
    yield node
    assert node.stop() == 0


@pytest.fixture(scope="module")
def expected():
    """Log-probabilities [T - 1, V] after each token of a text but the last, by model and text, of transformers and PEFT."""
    torch = pytest.importorskip("torch")
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from node.models.source import PACKAGED_MODEL, resolve
    from node.resources import data_path

    files = resolve(PACKAGED_MODEL)
    base = AutoModelForCausalLM.from_pretrained(str(files.directory), gguf_file=files.weights[0].name, dtype=torch.float32)
    adapted = PeftModel.from_pretrained(base, str(data_path("config/demo/adapters") / "lincoln")).eval()

    def score(model, ids):
        with torch.no_grad():
            if model:
                logits = adapted(torch.tensor([ids])).logits
            else:
                with adapted.disable_adapter():
                    logits = adapted(torch.tensor([ids])).logits
        return logits[0, :-1].log_softmax(-1)

    return score


def ids_of(node, text):
    return [token["id"] for token in node.post("/tokenize", {"inputs": text}).body]


def ask(node, model, prompt, **changes):
    body = {"model": model, "prompt": prompt, "temperature": 0, "max_tokens": 1, "logprobs": 1, "seed": 1234, "echo": True}
    answer = node.post("/v1/completions", {**body, **changes})
    assert answer.status == 200, answer.body
    return answer.body


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("max_tokens", [0, 1])
def test_continuations_are_as_likely_as_transformers_says(exact, expected, model, max_tokens):
    context = ids_of(exact, CONTEXT)
    prompts = [context + ids_of(exact, text) for text in CONTINUATIONS]
    choices = ask(exact, model, prompts, max_tokens=max_tokens)["choices"]

    for prompt, choice in zip(prompts, choices, strict=True):
        logprobs, reference = choice["logprobs"], expected(model, prompt)
        own = reference.gather(1, reference.new_tensor(prompt[1:], dtype=int)[:, None])[:, 0]
        best = reference.max(dim=1).values
        assert len(logprobs["tokens"]) == len(prompt) + max_tokens
        assert (logprobs["token_logprobs"][0], logprobs["top_logprobs"][0]) == (None, None)
        assert logprobs["token_logprobs"][1 : len(prompt)] == pytest.approx(own.tolist(), abs=TOLERANCE)
        found = [max(top.values()) for top in logprobs["top_logprobs"][1 : len(prompt)]]
        assert found == pytest.approx(best.tolist(), abs=TOLERANCE)
        is_greedy = [value == top for value, top in zip(logprobs["token_logprobs"][1 : len(prompt)], found, strict=True)]
        assert is_greedy == (own == best).tolist()


def test_five_alternatives_are_those_of_transformers_in_order(exact, expected):
    prompt = ids_of(exact, CONTEXT)
    logprobs = ask(exact, "lincoln", prompt, max_tokens=0, logprobs=5)["choices"][0]["logprobs"]
    values = expected("lincoln", prompt).topk(5, dim=1).values

    for top, row in zip(logprobs["top_logprobs"][1:], values, strict=True):
        assert list(top.values())[:5] == pytest.approx(row.tolist(), abs=TOLERANCE)


def test_text_is_scored_like_its_token_ids_and_in_any_batch(exact):
    text = CONTEXT + CONTINUATIONS[0]
    alone = ask(exact, "lincoln", ids_of(exact, text))["choices"][0]
    several = ask(exact, "lincoln", [text, CONTEXT, text])["choices"]

    assert alone["text"].startswith(text)
    for choice in (several[0], several[2]):
        assert choice["logprobs"]["tokens"] == alone["logprobs"]["tokens"]
        assert choice["logprobs"]["text_offset"] == alone["logprobs"]["text_offset"]
        assert choice["logprobs"]["token_logprobs"][1:] == pytest.approx(alone["logprobs"]["token_logprobs"][1:], abs=TOLERANCE)


def test_streamed_scores_are_the_whole_answers(exact):
    body = {"model": "", "prompt": CONTEXT, "temperature": 0, "max_tokens": 3, "logprobs": 2, "echo": True}
    whole = ask(exact, **{key: body[key] for key in ("model", "prompt")}, max_tokens=3, logprobs=2)["choices"][0]["logprobs"]
    with exact.stream("/v1/completions", {**body, "stream": True}) as events:
        parts = [choice["logprobs"] for event in events for choice in event["choices"] if choice["logprobs"] is not None]

    for key in ("tokens", "text_offset"):
        assert [item for part in parts for item in part[key]] == whole[key]
    scored = [item for part in parts for item in part["token_logprobs"]]
    assert scored[0] is None
    assert scored[1:] == pytest.approx(whole["token_logprobs"][1:], abs=TOLERANCE)
