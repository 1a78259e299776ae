"""Runs step plans on a GPU, one step ahead of what the host knows.

A decode step is one copy of metadata and one graph; anything else is launched operation by operation. The tokens of a step stay
on the device for the next one and reach the host behind an event. Nothing here waits for the device but `collect`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from node.engine.batch import side_groups
from node.engine.device_batch import (
    StepShape,
    pad_rows,
    pending_places,
    recipes_of,
    step_shape,
    write_decode,
    write_rows,
)
from node.engine.device_sampler import DeviceDraw, DeviceSampler
from node.engine.graphs import ROW_BUCKETS, Adapted, GraphKey, StepGraphs, buckets_for
from node.engine.runner import (
    LogitsWatcher,
    MaskSource,
    SlotTable,
    add_embeddings,
    draw_row,
    embedding_rows,
    row_mask,
)
from node.engine.step_block import BlockLayout, StepBlock, upload
from node.engine.step_plan import Work, WorkResult
from node.kernels.cuda_ops import DeviceTiles
from node.kernels.device_rows import DeviceRows
from node.kernels.lora import LoraRows, lora_rows
from node.kernels.lora_tiles import Recipe, TileBlock, block_ints, build_tiles
from node.kernels.ops import Kernels
from node.kernels.side import SideGroup
from node.models.inputs import CausalLM, KVCache, StepInputs

DECODE_TILE_ROWS, PREFILL_TILE_ROWS = 16, 64
RECORDED_TILE_ROWS = 16  # of small steps with prompt chunks: larger tiles would leave most of the GPU idle
GRAPH_ENTRIES = 16  # pages of one row's recipe that a graph has room for; a batch with more is launched without one
EAGER_ENTRIES = 64


class DeviceSlots(SlotTable, Protocol):
    """Where resident adapters are, and what the host knows of them."""

    def adapts(self, adapter_id: str, module: int) -> bool: ...


@dataclass(frozen=True, slots=True)
class DeviceSizes:
    """Bounds of a step. `head_module`: the output projection's row in `LoraPool.ranks`."""

    max_sequences: int
    max_batch_tokens: int
    max_model_len: int
    vocab_size: int
    head_module: int


@dataclass(slots=True)
class DeviceFlight:
    """A step on the device. `logits` [W, V] float32; `drawing`: work index of every row that draws, `rows` their logits' rows."""

    work: list[Work]
    logits: Tensor
    drawing: list[int]
    rows: list[int] | None
    prompt_logprobs: dict[int, Tensor] = field(default_factory=dict)
    draw: DeviceDraw | None = None
    hidden: Tensor | None = None


