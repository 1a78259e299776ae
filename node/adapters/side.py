"""What an adapter needs beside its rank pages, computed once when it is loaded: DoRA's gains, biases, the embedding.

Runs on the loader thread. DoRA's gain is g = m / ||W + s B A|| over each row of the module, in float32 over the base weight
(2402.09353; PEFT computes the same in every forward pass). The pages get g * B, so that a step only multiplies W x by g.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from node.adapters.binding import Binding, BoundEmbedding, BoundModule
from node.adapters.device_side import page_locked
from node.errors import AdapterInvalidError
from node.kernels.layout import PageLayout
from node.kernels.lora import EmbeddingDelta, SideTensors

Values = npt.NDArray[Any]  # as `TensorFile.read` gives them
Floats = npt.NDArray[np.float32]
WriteB = Callable[[BoundModule, Floats], None]  # B [outputs, rank] of one module into the pages
_CHUNK_ELEMENTS = 1 << 22  # of W + s B A at once: 16 MiB


class BaseWeights(Protocol):
    """The base's own matrices. `node.models.decoder.Decoder` is one."""

    def linear_weight(self, index: int) -> Tensor:
        """[outputs, inputs] of the linear module with this index in the page layout."""
        ...

    def embedding_weight(self) -> Tensor:
        """[V, H]."""
        ...


def side_bytes(binding: Binding, item_bytes: int) -> int:
    """Memory of an adapter's side tensors. `item_bytes`: of a number in the pages."""
    vectors = sum(
        4 * module.out_features * ((module.magnitude_tensor is not None) + (module.bias_tensor is not None))
        for module in binding.modules
    )
    if binding.embedding is None:
        return vectors
    rows, hidden, rank = binding.embedding.vocab_size, binding.embedding.hidden_size, binding.embedding.rank
    return vectors + rows * rank * item_bytes + 4 * hidden * (rank + 1)


