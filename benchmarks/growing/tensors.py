"""The tensors of the larger model, made one at a time from those of the trained one.

The mathematics, r = old width / new width:
  width    the new channels of the residual stream are always zero: embedding columns, and the rows of o_proj and down_proj that
           write there. RMSNorm then sees a mean of squares r times as large, so its weights are times sqrt(r) and its eps times r.
  heads    head_dim stays, for rope and the attention's scale depend on it. A query head stays with its key-value head, which is
           copied where it served more queries than the new ratio allows. A new head adds nothing: o_proj does not read it, or
           its values are zero.
  neurons  a new one adds nothing: down_proj does not read it, or its up_proj row is zero.
  layers   new ones, behind the trained ones, have new heads and neurons only.

Decides what stands where the output cannot see it: random values of the matrix's own scale, so that compression and kernels
meet ordinary weights, kept inside the range of the trained values of the same row, so that no scale of int8 rows or int4
groups changes; that new heads and neurons are silenced alternately by what reads them and by what makes them, so that no matrix
of a new layer is all zeros: equal matrices would be stored, and held in a processor's cache, as one; and that norms are stored
in float32, since sqrt(r) is seldom a half-precision number.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors import safe_open
from torch import Tensor

from fastdraft.errors import TargetError
from fastdraft.modeling.architecture import Architecture
from fastdraft.modeling.source import weight_files
from growing.shape import GROUP, Axis, find_axes

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
CHUNK = 1 << 24
"""Random values drawn at a time."""
_EMBEDDING, _HEAD, _NORM = "model.embed_tokens", "lm_head", "model.norm"
_ATTENTION, _MLP = "self_attn", "mlp"
_AXES = {
    _EMBEDDING: ("vocab", "hidden"),
    _HEAD: ("vocab", "hidden"),
    f"{_ATTENTION}.q_proj": ("query", "hidden"),
    f"{_ATTENTION}.k_proj": ("kv", "hidden"),
    f"{_ATTENTION}.v_proj": ("kv", "hidden"),
    f"{_ATTENTION}.o_proj": ("hidden", "query"),
    f"{_MLP}.gate_proj": ("inner", "hidden"),
    f"{_MLP}.up_proj": ("inner", "hidden"),
    f"{_MLP}.down_proj": ("hidden", "inner"),
}
"""The axes (outputs, inputs) of every matrix, by its module's name inside the layer."""
_WRITE = (_EMBEDDING, f"{_ATTENTION}.o_proj", f"{_MLP}.down_proj")
"""What writes to the residual stream: zero beside the trained values, but for columns that read dead entries."""
_KILL = (f"{_ATTENTION}.v_proj", f"{_MLP}.up_proj")
"""What makes entries dead: rows of zeros."""
_NORMS = ("input_layernorm", "post_attention_layernorm", _NORM)


@dataclass(frozen=True)
class Storage:
    """How the larger model is stored, and what fills the places that its output cannot see."""

    dtype: Literal["fp16", "bf16", "fp32"] = "fp16"
    """Precision of the matrices."""
    fill: Literal["random", "zero"] = "random"
    seed: int = 0
    """Of the random values; each tensor's follow from it and the tensor's name."""

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]


class Grower:
    """Makes the tensors of the larger model one at a time.

    Args:
        source: Shape of the trained model.
        wanted: Shape to grow to; see `shape.check_shape`.
        storage: Precision, fill and seed.
    """

    def __init__(self, source: Architecture, wanted: Architecture, storage: Storage) -> None:
        self.axes = {trained: find_axes(source, wanted, trained) for trained in (True, False)}
        self.storage, self.norm_scale = storage, math.sqrt(source.hidden_size / wanted.hidden_size)

    def grow(self, module: str, name: str, tensor: Tensor, trained: bool) -> Tensor:
        """The larger tensor.

        Args:
            module: Its module inside the layer, such as `mlp.up_proj`.
            name: Its full name.
            tensor: The source's; for a new layer that of a trained one, of which only shape and scale are taken.
            trained: Whether the values of `tensor` are wanted.
        """
        axes = self.axes[trained]
        if module in _NORMS:
            return self._norm(tensor.float(), axes["hidden"])
        if module not in _AXES:  # norms inside a head: heads are not changed
            return tensor.float()
        rows, columns = (axes[axis] for axis in _AXES[module])
        generator = torch.Generator().manual_seed(self.storage.seed * 1_000_003 + zlib.crc32(name.encode()))
        if tensor.ndim == 1:  # a bias: one column, read by nothing that is dead
            place = torch.zeros(1, dtype=torch.long)
            return self._matrix(module, tensor[:, None], (rows, Axis(place, place, place.bool())), generator)[
                :, 0
            ].contiguous()
        return self._matrix(module, tensor, (rows, columns), generator)

    def _norm(self, weight_H: Tensor, hidden: Axis) -> Tensor:
        grown = torch.full((hidden.size,), float(weight_H.mean()) * self.norm_scale)
        grown[hidden.places] = weight_H[hidden.entries] * self.norm_scale
        return grown

    def _matrix(
        self, module: str, source: Tensor, axes: tuple[Axis, Axis], generator: torch.Generator
    ) -> Tensor:
        """Zeros or random values, and the trained ones in their places."""
        rows, columns = axes
        grown = torch.zeros(rows.size, columns.size, dtype=self.storage.torch_dtype)
        placed = source.float()[rows.entries][:, columns.entries]
        if self.storage.fill == "random" and (module not in _WRITE or columns.dead.any()):
            low, high = torch.full((rows.size,), -math.inf), torch.full((rows.size,), math.inf)
            if placed.numel():
                shared = placed[
                    :, -(placed.shape[1] % GROUP) :
                ]  # the group that random values enter; -0 means the whole row
                low[rows.places], high[rows.places] = shared.amin(1), shared.amax(1)
            fill_random(grown, float(source.float().std(correction=0)), (low, high), generator)
            if module in _WRITE:
                grown[:, ~columns.dead] = 0
            if module in _KILL:
                grown[rows.dead] = 0
        grown[rows.places[:, None], columns.places] = placed.to(grown.dtype)
        return grown


