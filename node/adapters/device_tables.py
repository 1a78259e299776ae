"""Ranks and scales of every slot on a GPU, as kernels read them."""

from __future__ import annotations

import torch

from node.adapters.file_plan import FilePlan


class DeviceTables:
    """Written in the order of the steps: those that were launched before read what a slot held.

    A slot's columns travel with its pages, in one piece, and are spread on the device (59 us on the host if not).

    Args:
        module_count: M. slot_count: S.
        compute: The stream that steps are launched on.

    Attributes:
        ranks: [M, S] int32, device. scales: [M, S] float32, device.
    """

    def __init__(self, module_count: int, slot_count: int, compute: torch.cuda.Stream, device: torch.device) -> None:
        shape = (slot_count, 2, module_count)
        # Ranks and scales side by side, so that one copy writes both columns of a slot.
        self._tables = torch.zeros((2, module_count, slot_count), dtype=torch.int32, device=device)
        self.ranks, self.scales = self._tables[0], self._tables[1].view(torch.float32)
        # A place of its own for each slot: it is written again only when the copy before has long arrived.
        self._columns = torch.zeros(shape, dtype=torch.int32, pin_memory=True)
        self._column_array = self._columns.numpy()
        self._landing = torch.zeros(shape, dtype=torch.int32, device=device)
        self._shown: dict[int, torch.cuda.Event] = {}
        self._compute = compute

    def write(self, slot: int, file: FilePlan) -> None:
        """On the host: whose columns `send` sends."""
        array = self._column_array[slot]
        array[...] = 0
        array[0, file.module_indices] = file.ranks
        array[1, file.module_indices] = file.scales.view("int32")

    def guard(self, stream: torch.cuda.Stream, slot: int) -> None:
        """Let `stream` wait until whoever had the slot before is shown: nobody may have named it, so that no step tells."""
        shown = self._shown.get(slot)
        if shown is not None:
            stream.wait_event(shown)

    def send(self, slot: int) -> None:
        """Copy what was written to the device, on the current stream."""
        self._landing[slot].copy_(self._columns[slot], non_blocking=True)

    def show(self, slot: int) -> None:
        """Let steps that are launched from now on read what was sent, for whose arrival they wait."""
        self._tables[:, :, slot].copy_(self._landing[slot])
        shown = self._shown.setdefault(slot, torch.cuda.Event())  # type: ignore[no-untyped-call]
        shown.record(self._compute)
