"""`best_of`: more answers are made than given; those whose tokens were likeliest on average are kept.

OpenAI and LoRAX both rank by the mean log-probability of an answer's tokens. All that were made are in the record and paid for.
"""

from __future__ import annotations

from collections.abc import Sequence

from node.api.choice import Choice, TextToken


def ranked(choices: Sequence[Choice], tokens: Sequence[Sequence[TextToken]], kept: int) -> list[int]:
    """Positions of the `kept` best choices of every prompt, prompts in order, each prompt's best first."""
    by_prompt: dict[int, list[int]] = {}
    for position, choice in enumerate(choices):
        by_prompt.setdefault(choice.prompt_index, []).append(position)
    best = [sorted(group, key=lambda position: -_mean(tokens[position])) for group in by_prompt.values()]
    return [position for group in best for position in group[:kept]]


def _mean(tokens: Sequence[TextToken]) -> float:
    """An answer without a token is the worst there is."""
    scores = [token.drawn.logprob for token in tokens if token.drawn.logprob is not None]
    return sum(scores) / len(scores) if scores else float("-inf")
