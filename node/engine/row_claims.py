"""What part of a step's rows a tenant above its share may take for prompts while others want them, now or a moment ago.

At most its part, and in every other step nothing, so that the first rows of somebody else do not share a step with its long
prompts. What it leaves is left: a step that somebody waits for is better short than full.
"""

from __future__ import annotations

from node.engine.fairness import FairQueue
from node.engine.running import Running

ABSENT = ""  # stands for tenants that are expected back; no tenant has this name
ABSENT_PARTS = 4  # of the rows for prompts, where each tenant above its share has one: it bounds how long their step is
CLAIM_STEPS = 32  # for so long a tenant that had prompts to compute is expected back


class RowClaims:
    """Remembers who had prompts to compute.

    Args:
        running, queue: Where tenants are found. row_count: the most rows of a step.
    """

    def __init__(self, running: Running, queue: FairQueue, row_count: int) -> None:
        self._running = running
        self._queue = queue
        self._row_count = row_count
        self._steps: dict[str, int] = {}  # tenants that had prompts to compute, and in which step last
        self._has_held_back = False

    def limits(self, step: int) -> dict[str, int]:
        """Rows for the prompts of each tenant that has a limit in this step."""
        weights = self._queue.weights()
        claims = {sequence.tenant for sequence in self._running if sequence.remaining_count > 1} | self._queue.open_tenants
        self._steps.update(dict.fromkeys(claims, step))
        self._steps = {name: last for name, last in self._steps.items() if step - last < CLAIM_STEPS}
        if not claims or len(self._steps) < 2:
            return {}
        # Whoever comes back first waits for the end of a step as well as for rows: several parts are kept for them.
        expected = {ABSENT: ABSENT_PARTS} if len(self._steps) > len(claims) else {}
        shares = self._running.shares({**weights, **expected})
        above = {name for name in claims if shares.is_above(name)}
        total = sum(weights[name] for name in claims) + sum(expected.values())
        self._has_held_back = not self._has_held_back and 0 < len(above) < len(claims)
        rows = 0 if self._has_held_back else self._row_count
        return {name: rows * weights[name] // total for name in above}