@dataclass(frozen=True, slots=True)
class _Members:
    """The adapters of a decode batch, which stay the same as long as its members do."""

    key: tuple[int, ...]
    tiles: TileBlock | None
    adapted: Adapted


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
        self._adapters = adapters
        self._masks = masks
        self._sizes = sizes
        self._watch_logits = watch_logits
        self._width = -(-sizes.max_model_len // kv.block_size)
        buckets = buckets_for(sizes.max_sequences)
        row_buckets = [rows for rows in ROW_BUCKETS if rows <= sizes.max_batch_tokens] if kernels.has_static_prefill else []
        self._graphs = StepGraphs(self._run, buckets, row_buckets, is_recording=has_graphs)
        self._layouts = {bucket: BlockLayout.of(bucket, bucket, 0, self._width) for bucket in buckets}
        self._row_layouts = {rows: BlockLayout.of(rows, buckets[-1], buckets[-1], self._width) for rows in row_buckets}
        self._block = StepBlock(buckets[-1], self._capacity(), kernels.device)
        self._sampler = DeviceSampler(sizes.vocab_size, buckets[-1], kernels.device)
        self._choice = self._sampler.new_choice(buckets[-1])
        self._places: dict[str, int] = {}  # sequence id -> its place among the tokens of the last draw
        self._members: _Members | None = None  # of the decode batch whose tiles are on the device

    def _capacity(self) -> int:
        """int32 of the largest step: a prefill in which every row wants logits, with the tiles of its rows and of its head."""
        rows, sequences = self._sizes.max_batch_tokens, max(self._layouts)
        tiles = block_ints(rows, sequences, EAGER_ENTRIES, PREFILL_TILE_ROWS)
        return BlockLayout.of(max(rows, sequences), sequences, rows, self._width).tiles + 2 * tiles

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Record every decode step, largest first, so that the smaller ones find their memory in its pool."""
        for bucket in reversed(self._graphs.buckets):
            layout = self._layouts[bucket]
            host = self._block.begin(layout.tiles + 16)
            host[: layout.tiles + 16] = 0
            host[layout.kv_slots : layout.kv_slots + bucket] = -1
            host[layout.sources : layout.sources + bucket] = self._block.source_of_own(layout.tokens)
            self._block.send(layout.tiles + 16)
            for adapted in (Adapted.NOTHING, Adapted.LAYERS):
                self._graphs.step(GraphKey(bucket, adapted))
        for rows in reversed(self._graphs.row_buckets):
            layout = self._row_layouts[rows]
            host = self._block.begin(layout.tiles + 16)
            host[: layout.tiles + 16] = 0
            pad_rows(host, layout, 0, 0, self._block.source_of_own(layout.tokens))
            self._block.send(layout.tiles + 16)
            for adapted in (Adapted.NOTHING, Adapted.LAYERS):
                self._graphs.step(GraphKey(rows, adapted, is_decode=False))

    # ---- launch

    @torch.inference_mode()
    def launch(self, work: list[Work]) -> DeviceFlight:
        """Start the forward pass. See `StepRunner`."""
        shape = step_shape(work)
        side = side_groups(work, self._adapters.slot_of, self._adapters.tensors)
        flight = None
        if side is None and self._kernels.takes_tiles:
            flight = self._decode(work) if shape.is_decode else self._recorded_rows(work, shape)
        if flight is None:
            flight = self._launch_rows(work, shape, side)
        if self._watch_logits is not None:
            self._watch_logits(work, flight.logits)
        return flight

    def _decode(self, work: list[Work]) -> DeviceFlight | None:
        """One row a sequence, over static memory; None where the adapters have more pages than that has room for."""
        bucket = self._graphs.bucket(len(work))
        members = self._decode_members(work, bucket)
        if members is None:
            return None
        layout, tiles = self._layouts[bucket], members.tiles
        is_new = members is not self._members and tiles is not None
        host = self._block.begin(layout.tiles + (len(tiles.data) if tiles is not None else 0))
        pending = pending_places(work, self._places)
        write_decode(host, layout, work, self._kv.block_size, pending, self._block.source_of_own(layout.tokens))
        if is_new and tiles is not None:
            host[layout.tiles : layout.tiles + len(tiles.data)] = tiles.data
        self._block.send(layout.tiles + (len(tiles.data) if is_new and tiles is not None else 0))
        self._members = members
        logits = self._graphs.step(GraphKey(bucket, members.adapted))[: len(work)]
        return DeviceFlight(work, logits, list(range(len(work))), None)

    def _decode_members(self, work: Sequence[Work], bucket: int) -> _Members | None:
        key = (bucket, *[item.sequence.arrival_index for item in work])
        if self._members is not None and self._members.key == key:
            return self._members
        recipes = recipes_of(work, self._adapters.slot_of)
        if not any(recipes):
            return _Members(key, None, Adapted.NOTHING)
        tiles = build_tiles(recipes, [1] * len(work), self._slot_pages(), DECODE_TILE_ROWS)
        if tiles.pair_count > GRAPH_ENTRIES * bucket or self._layouts[bucket].tiles + len(tiles.data) > self._block.capacity:
            return None
        return _Members(key, tiles, Adapted.LAYERS_AND_HEAD if self._has_head(work) else Adapted.LAYERS)

    def _run(self, key: GraphKey) -> Tensor:
        """Launch a step over the static memory of its bucket; recorded once, replayed ever after."""
        return self._run_decode(key.rows, key.adapted) if key.is_decode else self._run_rows(key.rows, key.adapted)

    def _run_decode(self, bucket: int, adapted: Adapted) -> Tensor:
        layout, view = self._layouts[bucket], self._block.view
        inputs = StepInputs(
            token_ids=self._block.gather(view(layout.sources, bucket)),
            positions=view(layout.positions, bucket),
            kv_slots=view(layout.kv_slots, bucket),
            query_start=view(layout.query_start, bucket + 1),
            context_lens=view(layout.context_lens, bucket),
            block_tables=view(layout.tables, bucket * self._width).view(bucket, self._width),
            logit_rows=None,
            lora=self._static_tiles(layout, adapted, DECODE_TILE_ROWS),
            max_query=1,
            max_context=self._sizes.max_model_len,
        )
        logits = self._model.forward(inputs, self._kv, self._adapters.tensors)
        self._sampler.greedy(logits, self._choice)
        return logits

    def _static_tiles(self, layout: BlockLayout, adapted: Adapted, tile_rows: int) -> DeviceRows | None:
        if adapted is Adapted.NOTHING:
            return None
        block = self._block.view(layout.tiles, self._block.capacity - layout.tiles)
        rows = DeviceRows(DeviceTiles(block, tile_rows), GRAPH_ENTRIES * layout.rows)
        if adapted is Adapted.LAYERS:
            return rows
        return DeviceRows(rows.tiles, rows.pair_count, rows)

    def _recorded_rows(self, work: list[Work], shape: StepShape) -> DeviceFlight | None:
        """A small step with prompt chunks: its layers as recorded, its output projection launched. None where that cannot be."""
        rows = self._graphs.row_bucket(shape.rows)
        if rows is None or shape.logit_rows is None or any(item.wants_prompt_logprobs or item.embeds for item in work):
            return None
        layout, blocks = self._row_layouts[rows], self._row_tiles(work, shape, RECORDED_TILE_ROWS)
        end = layout.tiles + sum(len(block.data) for block in blocks)
        if len(blocks) > 1 or end > self._block.capacity or any(b.pair_count > GRAPH_ENTRIES * rows for b in blocks):
            return None
        host = self._block.begin(end)
        pending = pending_places(work, self._places)
        write_rows(host, layout, work, shape, self._kv.block_size, pending, self._block.source_of_own(layout.tokens))
        for block in blocks:
            host[layout.tiles : end] = block.data
        self._members = None  # the device's tiles are these now
        self._block.send(end)
        adapted = Adapted.LAYERS if blocks else Adapted.NOTHING
        h = self._graphs.step(GraphKey(rows, adapted, is_decode=False))
        wanted = self._row_inputs(layout, None, rows, len(shape.logit_rows))
        return self._drawing_flight(work, self._model.logits(h, wanted, self._adapters.tensors))

    def _run_rows(self, rows: int, adapted: Adapted) -> Tensor:
        layout = self._row_layouts[rows]
        inputs = self._row_inputs(layout, self._static_tiles(layout, adapted, RECORDED_TILE_ROWS), rows, layout.logit_rows)
        return self._model.hidden(inputs, self._kv, self._adapters.tensors)

    def _row_inputs(self, layout: BlockLayout, lora: DeviceRows | None, rows: int, logit_rows: int) -> StepInputs:
        """The static memory of a step with prompt chunks."""
        view, sequences = self._block.view, layout.sequences
        return StepInputs(
            token_ids=self._block.gather(view(layout.sources, rows)),
            positions=view(layout.positions, rows),
            kv_slots=view(layout.kv_slots, rows),
            query_start=view(layout.query_start, sequences + 1),
            context_lens=view(layout.context_lens, sequences),
            block_tables=view(layout.tables, sequences * self._width).view(sequences, self._width),
            logit_rows=view(layout.logits, logit_rows),
            lora=lora,
            max_query=rows,
            max_context=self._sizes.max_model_len,
        )

    def _drawing_flight(self, work: list[Work], logits: Tensor, hidden: Tensor | None = None) -> DeviceFlight:
        rows, drawing = _drawing_rows(work)
        if rows:
            self._sampler.greedy(_selected(logits, rows), self._choice)
        return DeviceFlight(work, logits, drawing, rows, hidden=hidden)

    def _launch_rows(self, work: list[Work], shape: StepShape, side: tuple[SideGroup, ...] | None) -> DeviceFlight:
        """Any number of rows a sequence, operation by operation."""
        wanted = shape.logit_rows
        layout = BlockLayout.of(shape.rows, shape.sequences, 0 if wanted is None else len(wanted), shape.table_width)
        tile_rows = DECODE_TILE_ROWS if shape.max_query == 1 else PREFILL_TILE_ROWS
        blocks = self._row_tiles(work, shape, tile_rows) if self._kernels.takes_tiles else []
        end = layout.tiles + sum(len(block.data) for block in blocks)
        host = self._block.begin(end)
        pending = pending_places(work, self._places)
        write_rows(host, layout, work, shape, self._kv.block_size, pending, self._block.source_of_own(layout.tokens))
        at = layout.tiles
        for block in blocks:
            host[at : at + len(block.data)] = block.data
            at += len(block.data)
        self._members = None  # the device's tiles are these now
        self._block.send(end)
        lora = self._device_rows(layout, shape, blocks) if self._kernels.takes_tiles else self._plain_rows(work)
        inputs = self._inputs(layout, shape, lora, side)
        hidden_rows = embedding_rows(work)
        if hidden_rows:
            inputs.hidden_rows = upload(hidden_rows, self._kernels.device)
        logits = self._model.forward(inputs, self._kv, self._adapters.tensors)
        return self._drawing_flight(work, logits, inputs.hidden)

    def _inputs(
        self,
        layout: BlockLayout,
        shape: StepShape,
        lora: LoraRows | DeviceRows | None,
        side: tuple[SideGroup, ...] | None,
    ) -> StepInputs:
        view, rows, sequences = self._block.view, shape.rows, shape.sequences
        tables = view(layout.tables, sequences * shape.table_width).view(sequences, shape.table_width)
        return StepInputs(
            token_ids=self._block.gather(view(layout.sources, rows)),
            positions=view(layout.positions, rows),
            kv_slots=view(layout.kv_slots, rows),
            query_start=view(layout.query_start, sequences + 1),
            context_lens=view(layout.context_lens, sequences),
            block_tables=tables,
            logit_rows=None if shape.logit_rows is None else view(layout.logits, len(shape.logit_rows)),
            lora=lora,
            side=side,
            max_query=shape.max_query,
            max_context=shape.max_context,
        )

    # ---- adapters of a step

    def _slot_pages(self) -> Any:
        return self._adapters.tensors.slot_pages.numpy()

    def _has_head(self, work: Sequence[Work]) -> bool:
        named = {term.adapter_id for item in work for term in item.sequence.terms}
        return any(self._adapters.adapts(adapter_id, self._sizes.head_module) for adapter_id in named)

    def _row_tiles(self, work: Sequence[Work], shape: StepShape, tile_rows: int) -> list[TileBlock]:
        """The tiles of a step's rows, and of its rows that want logits where an adapter changes the output projection."""
        recipes = recipes_of(work, self._adapters.slot_of)
        if not any(recipes):
            return []
        blocks = [build_tiles(recipes, [item.count for item in work], self._slot_pages(), tile_rows)]
        if self._has_head(work):
            counts = [item.count if item.wants_prompt_logprobs else int(item.draws_token) for item in work]
            heads: list[Recipe] = [recipe for recipe, count in zip(recipes, counts, strict=True) if count]
            blocks.append(build_tiles(heads, [count for count in counts if count], self._slot_pages(), DECODE_TILE_ROWS))
        return blocks

    def _device_rows(self, layout: BlockLayout, shape: StepShape, blocks: list[TileBlock]) -> DeviceRows | None:
        if not blocks:
            return None
        first = self._block.view(layout.tiles, len(blocks[0].data))
        tile_rows = DECODE_TILE_ROWS if shape.max_query == 1 else PREFILL_TILE_ROWS
        head = None
        if len(blocks) > 1:
            second = self._block.view(layout.tiles + len(blocks[0].data), len(blocks[1].data))
            head = DeviceRows(DeviceTiles(second, DECODE_TILE_ROWS), blocks[1].pair_count)
        return DeviceRows(DeviceTiles(first, tile_rows), blocks[0].pair_count, head)

    def _plain_rows(self, work: Sequence[Work]) -> LoraRows | None:
        return lora_rows(recipes_of(work, self._adapters.slot_of), [item.count for item in work])

    # ---- tokens

    @torch.inference_mode()
    def draw(self, flight: DeviceFlight) -> None:
        """Start drawing. See `StepRunner`."""
        flight.prompt_logprobs = _prompt_logprobs(flight)
        drawing = [flight.work[index] for index in flight.drawing]
        self._places = {}
        if not drawing:
            return
        logits = flight.logits if flight.rows is None else _selected(flight.logits, flight.rows)
        mask = row_mask(self._masks, drawing, self._sizes.vocab_size)
        flight.draw = self._sampler.draw(logits, [draw_row(item) for item in drawing], self._choice, mask)
        self._block.drawn[: len(drawing)].copy_(self._choice.next_tokens[: len(drawing)])
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


def _drawing_rows(work: Sequence[Work]) -> tuple[list[int], list[int]]:
    """Rows of the logits that draw a token, and whose they are."""
    rows: list[int] = []
    drawing: list[int] = []
    end = 0
    for index, item in enumerate(work):
        end += item.count if item.wants_prompt_logprobs else int(item.draws_token)
        if item.draws_token:
            rows.append(end - 1)
            drawing.append(index)
    return rows, drawing


def _selected(logits: Tensor, rows: list[int]) -> Tensor:
    return logits if len(rows) == logits.shape[0] else logits[upload(rows, logits.device)]


def _prompt_logprobs(flight: DeviceFlight) -> dict[int, Tensor]:
    """[rows] log-probability of the prompt token after each row, on the device, by work index."""
    found: dict[int, Tensor] = {}
    first = 0
    for index, item in enumerate(flight.work):
        if item.wants_prompt_logprobs:
            following = item.sequence.tokens[item.start + 1 : min(item.start + item.count + 1, item.sequence.prompt_count)]
            logits = flight.logits[first : first + len(following)]
            ids = upload(following, logits.device)
            found[index] = logits.log_softmax(dim=1).gather(1, ids[:, None])[:, 0]
        if flight.rows is not None:
            first += item.count if item.wants_prompt_logprobs else int(item.draws_token)
    return found