class SideBuilder:
    """Keeps the tensors of one adapter that pages cannot take as they are, and makes `SideTensors` of them.

    Args:
        binding: Of the adapter. layout: the model's pages.
        base: None where the base's weights cannot be read; then only adapters that need them are refused.
        dtype: Of the pages.
    """

    def __init__(self, binding: Binding, layout: PageLayout, base: BaseWeights | None, dtype: torch.dtype) -> None:
        self._binding = binding
        self._layout = layout
        self._base = base
        self._dtype = dtype
        self._kept: dict[str, Tensor] = {}
        self._copies = dict(binding.copies)
        self._wanted = set(self._copies)
        for module in binding.modules:
            if module.magnitude_tensor is not None:
                self._wanted |= {module.a_tensor, module.b_tensor, module.magnitude_tensor}
            if module.bias_tensor is not None:
                self._wanted.add(module.bias_tensor)
        if binding.embedding is not None:
            embedding = binding.embedding
            self._wanted |= {embedding.a_tensor, embedding.b_tensor}
            if embedding.magnitude_tensor is not None:
                self._wanted.add(embedding.magnitude_tensor)

    def wants(self, tensor: str) -> bool:
        """Whether `take` is to be called with this tensor of the file."""
        return tensor in self._wanted

    def take(self, tensor: str, values: Values) -> None:
        """One tensor as it is in the file.

        Raises:
            AdapterInvalidError: adapter_feature_unsupported. A copy of a base matrix differs from the base's.
        """
        numbers = _as_tensor(values)
        if tensor in self._copies:
            self._check_copy(tensor, numbers)
        else:
            self._kept[tensor] = numbers

    def finish(self, write_b: WriteB) -> SideTensors | None:
        """Everything was taken: compute the side tensors, and write g * B of DoRA's modules. None when there are none."""
        gains: dict[int, Tensor] = {}
        biases: dict[int, Tensor] = {}
        for module in self._binding.modules:
            if not module.needs_side:
                continue
            index = self._layout.spans[module.name].index
            rows = slice(module.first_row, module.first_row + module.out_features)
            gain = self._gain(module, index, rows, write_b) if module.magnitude_tensor is not None else None
            if gain is not None:
                gains[index] = gain - 1
            if module.bias_tensor is not None:
                bias = module.scale * self._kept[module.bias_tensor].float().flatten()[rows]
                biases[index] = bias if gain is None else gain * bias
        embedding = None if self._binding.embedding is None else self._embedding(self._binding.embedding)
        self._kept.clear()
        if not gains and not biases and embedding is None:
            return None
        side = SideTensors(gains, biases, embedding)
        # Else the step loop would wait until the copy that it asks for can begin.
        is_for_gpu = self._base is not None and self._base.embedding_weight().is_cuda
        return page_locked(side) if is_for_gpu else side

    def _gain(self, module: BoundModule, index: int, rows: slice, write_b: WriteB) -> Tensor:
        """g [outputs] float32 of one module; writes g * B."""
        a = self._kept[module.a_tensor].float()
        b = self._kept[module.b_tensor][rows].float()
        magnitude = self._kept[module.magnitude_tensor or ""].float().flatten()[rows]
        gain = magnitude / row_norms(self._needed().linear_weight(index), a, b, module.scale)
        _refuse_nonfinite(gain, module.name)
        write_b(module, (gain.unsqueeze(1) * b).numpy())
        return gain

    def _embedding(self, bound: BoundEmbedding) -> EmbeddingDelta:
        a, b = self._kept[bound.a_tensor].float(), self._kept[bound.b_tensor].float()
        rows = a.T.to(self._dtype).contiguous()
        if bound.magnitude_tensor is None:
            return EmbeddingDelta(rows, bound.scale * b, None)
        # PEFT norms an embedding over the vocabulary, one gain a feature.
        magnitude = self._kept[bound.magnitude_tensor].float().flatten()
        gain = magnitude / row_norms(self._needed().embedding_weight().T, a, b, bound.scale)
        _refuse_nonfinite(gain, "model.embed_tokens")
        return EmbeddingDelta(rows, gain.unsqueeze(1) * (bound.scale * b), gain - 1)

    def _check_copy(self, tensor: str, values: Tensor) -> None:
        """A whole embedding or head in the file is served when it is the base's: PEFT saves both beside adapters of them.

        The file may hold them in a narrower type than the base does, or the base may run in a narrower one.
        """
        module = self._copies[tensor]
        base = self._needed()
        ours = base.embedding_weight() if module == "model.embed_tokens" else base.linear_weight(self._layout.spans[module].index)
        with beside_steps(ours.device):
            ours = ours.cpu()
        if not torch.equal(values.to(ours.dtype), ours) and not torch.equal(ours.to(values.dtype), values):
            raise AdapterInvalidError(
                f"tensor {tensor[:120]!a} is a whole {module} that differs from this base model's: trained embeddings are not"
                " served; save the adapter with save_embedding_layers=False if they were not meant to be trained",
                code="adapter_feature_unsupported",
            )

    def _needed(self) -> BaseWeights:
        if self._base is None:
            raise AdapterInvalidError(
                "this base model runs on weights that cannot be read back, which DoRA and adapters of the embedding need",
                code="adapter_feature_unsupported",
            )
        return self._base


def row_norms(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """||W + scale * B A|| of every row, [O] float32 on the CPU, a few rows at a time.

    Args:
        weight: [O, H], any float type and device. a: [r, H], b: [O, r], float32.
    """
    device = weight.device
    with beside_steps(device):
        a, b = a.to(device), b.to(device)
        norms = torch.empty(weight.shape[0], dtype=torch.float32, device=device)
        step = max(1, _CHUNK_ELEMENTS // weight.shape[1])
        for first in range(0, weight.shape[0], step):
            rows = slice(first, first + step)
            norms[rows] = torch.addmm(weight[rows].float(), b[rows], a, alpha=scale).norm(dim=1)
        return norms.cpu()


def beside_steps(device: torch.device) -> AbstractContextManager[object]:
    """What a loader thread asks of a GPU goes to a stream of its own: in the steps' stream it would stand between two of them."""
    if device.type != "cuda":
        return nullcontext()
    return torch.cuda.stream(torch.cuda.Stream(device))  # type: ignore[no-untyped-call]


def _refuse_nonfinite(gain: Tensor, module: str) -> None:
    if not bool(torch.isfinite(gain).all()):
        raise AdapterInvalidError(
            f"{module}: the magnitude divided by ||W + s B A|| is not finite; the adapter is damaged or of another base",
            code="adapter_nonfinite",
        )


def _as_tensor(values: Values) -> Tensor:
    """File values as torch sees them; uint16 are the bits of bfloat16. A copy: the file's bytes are read-only."""
    if values.dtype == np.uint16:
        return torch.from_numpy(values.copy()).view(torch.bfloat16)
    return torch.from_numpy(values.copy())
