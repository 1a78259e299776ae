"""What the scheduler counted since the process started."""

from __future__ import annotations

from dataclasses import dataclass

from node.engine.step_plan import StepPlan


@dataclass(slots=True)
class Counters:
    """Totals, and the adapters of the last step."""

    steps: int = 0
    prompt_tokens: int = 0
    cached_prompt_tokens: int = 0
    output_tokens: int = 0
    preemptions: int = 0
    max_adapters_in_one_step: int = 0
    last_step_adapters: tuple[str, ...] = ()

    def count_step(self, plan: StepPlan) -> None:
        """A step has run."""
        decoding = [work.sequence for work in plan.work if work.draws_token and work.sequence.output_count]
        adapters = tuple(dict.fromkeys(term.adapter_id for sequence in decoding for term in sequence.terms))
        self.steps += 1
        self.last_step_adapters = adapters
        self.max_adapters_in_one_step = max(self.max_adapters_in_one_step, len(adapters))
