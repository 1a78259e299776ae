"""Prompts to token ids, off the event loop where they are long, and the token budget that is left for the answer."""

from __future__ import annotations

import asyncio
from concurrent.futures import Executor

from node.api.chat_template import ChatTemplate
from node.api.generation import Generation, Limits, Prompt
from node.api.tokenizer import TextTokenizer
from node.errors import ContextLengthError, RequestError

_SHORT_CHARS = 4096  # encoded at once: about a millisecond, cheaper than waking a thread
_MAX_SCORES = 1 << 16  # log-probabilities of one request's prompts: some 100 bytes and 2 us each, 30 bytes in the answer


class Prompting:
    """Tokenizes prompts.

    Args:
        executor: A small pool; the tokenizer releases the interpreter lock while it works.
    """

    def __init__(self, tokenizer: TextTokenizer, template: ChatTemplate, limits: Limits, executor: Executor) -> None:
        self._tokenizer = tokenizer
        self._template = template
        self._limits = limits
        self._executor = executor

    async def tokenize(self, generation: Generation) -> tuple[tuple[int, ...], ...]:
        """Token ids of every prompt, in order.

        Raises:
            RequestError: An empty prompt, messages the template refuses. ContextLengthError: No room for prompt and answer.
        """
        prompts = [await self._encode(prompt) for prompt in generation.prompts]
        keep = generation.truncate_prompt_tokens
        if keep is not None:
            prompts = [ids[-keep:] for ids in prompts]
        for ids in prompts:
            self._check(ids, generation)
        if generation.sampling.prompt_logprobs:
            self._check_scores(prompts, generation)
        return tuple(tuple(ids) for ids in prompts)

    def budget(self, generation: Generation, prompts: tuple[tuple[int, ...], ...]) -> int:
        """New tokens for each choice: what was asked for, else the node's default as far as the longest prompt leaves room."""
        if generation.max_new_tokens is not None:
            return generation.max_new_tokens
        room = self._limits.max_model_len - max(len(ids) for ids in prompts)
        return min(self._limits.default_max_tokens, room)

    async def _encode(self, prompt: Prompt) -> list[int]:
        if prompt.token_ids is not None:
            return list(prompt.token_ids)
        size = len(prompt.text or "") + sum(len(message["content"]) for message in prompt.messages or ())
        if size <= _SHORT_CHARS:
            return self._encode_now(prompt)
        return await asyncio.get_running_loop().run_in_executor(self._executor, self._encode_now, prompt)

    def _encode_now(self, prompt: Prompt) -> list[int]:
        if prompt.messages is None:
            return self._tokenizer.encode(prompt.text or "")
        # The template writes bos itself where the model wants it.
        return self._tokenizer.encode(self._template.render(prompt.messages, prompt.tools), adds_special=False)

    def _check(self, ids: list[int], generation: Generation) -> None:
        if not ids:
            raise RequestError("the prompt has no tokens; send some text", param=_prompt_param(generation))
        if max(ids) >= self._limits.vocab_size:
            raise RequestError(
                f"the prompt holds token {max(ids)}, beyond the model's vocabulary of {self._limits.vocab_size}",
                param=_prompt_param(generation),
            )
        wanted, limit = generation.max_new_tokens, self._limits.max_model_len
        if len(ids) + (1 if wanted is None else wanted) > limit:
            raise _too_long(generation, len(ids), wanted, limit)

    def _check_scores(self, prompts: list[list[int]], generation: Generation) -> None:
        """One prompt of the whole context is always scored; beyond that its alternatives and its neighbours count."""
        count, each = sum(map(len, prompts)) * generation.choice_count, 1 + generation.sampling.prompt_top
        limit = max(_MAX_SCORES, 2 * self._limits.max_model_len)
        if count * each > limit:
            raise RequestError(
                f"log-probabilities of {count} prompt tokens with {each - 1} alternatives each were asked for, {count * each}"
                f" numbers; the limit is {limit}; send fewer or shorter prompts, or ask for fewer alternatives",
                param="parameters.decoder_input_details" if generation.shape == "lorax" else "logprobs",
            )


def _too_long(generation: Generation, prompt_count: int, wanted: int | None, limit: int) -> ContextLengthError:
    """The three numbers, in LoRAX's wording on LoRAX's routes."""
    if generation.shape == "lorax":
        text = (
            f"`inputs` tokens + `max_new_tokens` must be <= {limit}. Given: {prompt_count} `inputs` tokens and "
            f"{wanted or 1} `max_new_tokens`"
        )
    else:
        text = (
            f"the model's context is {limit} tokens, but the prompt has {prompt_count} and {wanted or 1} more were asked for "
            f"({prompt_count + (wanted or 1)} together); shorten the prompt or lower max_tokens"
        )
    return ContextLengthError(text, param=_prompt_param(generation))


def _prompt_param(generation: Generation) -> str:
    return {"chat": "messages", "completion": "prompt", "lorax": "inputs", "embedding": "input"}[generation.shape]
