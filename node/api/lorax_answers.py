"""Answers as LoRAX has them: one object, or one event for each token with the whole text in the last."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from node.api.best_of import ranked
from node.api.choice import TextToken
from node.api.doors import Receipt
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

    def whole(self, texts: list[str], tokens: list[list[TextToken]], receipt: Receipt) -> dict[str, Any]:
        """The answer of `/generate`; `/` puts it into a list of one. Of several choices (`best_of`) the best is the answer."""
        best, *others = ranked(self.exchange.choices, tokens, len(tokens))
        answer: dict[str, Any] = {"generated_text": self.full_text(texts[best])}
        if self.generation.has_details:
            answer["details"] = {**self._details(best, tokens[best]), "prompt_tokens": self.exchange.prompt_token_count}
            answer["details"]["skipped_tokens"] = 0
        if self.generation.has_details and others:
            answer["details"]["best_of_sequences"] = [
                {"generated_text": self.full_text(texts[place]), **self._details(place, tokens[place])} for place in others
            ]
        answer["openlora"] = {"request_id": self.exchange.request_id, "receipt": receipt}
        return answer

    def event(self, token: TextToken) -> dict[str, Any]:
        """A token on its way."""
        return {"token": self.token(token), "generated_text": None, "details": None}

    def last_event(self, token: TextToken, text: str, receipt: Receipt) -> dict[str, Any]:
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

    def _details(self, place: int, tokens: list[TextToken]) -> dict[str, Any]:
        return {
            **self._outcome(place),
            "prefill": self._prefill() if self.generation.has_prompt_details else [],
            "tokens": [self.token(token) for token in tokens],
        }

    def _summary(self) -> dict[str, Any]:
        return {**self._outcome(0), "prompt_tokens": self.exchange.prompt_token_count, "skipped_tokens": 0}

    def _outcome(self, place: int) -> dict[str, Any]:
        """How a choice ended. Only the first is drawn with the seed itself."""
        choice, sampling = self.exchange.choices[place], self.generation.sampling
        return {
            "finish_reason": _FINISH[choice.finish_reason or "length"],
            "generated_tokens": len(choice.token_ids),
            "seed": sampling.seed % (1 << 64) if sampling.temperature > 0 and place == 0 else None,
        }

    def _prefill(self) -> list[dict[str, Any]]:
        """The prompt's tokens. The first has no log-probability: nothing came before it."""
        ids = self.exchange.opening.prompts[0]
        scored = self.exchange.choices[0].prompt_logprobs or (None,) * len(ids)
        return [
            {"id": token_id, "text": self.tokenizer.token_text(token_id), "logprob": None if token is None else token.logprob}
            for token_id, token in zip(ids, scored, strict=True)
        ]
