"""FSDP2: every process holds a part of each weight, of its gradient and of the optimiser's state.

Decides that the loss is computed inside the sharded module, where the weights are put together; that gradients are added to their parts
after every micro-batch (a whole gradient is what there is no room for); that what is validated and exported are whole weights, put
together in process 0 one tensor at a time; and which rows of a tensor are whose, so that each process saves and reads its own
(training/tensor_files.py) and a run may go on with another number of processes, or with DDP.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastdraft.errors import FastDraftError, RecipeError
from fastdraft.training.batches import Batch
from fastdraft.training.distributed import World, current
from fastdraft.training.flash import flash
from fastdraft.training.replicas import IDLE
from fastdraft.training.step import TrainStep

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_ROOT = "_loss_sum_in_parts"


def is_in_parts(model: nn.Module) -> bool:
    """Whether `in_parts` made it."""
    return _ROOT in model.__dict__


def in_parts(model: PreTrainedModel, parallel: str, optimizer: str) -> PreTrainedModel:
    """What is to be trained: the model itself, or for `fsdp2` in several processes a copy of it in parts.

    Build the optimisers over what this returns.

    Raises:
        RecipeError: for Muon, whose step needs whole matrices.
        FastDraftError: for a model whose layers cannot be told apart.
    """
    if parallel != "fsdp2" or current().size == 1:
        return model
    if optimizer != "adamw":
        raise RecipeError(
            "run.parallel",
            f"fsdp2 with {optimizer}",
            "its step needs whole matrices",
            "set optimizer.kind: adamw, or ddp",
        )
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard

    trained = copy.deepcopy(model)
    layers = getattr(trained.get_decoder(), "layers", None)
    if layers is None:
        rule = "needs a decoder with a list of layers"
        raise FastDraftError(
            "run.parallel", f"fsdp2 for {type(model).__name__}", rule, "set run.parallel: ddp"
        )
    mesh = init_device_mesh(model.device.type, (current().size,))
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    root: nn.Module = fully_shard(_LossSum(trained), mesh=mesh)  # type: ignore[assignment]
    for module in root.modules():
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)
            module.set_gradient_divide_factor(1.0)  # sums, not means: the step has divided already
    trained.__dict__[_ROOT] = root  # not as a part of the model: it holds the model
    return trained


def whole(tensor: Tensor) -> Tensor:
    """A tensor put together from its parts, on the CPU, in all processes at once; itself where it is in no parts."""
    if not hasattr(tensor, "full_tensor"):
        return tensor
    found: Tensor = tensor.full_tensor().cpu()
    return found


def gather_into(model: nn.Module, trained: nn.Module, world: World) -> None:
    """Puts the trained weights into the model of process 0; call it in all processes."""
    places = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in trained.named_parameters():
            found = whole(parameter)
            if world.is_main:
                places[name].copy_(found)


def held_rows(tensor: Tensor) -> tuple[int, int] | None:
    """The first row that this process holds of a tensor in parts, and the one behind its last; None where it holds all."""
    if not hasattr(tensor, "full_tensor"):
        return None
    in_parts: Any = tensor
    mesh = in_parts.device_mesh
    rows = -(
        -tensor.shape[0] // mesh.size()
    )  # as torch.chunk cuts: the last processes may hold fewer, or none
    first = min(tensor.shape[0], rows * mesh.get_local_rank())
    behind = min(tensor.shape[0], first + rows)
    if local(tensor).shape[0] != behind - first:
        raise ValueError(
            f"process {mesh.get_local_rank()} holds {local(tensor).shape[0]} rows and not {first} to {behind}"
        )
    return first, behind


def local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor."""
    held: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return held


def from_rows(like: Tensor, rows: Tensor) -> Tensor:
    """A tensor in parts as `like` is, of which this process holds these rows."""
    made = torch.empty_like(like, dtype=rows.dtype, requires_grad=False)
    with torch.no_grad():
        local(made).copy_(rows)
    return made


def outside(step: TrainStep, model: PreTrainedModel, trained: nn.Module) -> TrainStep:
    """The step over whole weights, for validation: itself, unless what it trains is in parts."""
    if trained is model:
        return step
    from fastdraft.modeling.heads import split_head

    decoder, head_VD = split_head(model)
    return replace(step, decoder=decoder, head=head_VD)


class Sharded:
    """The processes of a step over a model from `in_parts`."""

    committed = True
    """No step can be tried again: some weights' gradients are on their way from the first micro-batch on."""

    def __init__(self, model: nn.Module, world: World) -> None:
        self._module: Any = model.__dict__[_ROOT]
        self._world = world

    def begin(self, overlap: bool) -> None:
        """Nothing differs from step to step."""

    def evened(self, pieces: list[Batch]) -> list[Batch]:
        """As many micro-batches as the process that has most: all put weights together at the same moments."""
        most = max(count for (count,) in self._world.gather([len(pieces)]))
        return pieces + [IDLE] * (most - len(pieces))

    def loss_sum(self, step: TrainStep, batch: Batch, last: bool) -> Tensor:
        loss: Tensor = self._module(batch, step)
        return loss * 0.0 if batch is IDLE else loss

    def reduce(self, step: TrainStep, loss: Tensor) -> Tensor:
        dist.all_reduce(loss)
        return loss

    def clip(self, step: TrainStep) -> Tensor:
        return whole(torch.nn.utils.clip_grad_norm_(step.parameters, step.clip)).to(step.device)

    def report_out_of_memory(self) -> None:
        """Never asked for: every step is committed."""


class _LossSum(nn.Module):
    """The forward pass inside which the weights are whole."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch, step: TrainStep) -> Tensor:
        inside = copy.copy(step)
        decoder = self.model.get_decoder()
        inside.decoder = (flash(decoder) if step.device.type != "cpu" else None) or decoder
        inside.head = self.model.get_output_embeddings().weight
        return inside.loss_sum(batch)