def fill_random(
    matrix_RC: Tensor, std: float, ranges: tuple[Tensor, Tensor], generator: torch.Generator
) -> None:
    """Normal values, each row's held inside its range [R], drawn in pieces so that float32 copies stay small."""
    low_R, high_R = ranges
    step = max(1, CHUNK // matrix_RC.shape[1])
    for start in range(0, len(matrix_RC), step):
        part = slice(start, start + step)
        values = torch.empty(matrix_RC[part].shape).normal_(0.0, std, generator=generator)
        matrix_RC[part] = values.clamp_(low_R[part, None], high_R[part, None])


class Weights:
    """A model's tensors by name, read one at a time; no file stays open, so that its directory can be renamed anywhere."""

    def __init__(self, location: str) -> None:
        self._places: dict[str, Path] = {}
        for path in set(weight_files(location).values()):
            with safe_open(path, framework="pt") as file:
                self._places |= dict.fromkeys(file.keys(), path)

    @property
    def names(self) -> set[str]:
        return set(self._places)

    def read(self, name: str) -> Tensor:
        """A tensor in memory of its own."""
        with safe_open(self._places[name], framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
            return tensor.clone()


def grown_tensors(
    weights: Weights, source: Architecture, wanted: Architecture, grower: Grower
) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the larger model, in the order of the layers."""
    yield (
        f"{_EMBEDDING}.weight",
        grower.grow(_EMBEDDING, _EMBEDDING, weights.read(f"{_EMBEDDING}.weight"), True),
    )
    last = f"model.layers.{source.num_layers - 1}."
    parts = sorted(
        name.removeprefix(last)
        for name in weights.names
        if name.startswith(last) and not name.endswith("inv_freq")
    )
    for layer in range(wanted.num_layers):
        trained = layer < source.num_layers
        for part in parts:
            name = f"model.layers.{layer}.{part}"
            tensor = weights.read(name if trained else last + part)
            yield name, grower.grow(part.rpartition(".")[0], name, tensor, trained)
    yield f"{_NORM}.weight", grower.grow(_NORM, _NORM, weights.read(f"{_NORM}.weight"), True)
    if not wanted.tied:
        head = _EMBEDDING if source.tied else _HEAD
        yield f"{_HEAD}.weight", grower.grow(_HEAD, _HEAD, weights.read(f"{head}.weight"), True)


def check_tensors(weights: Weights, source: Architecture, location: str) -> None:
    """Refuses weights whose meaning this tool does not know, before anything is written.

    Raises:
        TargetError: naming the first tensor that is missing or unknown.
    """
    whole = {f"{_EMBEDDING}.weight", f"{_NORM}.weight"} | (set() if source.tied else {f"{_HEAD}.weight"})
    first = "model.layers.0."
    parts = {name.removeprefix(first) for name in weights.names if name.startswith(first)}
    known = {*_AXES, *_NORMS, f"{_ATTENTION}.q_norm", f"{_ATTENTION}.k_norm"}
    strange = [
        part
        for part in sorted(parts)
        if part.rpartition(".")[0] not in known and not part.endswith("inv_freq")
    ]
    expected = whole | {
        f"model.layers.{layer}.{part}" for layer in range(source.num_layers) for part in parts
    }
    problems = (
        sorted(expected - weights.names) or strange or sorted(weights.names - expected - {f"{_HEAD}.weight"})
    )
    if problems or not parts:
        raise TargetError(
            location,
            f"tensor {(problems or [first])[0]}",
            "missing or unknown to this tool",
            "save the model uncompressed",
        )
