"""Answers as LoRAX has them: one object, or one event for each token with the whole text in the last."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from node.api.choice import TextToken
from node.api.exchange import Exchange
from node.api.generation import Generation
from node.api.tokenizer import TextTokenizer

_FINISH = {"stop": "eos_token", "stop_sequence": "stop_sequence", "length": "length"}


@dataclass(frozen=True, slots=True)
class LoraxAnswers:
    """Builds the JSON of one request's answer. lorax-client requires floats for log-probabilities and all detail fields."""

    generation: Generation
    exchange: Exchange
    tokenizer: TextTokenizer

    def whole(self, text: str, tokens: list[TextToken], receipt: dict[str, Any]) -> dict[str, Any]:
        """The answer of `/generate`; `/` puts it into a list of one."""
        answer: dict[str, Any] = {"generated_text": self.full_text(text)}
        if self.generation.has_details:
            answer["details"] = {
                **self._summary(),
                "skipped_tokens": 0,
                "prefill": self._prefill() if self.generation.has_prompt_details else [],
                "tokens": [self.token(token) for token in tokens],
            }
        answer["openlora"] = {"request_id": self.exchange.request_id, "receipt": receipt}
        return answer

    def event(self, token: TextToken) -> dict[str, Any]:
        """A token on its way."""
        return {"token": self.token(token), "generated_text": None, "details": None}

    def last_event(self, token: TextToken, text: str, receipt: dict[str, Any]) -> dict[str, Any]:
        """The final token with the whole text; the receipt is an extra key that LoRAX's clients pass over."""
        return {
            "token": self.token(token),
            "generated_text": self.full_text(text),
            "details": self._summary() if self.generation.has_details else None,
            "openlora": {"request_id": self.exchange.request_id, "receipt": receipt},
        }

    def full_text(self, text: str) -> str:
        """The answer, after the prompt where `return_full_text` asks for it."""
        return (self.generation.prompts[0].text or "") + text if self.generation.has_prompt_text else text

    def token(self, token: TextToken) -> dict[str, Any]:
        """One token; a control token shows its own name, which is not part of the text."""
        token_id = token.drawn.token_id
        is_special = self.tokenizer.is_special(token_id)
        entry: dict[str, Any] = {
            "id": token_id,
            "text": self.tokenizer.token_text(token_id) if is_special else token.text,
            "logprob": token.drawn.logprob if token.drawn.logprob is not None else 0.0,
            "special": is_special,
            "skipped": False,
        }
        if self.generation.top_logprobs > 0:
            entry["alternative_tokens"] = [
                {"id": item.token_id, "text": self.tokenizer.token_text(item.token_id), "logprob": item.logprob}
                for item in token.drawn.top
            ]
        return entry

    def _summary(self) -> dict[str, Any]:
        choice = self.exchange.choices[0]
        return {
            "finish_reason": _FINISH[choice.finish_reason or "length"],
            "prompt_tokens": self.exchange.prompt_token_count,
            "generated_tokens": len(choice.token_ids),
            "seed": self.generation.sampling.seed if self.generation.sampling.temperature > 0 else None,
        }

    def _prefill(self) -> list[dict[str, Any]]:
        """The prompt's tokens. The first has no log-probability: nothing came before it."""
        ids = self.exchange.opening.prompts[0]
        logprobs = self.exchange.choices[0].prompt_logprobs or (None,) * len(ids)
        return [
            {"id": token_id, "text": self.tokenizer.token_text(token_id), "logprob": logprob}
            for token_id, logprob in zip(ids, logprobs, strict=True)
        ]
