"""The nouns that cross rooms: what a client asked for, in the node's own terms.

They are msgspec structs because they also cross the process boundary to the engine, unchanged. Those that cross it thousands of
times a second do so without field names, and are kept from the garbage collector: none of them can be part of a cycle.
"""

from __future__ import annotations

import msgspec


class Sampling(msgspec.Struct, frozen=True, kw_only=True):
    """How the next token is drawn. All values are validated at the door (`node.api`), never here.

    `temperature == 0` is greedy, and then only penalties and `logit_bias` still apply. Filters apply in the order
    penalties, bias, temperature, top-k, typical-p, top-p, min-p. The noise of a draw depends only on
    (`seed`, choice index, position), so it is the same whatever else is in the batch.
    """

    max_new_tokens: int
    temperature: float = 0.0
    top_k: int = 0  # 0: off
    top_p: float = 1.0  # 1: off
    min_p: float = 0.0  # 0: off
    typical_p: float = 1.0  # 1: off
    repetition_penalty: float = 1.0  # over prompt and output, as transformers has it
    frequency_penalty: float = 0.0  # over output only, as OpenAI has it
    presence_penalty: float = 0.0  # over output only
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int = 0
    stop_token_ids: tuple[int, ...] = ()  # end-of-sequence ids; stop *strings* are matched where text exists, in the API process
    logprobs: int = -1  # -1: none; 0: of the drawn token; k > 0: also of the k most likely tokens
    prompt_logprobs: bool = False  # log-probability of every prompt token; disables the prefix-cache hit for this request
    prompt_top: int = 0  # with prompt_logprobs: also of the k most likely tokens at every prompt position


class AdapterTerm(msgspec.Struct, frozen=True):
    """One adapter of a recipe: the answer is computed with base + sum(weight * scale * B A) over the terms.

    `adapter_id` is the content hash (64 hex digits). `directory` holds the verified files; the engine reads nothing else.
    """

    adapter_id: str
    directory: str
    weight: float


class TokenLogprob(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A token and the natural logarithm of its probability under the unmodified (temperature 1, unpenalised) distribution."""

    token_id: int
    logprob: float


class DrawnToken(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A token of a sequence. `top` holds the `Sampling.logprobs` (`prompt_top` in a prompt) most likely tokens, best first."""

    token_id: int
    logprob: float | None = None
    top: tuple[TokenLogprob, ...] = ()


class LinearShape(msgspec.Struct, frozen=True):
    """One kind of linear module of the base that an adapter may change, for validating adapters without torch.

    `name` is the module's path inside the transformers model with the layer number as `{layer}`, for example
    "model.layers.{layer}.self_attn.q_proj" or "lm_head"; `layer_count` is 1 for modules outside the layers. `head_count` is how
    many heads the output rows are, of queries and keys only.
    """

    name: str
    in_features: int
    out_features: int
    layer_count: int
    head_count: int = 0
