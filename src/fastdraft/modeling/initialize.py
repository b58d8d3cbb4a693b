"""First weights of a draft: random, or with the target's embeddings projected to the draft's width."""

from __future__ import annotations

import hashlib
import math

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from fastdraft.errors import TargetError
from fastdraft.target import Target

STD = 0.02
_INTO_RESIDUAL = ("o_proj.weight", "down_proj.weight")
# Names of the two matrices in the families' files, the draft's own first.
_EMBEDDINGS = (
    "model.embed_tokens.weight",
    "transformer.wte.weight",
    "wte.weight",
    "gpt_neox.embed_in.weight",
    "model.language_model.embed_tokens.weight",
    "language_model.model.embed_tokens.weight",
    "model.language_model.model.embed_tokens.weight",
)
_HEADS = ("lm_head.weight", "embed_out.weight", "language_model.lm_head.weight")
_EMBEDDING, _HEAD = _EMBEDDINGS[0], _HEADS[0]
_CHUNK = 16_384


def build_draft(config: PreTrainedConfig, seed: int) -> PreTrainedModel:
    """A draft with random weights in fp32 on the CPU; equal for equal config and seed."""
    with torch.random.fork_rng(devices=[]):  # the library draws too; the caller's random state is not touched
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    randomize(model, seed)
    return model.eval()


@torch.no_grad()
def randomize(model: PreTrainedModel, seed: int) -> None:
    """Overwrites every parameter: matrices normal, biases 0, norms 1.

    The projections that write into the residual stream are divided by sqrt(2 layers) (GPT-2, section 2.3). With a head
    this small the loss starts at the logarithm of the vocabulary's size. The draw depends on seed and shape only.
    """
    generator = torch.Generator().manual_seed(seed)
    residual_std = STD / math.sqrt(2 * model.config.num_hidden_layers)
    for name, parameter in sorted(model.named_parameters()):
        if parameter.ndim >= 2:
            std = residual_std if name.endswith(_INTO_RESIDUAL) else STD
            parameter.normal_(0.0, std, generator=generator)
        else:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)


@torch.no_grad()
def set_projected_embeddings(model: PreTrainedModel, target: Target, seed: int) -> None:
    """Replaces embedding and head by the target's, projected to the draft's width; a tied draft takes the embedding.

    Only these two matrices of the target are read.
    """
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    matrices = read_matrices(target)
    for name, matrix in matrices.items():
        if matrix.shape[0] != embedding.shape[0]:
            found = f"{name} has {matrix.shape[0]} rows, the config's vocab_size is {embedding.shape[0]}"
            raise TargetError(f"{target.location}: {found}", "fetch the model again")
    embedding.copy_(project(matrices[_EMBEDDING], embedding.shape[1], seed))
    if head is not embedding:
        head.copy_(project(matrices.get(_HEAD, matrices[_EMBEDDING]), head.shape[1], seed + 1))


def read_matrices(target: Target) -> dict[str, Tensor]:
    """The target's embedding [vocabulary, hidden], and its head when it is not tied, without loading anything else."""
    matrices: dict[str, Tensor] = {}
    for name, path in target.files.weights((*_EMBEDDINGS, *_HEADS)).items():
        kind = _EMBEDDING if name in _EMBEDDINGS else _HEAD
        with safe_open(path, framework="pt") as file:
            if kind not in matrices and name in file.keys():  # noqa: SIM118 - a safetensors handle, not a mapping
                matrices[kind] = file.get_tensor(name)
    if _EMBEDDING not in matrices:
        rule = "initialization: target_embeddings needs it"
        raise TargetError(f"{target.location}: no {_EMBEDDING}; {rule}", "use initialization: random")
    return matrices


def project(matrix_VH: Tensor, width: int, seed: int) -> Tensor:
    """Rows projected on the `width` directions in which they vary most, as a matrix [vocabulary, width] of deviation 0.02.

    Principal components of the centred rows (the mean is common to all tokens and tells none apart), then a random
    rotation, so that no coordinate of the draft carries most of the variance. Directions beyond the target's own width
    are zero before the rotation. Exact eigenvectors of the covariance in fp64, gathered by chunks of rows.
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
    kept = min(width, hidden)
    main_HK = directions_HH[:, -kept:].flip(1)
    main_HK = (
        main_HK * main_HK.gather(0, main_HK.abs().argmax(0, keepdim=True)).sign()
    )  # eigenvectors have no sign
    generator = torch.Generator().manual_seed(seed)
    rotation_WW, upper_WW = torch.linalg.qr(
        torch.randn(width, width, dtype=torch.float64, generator=generator)
    )
    basis_HW = main_HK @ (rotation_WW * upper_WW.diagonal().sign())[:kept]
    projected = torch.cat(
        [((chunk.double() - mean_H) @ basis_HW).float() for chunk in torch.split(matrix_VH, _CHUNK)]
    )
    return projected * (STD / projected.std().clamp_min(1e-12))


def matrices_digest(target: Target) -> str:
    """Stands for the target's embedding and head in a fingerprint: a digest of about a thousand of their rows."""
    total = hashlib.sha256()
    for name, matrix in sorted(read_matrices(target).items()):
        step = max(1, len(matrix) // 1024)
        total.update(f"{name} {tuple(matrix.shape)} {matrix.dtype}".encode())
        total.update(matrix[::step].float().contiguous().numpy().tobytes())
    return total.hexdigest()[:20]
