"""Steps of fixed shapes over static memory, recorded once: decode batches, and small steps with prompt chunks.

A decode step is one copy of metadata and one graph. A small step with prompt chunks is a graph up to its last layer's attention;
what follows is launched, for the rows that want logits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from node.engine.device_batch import StepShape, pad_rows, pending_places, wanted_rows, write_decode, write_rows
from node.engine.graphs import ROW_BUCKETS, Adapted, GraphKey, StepGraphs, buckets_for
from node.engine.sizing import DeviceSizes
from node.engine.step_adapters import Members, StepAdapters, adapted_of, most_tile_ints, sent_rows, static_rows
from node.engine.step_block import BlockLayout, StepBlock
from node.engine.step_plan import Work
from node.kernels.device_rows import SHORT_ROWS, DeviceRows
from node.kernels.head_rows import LogitTops
from node.kernels.lora_tiles import empty_tiles
from node.kernels.ops import Kernels
from node.models.inputs import Attended, CausalLM, KVCache, StepInputs

GRAPH_ENTRIES = 16  # pages of one row's recipe that a graph has room for; a batch with more is launched without one
EAGER_ENTRIES = 64


class RecordedSteps:
    """See above.

    Args:
        model: The decoder. kernels: what it runs on. kv: its paged cache. adapters: their tiles.
        sizes: Bounds of a step.
        choose: Called with the logits [W, V] of a decode step and their largest, inside its graph.
        is_watched: Somebody reads the logits of every row.
        is_recording: Record steps. False on devices that cannot, and for tests.

    Attributes:
        block: The static memory, which steps that are not recorded use as well.
        width: KV blocks of one sequence at most.
    """

    def __init__(
        self,
        model: CausalLM,
        kernels: Kernels[Any, Any],
        kv: KVCache,
        adapters: StepAdapters,
        sizes: DeviceSizes,
        choose: Callable[[Tensor, LogitTops | None], None],
        *,
        is_watched: bool,
        is_recording: bool,
    ) -> None:
        self._model = model
        self._kernels = kernels
        self._kv = kv
        self._adapters = adapters
        self._sizes = sizes
        self._short_bound = kernels.short_bound
        self._choose = choose
        self._is_watched = is_watched
        self.width = -(-sizes.max_model_len // kv.block_size)
        buckets = buckets_for(sizes.max_sequences)
        row_buckets = [rows for rows in ROW_BUCKETS if rows <= sizes.max_batch_tokens] if kernels.has_static_prefill else []
        self.graphs = StepGraphs(self._run, buckets, row_buckets, is_recording=is_recording)
        self._layouts = {bucket: BlockLayout.of(bucket, bucket, 0, self.width) for bucket in buckets}
        self._row_layouts = {rows: BlockLayout.of(rows, buckets[-1], buckets[-1], self.width) for rows in row_buckets}
        self.block = StepBlock(buckets[-1], self._capacity(), kernels.device)
        self._no_tiles = empty_tiles(sizes.processors)
        self._members: Members | None = None  # of the decode batch whose tiles are on the device
        self._wanted: list[int] = []  # of the same batch

    def _capacity(self) -> int:
        """int32 of the largest step: a prefill in which every row wants logits, with the tiles of its rows and of its head."""
        rows, sequences = self._sizes.max_batch_tokens, max(self._layouts)
        tiles = most_tile_ints(self._sizes, sequences, EAGER_ENTRIES)
        return BlockLayout.of(max(rows, sequences), sequences, rows, self.width).tiles + 2 * tiles

    def forget_tiles(self) -> None:
        """Another step's tiles are on the device now."""
        self._members = None

    def warm_up(self) -> None:
        """Record every step, largest first, so that the smaller ones find their memory in its pool."""
        with ThreadPoolExecutor(1, thread_name_prefix="compile-plan") as threads:
            short = threads.submit(self._plan_short_step)
            self._record_decodes()
            short.result()
        for rows in reversed(self.graphs.row_buckets):
            layout = self._row_layouts[rows]
            pad_rows(self._blank(layout), layout, 0, 0, self.block.source_of_own(layout.tokens))
            self._record(layout, rows, is_decode=False)

    def _record_decodes(self) -> None:
        for bucket in reversed(self.graphs.buckets):
            layout = self._layouts[bucket]
            host = self._blank(layout)
            host[layout.kv_slots : layout.kv_slots + bucket] = -1
            host[layout.sources : layout.sources + bucket] = self.block.source_of_own(layout.tokens)
            self._record(layout, bucket, is_decode=True)

    @torch.inference_mode()
    def _plan_short_step(self) -> None:
        """Compile what plans a short step's attention, which takes 1.5 s at a node's first start, beside the decode steps: for a
        step of no sequence, in zeros of its own that lie as its inputs do."""
        rows = [rows for rows in self._row_layouts if self._has_short(rows)]
        if not rows:
            return
        layout, device = self._row_layouts[rows[-1]], self._kernels.device
        stream: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        with torch.cuda.device(device), torch.cuda.stream(stream):
            inputs = self._inputs(layout, None, layout.logit_rows, StepBlock(layout.sequences, self.block.capacity, device))
            tables, starts, lens = inputs.block_tables, inputs.query_start, inputs.context_lens
            self._kernels.plan_attention(tables, starts, lens, inputs.max_query, inputs.max_context, is_short=True)
            stream.synchronize()

    def _blank(self, layout: BlockLayout) -> Any:
        end = layout.tiles + len(self._no_tiles)
        host = self.block.begin(end)
        host[: layout.tiles] = 0
        host[layout.tiles : end] = self._no_tiles
        return host

    def _record(self, layout: BlockLayout, rows: int, *, is_decode: bool) -> None:
        self.block.send(layout.tiles + len(self._no_tiles))
        kinds = (Adapted.NOTHING, Adapted.LAYERS, Adapted.MANY_LAYERS)
        has_short = not is_decode and self._has_short(rows)
        for adapted in kinds if rows <= SHORT_ROWS else kinds[:2]:
            self.graphs.step(GraphKey(rows, adapted, is_decode))
            if has_short:
                self.graphs.step(GraphKey(rows, adapted, is_decode, is_short=True))

    def _has_short(self, rows: int) -> bool:
        return self._short_bound is not None and rows <= self._short_bound.rows

    def _run(self, key: GraphKey) -> tuple[Tensor, ...]:
        """Launch a step over the static memory of its bucket. Returns the logits of a decode step, `Attended` of another."""
        return (self._run_decode(key.rows, key.adapted),) if key.is_decode else self._run_rows(key)

    # ---- one row a sequence

    def decode(self, work: list[Work], places: Mapping[str, int]) -> Tensor | None:
        """Logits [W, V]; None where the adapters have more pages than a graph has room for.

        Args:
            places: Sequence id -> its place among the tokens of the last draw.
        """
        bucket = self.graphs.bucket(len(work))
        members = self._members_of(work, bucket)
        if members is None:
            return None
        layout = self._layouts[bucket]
        tiles = members.tiles.data if members is not self._members and members.tiles is not None else None
        end = layout.tiles + (0 if tiles is None else len(tiles))
        host = self.block.begin(end)
        own = self.block.source_of_own(layout.tokens)
        wanted = self._wanted if members is self._members else wanted_rows(work, is_watched=self._is_watched)
        write_decode(host, layout, work, self._kv.block_size, pending_places(work, places), own, wanted)
        if tiles is not None:
            host[layout.tiles : end] = tiles
        self.block.send(end)
        self._members, self._wanted = members, wanted
        (logits,) = self.graphs.step(GraphKey(bucket, members.adapted))
        return logits[: len(work)]

    def _members_of(self, work: Sequence[Work], bucket: int) -> Members | None:
        # Whoever was preempted may come back to other slots and pages: epochs only grow.
        key = (bucket, sum([item.epoch for item in work]), *[item.sequence.arrival_index for item in work])
        if self._members is not None and self._members.key == key:
            return self._members
        members = self._adapters.members(work, key)
        tiles = members.tiles
        if tiles is None:
            return members
        fits = self._layouts[bucket].tiles + len(tiles.data) <= self.block.capacity
        return members if fits and tiles.pair_count <= GRAPH_ENTRIES * bucket else None

    def _run_decode(self, bucket: int, adapted: Adapted) -> Tensor:
        layout = self._layouts[bucket]
        lora = static_rows(self.block, layout, adapted, GRAPH_ENTRIES * bucket)
        most = self._sizes.max_model_len
        inputs = self.block.inputs(layout, lora, logit_rows=None, max_query=1, max_context=most, has_tops=True)
        logits = self._model.forward(inputs, self._kv, self._adapters.tensors)
        self._choose(logits, inputs.tops)
        return logits

    # ---- prompt chunks

    def chunks(self, work: list[Work], shape: StepShape, places: Mapping[str, int]) -> tuple[Tensor, LogitTops | None] | None:
        """Logits [W, V] of a small step with prompt chunks, and their largest; None where it is not one or asks for more than
        next tokens."""
        rows = self.graphs.row_bucket(shape.rows)
        if rows is None or shape.logit_rows is None or any(item.wants_prompt_logprobs or item.embeds for item in work):
            return None
        layout, tiles = self._row_layouts[rows], self._adapters.row_tiles(work)
        end = layout.tiles + (0 if tiles is None else tiles.size)
        if end > self.block.capacity or (tiles is not None and tiles.rows.pair_count > GRAPH_ENTRIES * rows):
            return None
        host = self.block.begin(end)
        own = self.block.source_of_own(layout.tokens)
        wanted = wanted_rows([item for item in work if item.draws_token], is_watched=self._is_watched)
        write_rows(host, layout, work, shape, self._kv.block_size, pending_places(work, places), own, wanted)
        if tiles is not None:
            tiles.write(host, layout.tiles)
        self.forget_tiles()
        self.block.send(end)
        adapted = Adapted.NOTHING if tiles is None else adapted_of(rows, tiles.rows)
        bound = self._short_bound
        is_short = bound is not None and bound.holds([(item.count, item.start + item.count) for item in work])
        attended = self.graphs.step(GraphKey(rows, adapted, is_decode=False, is_short=is_short))
        inputs = self._inputs(layout, sent_rows(self.block, layout, tiles), len(shape.logit_rows))
        wanted_parts = Attended(*[part[: len(shape.logit_rows)] for part in attended])
        return self._model.logits(wanted_parts, inputs, self._adapters.tensors), inputs.tops

    def _run_rows(self, key: GraphKey) -> Attended:
        """Of as many rows that want logits as there may be: those beyond the step's own are any."""
        layout = self._row_layouts[key.rows]
        lora = static_rows(self.block, layout, key.adapted, GRAPH_ENTRIES * layout.rows)
        inputs = self._inputs(layout, lora, layout.logit_rows)
        inputs.is_short = key.is_short
        return self._model.attended(inputs, self._kv, self._adapters.tensors)

    def _inputs(
        self, layout: BlockLayout, lora: DeviceRows | None, logit_rows: int, block: StepBlock | None = None
    ) -> StepInputs:
        most = self._sizes.max_model_len
        return (block or self.block).inputs(
            layout, lora, logit_rows=logit_rows, max_query=layout.rows, max_context=most, has_tops=True
        )
