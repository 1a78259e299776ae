"""Runs step plans on a GPU, one step ahead of what the host knows.

Steps of common shapes are recorded (`node.engine.recorded_steps`); anything else is launched operation by operation. The tokens
of a step stay on the device for the next one and reach the host behind an event. Nothing here waits for the device but `collect`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from node.engine.batch import side_groups
from node.engine.device_batch import StepShape, pending_places, step_shape, write_rows
from node.engine.device_flight import DeviceFlight, drawing_rows
from node.engine.device_sampler import Choice, DeviceSampler
from node.engine.graphs import StepGraphs, buckets_for
from node.engine.recorded_steps import RecordedSteps
from node.engine.runner import LogitsWatcher, MaskSource, add_embeddings, draw_row, embedding_rows, row_mask
from node.engine.sizing import DeviceSizes
from node.engine.step_adapters import DeviceSlots, StepAdapters, sent_rows
from node.engine.step_block import ANSWER_TURNS, BlockLayout, upload
from node.engine.step_plan import Work, WorkResult
from node.kernels.device_rows import DeviceRows
from node.kernels.head_rows import LogitTops
from node.kernels.lora import LoraRows
from node.kernels.ops import Kernels
from node.kernels.side import SideGroup
from node.models.inputs import CausalLM, KVCache


class DeviceRunner:
    """See `node.engine.engine.StepRunner`.

    Args:
        model: The decoder. kernels: what it runs on, and where.
        kv: Its paged cache. adapters: adapter memory. masks: what rows with a grammar may draw.
        sizes: Bounds of a step.
        has_graphs: Record decode steps. False on devices that cannot, and for tests.
        watch_logits: For whoever compares bits; None in a node.
    """

    is_ahead = True

    def __init__(
        self,
        model: CausalLM,
        kernels: Kernels[Any, Any],
        kv: KVCache,
        adapters: DeviceSlots,
        masks: MaskSource,
        sizes: DeviceSizes,
        *,
        has_graphs: bool,
        watch_logits: LogitsWatcher | None = None,
    ) -> None:
        self._model = model
        self._kernels = kernels
        self._kv = kv
        self._adapters = StepAdapters(adapters, sizes.head_module, sizes.processors)
        self._masks = masks
        self._sizes = sizes
        self._watch_logits = watch_logits
        most = buckets_for(sizes.max_sequences)[-1]
        self._sampler = DeviceSampler(sizes.vocab_size, most, kernels.device)
        is_watched = watch_logits is not None
        self._recorded = RecordedSteps(
            model, kernels, kv, self._adapters, sizes, self._choose, is_watched=is_watched, is_recording=has_graphs
        )
        self._block = self._recorded.block
        self._choice = Choice.of(self._block.drawn, self._block.answer_turn_word, ANSWER_TURNS)
        self._places: dict[str, int] = {}  # sequence id -> its place among the tokens of the last draw

    @property
    def graphs(self) -> StepGraphs:
        """The recorded steps."""
        return self._recorded.graphs

    def _choose(self, logits: Tensor, tops: LogitTops | None = None) -> None:
        self._sampler.greedy(logits, self._choice, tops)

    @torch.inference_mode()
    def warm_up(self, wait_for_sampler: Callable[[], None] = lambda: None) -> None:
        """Record the steps of common shapes, and compile what some rows ask for after them. Weights may still be on their way.

        Args:
            wait_for_sampler: Until somebody else has compiled most of the latter.
        """
        self._recorded.warm_up()
        wait_for_sampler()
        self._sampler.warm_up()

    # ---- launch

    @torch.inference_mode()
    def launch(self, work: list[Work]) -> DeviceFlight:
        """Start the forward pass. See `StepRunner`."""
        self._choice.claim(self._block.next_answer_turn)
        places, self._places = self._places, {}  # this step writes its own tokens over them
        shape = step_shape(work)
        side = side_groups(work, self._adapters.slot_of, self._adapters.tensors)
        flight = None
        if side is None and self._kernels.takes_tiles:
            flight = self._launch_recorded(work, shape, places)
        if flight is None:
            flight = self._launch_rows(work, shape, side, places)
        if self._watch_logits is not None:
            self._watch_logits(work, flight.logits)
        return flight

    def _launch_recorded(self, work: list[Work], shape: StepShape, places: Mapping[str, int]) -> DeviceFlight | None:
        """None where no recorded step can compute this one."""
        if shape.is_decode:
            logits = self._recorded.decode(work, places)
            return None if logits is None else DeviceFlight(work, logits, list(range(len(work))), None, self._block.answer_turn)
        found = self._recorded.chunks(work, shape, places)
        return None if found is None else self._drawing_flight(work, found[0], tops=found[1])

    def _drawing_flight(
        self, work: list[Work], logits: Tensor, *, hidden: Tensor | None = None, tops: LogitTops | None = None
    ) -> DeviceFlight:
        """`tops`: of logits whose rows all draw."""
        rows, drawing = drawing_rows(work)
        flight = DeviceFlight(work, logits, drawing, rows, self._block.answer_turn, hidden=hidden)
        if rows:
            self._choose(flight.drawing_logits, tops)
        return flight

    def _launch_rows(
        self, work: list[Work], shape: StepShape, side: tuple[SideGroup, ...] | None, places: Mapping[str, int]
    ) -> DeviceFlight:
        """Any number of rows a sequence, operation by operation."""
        wanted = shape.logit_rows
        layout = BlockLayout.of(shape.rows, shape.sequences, 0 if wanted is None else len(wanted), shape.table_width)
        inputs = self._block.inputs(
            layout,
            self._send(work, shape, layout, places),
            logit_rows=None if wanted is None else len(wanted),
            max_query=shape.max_query,
            max_context=shape.max_context,
            side=side,
        )
        hidden_rows = embedding_rows(work)
        if hidden_rows:
            inputs.hidden_rows = upload(hidden_rows, self._kernels.device)
        logits = self._model.forward(inputs, self._kv, self._adapters.tensors)
        return self._drawing_flight(work, logits, hidden=inputs.hidden)

    def _send(
        self, work: list[Work], shape: StepShape, layout: BlockLayout, places: Mapping[str, int]
    ) -> LoraRows | DeviceRows | None:
        """Copy a step's metadata to the device; returns its adapters."""
        takes_tiles = self._kernels.takes_tiles
        tiles = self._adapters.row_tiles(work) if takes_tiles else None
        end = layout.tiles + (0 if tiles is None else tiles.size)
        host = self._block.begin(end)
        own = self._block.source_of_own(layout.tokens)
        write_rows(host, layout, work, shape, self._kv.block_size, pending_places(work, places), own)
        if tiles is not None:
            tiles.write(host, layout.tiles)
        self._recorded.forget_tiles()
        self._block.send(end)
        return sent_rows(self._block, layout, tiles) if takes_tiles else self._adapters.plain_rows(work)

    # ---- tokens

    @torch.inference_mode()
    def draw(self, flight: DeviceFlight) -> None:
        """Start drawing. See `StepRunner`."""
        flight.prompt_logprobs = flight.prompt_row_logprobs()
        drawing = [flight.work[index] for index in flight.drawing]
        if not drawing:
            return
        mask = row_mask(self._masks, drawing, self._sizes.vocab_size)
        chosen = self._choice.step(flight.answer_turn)
        flight.draw = self._sampler.draw(flight.drawing_logits, [draw_row(item) for item in drawing], chosen, mask)
        self._places = {item.sequence.id: place for place, item in enumerate(drawing) if item.draws_token}

    def collect(self, flight: DeviceFlight) -> list[WorkResult]:
        """Wait for the tokens. See `StepRunner`."""
        results = [WorkResult()] * len(flight.work)
        drawn = flight.draw.read() if flight.draw is not None else []
        for index, token in zip(flight.drawing, drawn, strict=True):
            results[index] = WorkResult(token)
        for index, found in flight.prompt_logprobs.items():
            results[index] = WorkResult(results[index].drawn, tuple(found.tolist()))
        if flight.hidden is not None:
            add_embeddings(flight.work, results, flight.hidden.cpu())
        return results
