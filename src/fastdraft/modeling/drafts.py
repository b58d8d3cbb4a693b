"""Drafts and checkpoints: their first weights, loading and saving; which device runs them."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from fastdraft.errors import RecipeError, TargetError
from fastdraft.modeling.checkpoint import EMBEDDINGS, HEADS
from fastdraft.modeling.model_files import quiet
from fastdraft.modeling.trimmed_head import TrimmedHead, read_head_ids, trim, write_head_ids
from fastdraft.run_folder import atomic_folder
from fastdraft.target import Target

STD = 0.02
_INTO_RESIDUAL = ("o_proj.weight", "down_proj.weight")
_CHUNK = 16_384


def pick_device(name: str, key: str = "run.device") -> torch.device:
    """The device that a recipe names; `auto` is the accelerator that torch finds, else the CPU."""
    found = torch.accelerator.current_accelerator(check_available=True)
    if name == "auto":
        return found or torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        rule = "must be auto, cpu, cuda, xpu or mps, or one with an index"
        raise RecipeError(f"{key}: {name}; {rule}", "correct the name") from None
    count = torch.accelerator.device_count() if found and found.type == device.type else 0
    if device.type != "cpu" and (device.index or 0) >= count:
        has = f"{count} {device.type} device(s)" if count else str(found or "no accelerator")
        raise RecipeError(f"{key}: {name}; this machine's torch sees {has}", "use auto")
    return device


def set_threads(count: int) -> None:
    """CPU threads for torch; 0 leaves torch's own choice."""
    if count:
        torch.set_num_threads(count)


def load_draft(
    folder: Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """A draft or checkpoint: eval mode, on `device`, every weight finite, its head over the ids it is for."""
    model = Target.at(folder).model("cpu", dtype)
    if (ids := read_head_ids(folder, model.config.vocab_size)) is not None:
        trim(model, ids)
    # Else the row of the padding id, which often is also BOS or EOS, has no gradient.
    model.get_input_embeddings().padding_idx = None
    for name, parameter in model.named_parameters():
        # Views into the file are not aligned, and Windows would not let the file be replaced.
        parameter.data = parameter.data.clone()
        if not torch.isfinite(parameter).all():
            found = f"{folder}: {name} holds NaN or infinity; every weight must be finite"
            raise TargetError(found, "delete its stage's folder and run the stage again")
    return model.to(device)


def save_draft(model: PreTrainedModel, folder: Path, tokenizer: Target) -> None:
    """Writes a Hugging Face directory, with the tokenizer files of `tokenizer`, whole or not at all."""
    head, weights = model.get_output_embeddings(), dict[str, Tensor]()
    if isinstance(head, TrimmedHead):
        weights = model.state_dict() | {HEADS[0]: head.whole_weight()}
    with atomic_folder(folder) as temporary:
        with quiet():
            model.save_pretrained(temporary, state_dict=weights or None)
        if isinstance(head, TrimmedHead):
            write_head_ids(temporary, head)
        # safetensors writes for the owner only; a server may be another user
        for path in temporary.glob("*.safetensors"):
            shutil.copymode(temporary / "config.json", path)
        tokenizer.copy_tokenizer(temporary)


@torch.no_grad()
def build_draft(config: PreTrainedConfig, seed: int) -> PreTrainedModel:
    """A draft with random weights in fp32 on the CPU, equal for equal shape and seed: matrices normal, biases
    0, norms 1.

    The projections that write into the residual stream are divided by sqrt(2 layers) (GPT-2, section 2.3).
    With a head this small the loss starts at the logarithm of the vocabulary's size.
    """
    with torch.random.fork_rng(devices=[]):  # the library draws too; the caller's random state is not touched
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    residual_std = STD / math.sqrt(2 * config.num_hidden_layers)
    for name, parameter in sorted(model.named_parameters()):
        if parameter.ndim >= 2:
            std = residual_std if name.endswith(_INTO_RESIDUAL) else STD
            parameter.normal_(0.0, std, generator=generator)
        else:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)
    return model.eval()


@torch.no_grad()
def set_projected_embeddings(model: PreTrainedModel, target: Target, seed: int) -> None:
    """Replaces embedding and head by the target's, projected; a tied draft takes the embedding."""
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    matrices = read_matrices(target)
    for name, matrix in matrices.items():
        if len(matrix) != len(embedding):
            found = f"{name} has {len(matrix)} rows, the config's vocab_size is {len(embedding)}"
            raise TargetError(f"{target.location}: {found}", "fetch the model again")
    of_target = matrices[EMBEDDINGS[0]]
    embedding.copy_(project(of_target, embedding.shape[1], seed))
    if head is not embedding:
        head.copy_(project(matrices.get(HEADS[0], of_target), head.shape[1], seed + 1))


def read_matrices(target: Target) -> dict[str, Tensor]:
    """The target's embedding [vocabulary, hidden], and its head when not tied; nothing else is loaded."""
    matrices: dict[str, Tensor] = {}
    for name, path in target.files.weights((*EMBEDDINGS, *HEADS)).items():
        kind = EMBEDDINGS[0] if name in EMBEDDINGS else HEADS[0]
        with safe_open(path, framework="pt") as file:
            if kind not in matrices and name in file.keys():  # noqa: SIM118 - no mapping
                matrices[kind] = file.get_tensor(name)
    if EMBEDDINGS[0] not in matrices:
        rule = f"no {EMBEDDINGS[0]}; initialization: target_embeddings needs it"
        raise TargetError(f"{target.location}: {rule}", "use initialization: random")
    return matrices


def project(matrix_VH: Tensor, width: int, seed: int) -> Tensor:
    """Rows projected on the `width` directions in which they vary most: a matrix [vocabulary, width] of
    deviation 0.02.

    Principal components of the centred rows (the mean is common to all tokens and tells none apart), then a
    random rotation, so that no coordinate of the draft carries most of the variance. Directions beyond the
    target's own width are zero before the rotation. Exact eigenvectors of the covariance in fp64, gathered by
    chunks of rows.
    """
    rows, hidden = matrix_VH.shape
    mean_H = torch.zeros(hidden, dtype=torch.float64)
    for chunk in torch.split(matrix_VH, _CHUNK):
        mean_H += chunk.double().sum(0) / rows
    covariance_HH = torch.zeros(hidden, hidden, dtype=torch.float64)
    for chunk in torch.split(matrix_VH, _CHUNK):
        centred = chunk.double() - mean_H
        covariance_HH += centred.T @ centred / rows
    _, directions_HH = torch.linalg.eigh(covariance_HH)  # ascending eigenvalues
    main_HK = directions_HH[:, -min(width, hidden) :].flip(1)
    main_HK = main_HK * main_HK.gather(0, main_HK.abs().argmax(0, keepdim=True)).sign()  # they have no sign
    generator = torch.Generator().manual_seed(seed)
    noise_WW = torch.randn(width, width, dtype=torch.float64, generator=generator)
    rotation_WW, upper_WW = torch.linalg.qr(noise_WW)
    basis_HW = main_HK @ (rotation_WW * upper_WW.diagonal().sign())[: main_HK.shape[1]]
    pieces = [((chunk.double() - mean_H) @ basis_HW).float() for chunk in torch.split(matrix_VH, _CHUNK)]
    projected = torch.cat(pieces)
    return projected * (STD / projected.std().clamp_min(1e-12))
