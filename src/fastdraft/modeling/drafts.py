"""Drafts and checkpoints: load and save them; which device runs them."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from transformers import PreTrainedModel

from fastdraft.errors import RecipeError, TargetError
from fastdraft.modeling.model_files import quiet
from fastdraft.run_folder import atomic_folder
from fastdraft.target import Target


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
    """A draft or checkpoint: eval mode, on `device`, every weight finite."""
    model = Target.at(folder).model("cpu", dtype)
    for name, parameter in model.named_parameters():
        # Views into the file are not aligned for the processor, and Windows would not let the file be replaced.
        parameter.data = parameter.data.clone()
        if not torch.isfinite(parameter).all():
            fix = "delete its stage's folder and run the stage again"
            raise TargetError(f"{folder}: {name} holds NaN or infinity; every weight must be finite", fix)
    return model.to(device)


def save_draft(model: PreTrainedModel, folder: Path, tokenizer: Target) -> None:
    """Writes a complete Hugging Face directory that stands whole or not at all, with the tokenizer files of `tokenizer`."""
    with atomic_folder(folder) as temporary:
        with quiet():
            model.save_pretrained(temporary)
        for weights in temporary.glob(
            "*.safetensors"
        ):  # safetensors writes for the owner only; a server may be another user
            shutil.copymode(temporary / "config.json", weights)
        tokenizer.copy_tokenizer(temporary)
