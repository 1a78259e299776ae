"""How adapters get from their files to where steps compute from them, as `node.adapters.loading` and the pool see it.

`node.adapters.in_place` where loader threads write that memory themselves, `node.adapters.arena_route` where there is a device.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Protocol

from node.adapters.arena_route import ArenaRoute
from node.adapters.charges import Charges
from node.adapters.file_plan import FilePlan
from node.adapters.host_arena import HostArena
from node.adapters.in_place import InPlaceRoute
from node.adapters.loader import AdapterPlan, Filled
from node.adapters.page_filler import Page
from node.adapters.page_store import DevicePages, HostPages
from node.adapters.residents import Residents


class Route(Protocol):
    """Used by the step loop only, and never waits.

    Attributes:
        can_send_early: Whether an adapter can come before its hash is known (see `node.adapters.trials`).
        loads_total: Adapters that came. sent_bytes_total: to a device.
    """

    @property
    def can_send_early(self) -> bool: ...

    @property
    def loads_total(self) -> int: ...

    @property
    def sent_bytes_total(self) -> int: ...

    def begin_step(self) -> None:
        """Take over what arrived."""

    # ---- from files

    def claim(self, plan: AdapterPlan, wanted: Collection[str]) -> list[Page] | None:
        """Pages for the loader to write, until `complete` or `abandon`; None when there are none now."""
        ...

    def complete(self, filled: Filled) -> None:
        """The loader wrote them, and their hash is the one that was asked for."""

    def abandon(self, adapter_id: str) -> None:
        """They will never be what was asked for."""

    # ---- from host memory

    def bring(self, adapter_id: str, wanted: Collection[str]) -> bool:
        """Send an adapter whose pages are proven, if there is room for it now; False where there are no such pages."""
        ...

    def send_early(self, adapter_id: str, file: FilePlan, wanted: Collection[str]) -> bool:
        """Send an adapter whose pages are complete and not proven; whether it is resident from now on."""
        ...

    @property
    def is_copying(self) -> bool:
        """Whether an adapter is on its way to a device, whose arrival nobody tells."""
        ...

    def is_whole(self, adapter_id: str) -> bool:
        """Whether an adapter is resident and here to the last byte."""
        ...

    def is_in_time(self, adapter_id: str) -> bool:
        """Whether a resident adapter will be when the step that is planned begins, as far as one can tell."""
        ...

    def join(self, adapter_id: str) -> None:
        """Steps launched from now on wait for it, where it is still on its way."""

    # ---- what lies before the memory that steps compute from

    @property
    def staged_ids(self) -> tuple[str, ...]:
        """Adapters in host memory, one copy away from running, least recently used first."""
        ...

    @property
    def host_evictions_total(self) -> int:
        """How many left it."""
        ...

    def holds(self, adapter_id: str) -> bool:
        """Whether an adapter has pages there, complete or not."""
        ...

    def is_idle(self, adapter_id: str) -> bool:
        """Whether nobody writes or reads them."""
        ...

    def forget(self, adapter_id: str) -> None:
        """Give those of an idle adapter back. Unknown ones are ignored."""


def open_route(
    store: HostPages | DevicePages, arena: HostArena | None, residents: Residents, charges: Charges, clock: Callable[[], float]
) -> Route:
    """The way into this memory.

    Raises:
        ValueError: A device's pages without an arena, or an arena before pages that are written in place.
    """
    if isinstance(store, HostPages) and arena is None:
        return InPlaceRoute(store, residents, charges)
    if isinstance(store, HostPages) or arena is None:
        raise ValueError("pages of a device are filled from a host arena, others in place")
    return ArenaRoute(store, arena, residents, charges, clock)
