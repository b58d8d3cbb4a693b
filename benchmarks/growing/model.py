"""A larger model on disk: written a shard at a time, compared with its source, and only then given its name.

Decides that no more than one shard is held while writing, that tokenizer files and generation config travel byte for byte, that
a directory stands only after source and result, both loaded in float32, gave the same logits on random tokens; and what the
record beside the weights says.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastdraft.console import Console, Progress
from fastdraft.errors import FastDraftError
from fastdraft.modeling.architecture import Architecture, read_architecture
from fastdraft.modeling.loading import load_config, load_target
from fastdraft.modeling.source import copy_tokenizer_files, local_file, model_identity, raw_config
from fastdraft.recipe.base import format_count
from fastdraft.recipe.run import TargetConfig
from fastdraft.run_folder import atomic_folder, write_json
from growing.shape import check_shape, grown_config
from growing.tensors import Grower, Storage, Weights, check_tensors, grown_tensors

RECORD = "growth.json"
"""What was grown from what, and what the check found; marks a directory of this tool."""
SHARD_BYTES = 512_000_000
TOLERANCE = 1e-4
"""Largest difference of logits, as a share of the largest logit: float32 sums of other lengths differ by about 1e-6."""
ROWS, ROW_TOKENS = 4, 48


@dataclass(frozen=True)
class Check:
    """Logits of source and result on the same random tokens, float32."""

    max_difference: float
    """Against the source with its matrices rounded to the stored precision: what growing itself changed."""
    max_difference_to_source: float
    """Against the source as it is: with what the stored precision changed."""
    greedy_agreement: float
    """Share of places with the same most likely token as the source as it is."""
    largest_logit: float
    places: int


def write_shards(folder: Path, tensors: Iterator[tuple[str, Tensor]], progress: Progress) -> int:
    """Writes tensors as they come, holding one shard in memory; returns the bytes of all weights."""
    from safetensors.torch import save_file

    shards: list[tuple[Path, list[str]]] = []
    held: dict[str, Tensor] = {}
    total = size = 0

    def write() -> None:
        path = folder / f"{len(shards)}.part"
        save_file(held, path, metadata={"format": "pt"})
        shutil.copymode(folder / "config.json", path)  # safetensors writes for the owner only
        shards.append((path, list(held)))
        held.clear()

    for name, tensor in tensors:
        held[name] = tensor
        size += tensor.nbytes
        total += tensor.nbytes
        progress.advance(tensor.numel())
        if size >= SHARD_BYTES:
            write()
            size = 0
    if held:
        write()
    places: dict[str, str] = {}
    for number, (path, names) in enumerate(shards, 1):
        final = (
            "model.safetensors" if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        )
        path.rename(folder / final)
        places |= dict.fromkeys(names, final)
    if len(shards) > 1:
        write_json(
            folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": places}
        )
    return total


@torch.inference_mode()
def compare(location: str, folder: Path, storage: Storage) -> Check:
    """Logits of both on random tokens.

    Raises:
        FastDraftError: when they differ by more than float32 rounding.
    """
    config = load_config(location)
    shape = (ROWS, min(ROW_TOKENS, int(config.max_position_embeddings)))
    tokens = torch.randint(
        int(config.vocab_size), shape, generator=torch.Generator().manual_seed(storage.seed)
    )
    model = load_target(TargetConfig(model=location, dtype="fp32"), "cpu")
    plain = model(input_ids=tokens).logits
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.copy_(parameter.to(storage.torch_dtype))
    rounded = model(input_ids=tokens).logits
    grown = layerwise_logits(folder, tokens)
    check = Check(
        max_difference=float((grown - rounded).abs().max()),
        max_difference_to_source=float((grown - plain).abs().max()),
        greedy_agreement=float((grown.argmax(-1) == plain.argmax(-1)).double().mean()),
        largest_logit=float(plain.abs().max()),
        places=tokens.numel(),
    )
    if not check.max_difference <= TOLERANCE * max(1.0, check.largest_logit):
        found = f"logits differ by {check.max_difference:.2g} of {check.largest_logit:.2g}"
        raise FastDraftError(
            folder, found, "a grown model must have its source's outputs", "report this shape as a bug"
        )
    return check


@torch.inference_mode()
def layerwise_logits(folder: Path, tokens_BT: Tensor) -> Tensor:
    """Logits [B, T, V] in float32 with one layer's weights in memory at a time, so that size is bounded by the disk alone.

    Raises:
        FastDraftError: when the files lack a weight of the model.
    """
    from transformers import AutoModelForCausalLM

    config = load_config(str(folder))
    weights = Weights(str(folder))
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    model.model.rotary_emb = type(model.model.rotary_emb)(config)  # its buffers are computed, not stored
    outside = {name for name in weights.names if ".layers." not in name}
    missing = model.load_state_dict(
        {name: weights.read(name).float() for name in outside}, strict=False, assign=True
    ).missing_keys
    model.tie_weights()
    for index, layer in enumerate(model.model.layers):
        prefix = f"model.layers.{index}."
        names = {name.removeprefix(prefix): name for name in weights.names if name.startswith(prefix)}
        missing = [name for name in missing if not name.startswith(prefix)]

        def fetch(module: nn.Module, _: Any, names: dict[str, str] = names) -> None:
            module.load_state_dict(
                {part: weights.read(name).float() for part, name in names.items()}, strict=True, assign=True
            )

        layer.register_forward_pre_hook(fetch)
        layer.register_forward_hook(lambda module, *_: module.to_empty(device="meta") and None)
    if set(missing) - ({"lm_head.weight"} if config.tie_word_embeddings else set()):
        raise FastDraftError(
            folder,
            f"no weights for {sorted(missing)[0]}",
            "every weight must be there",
            "report this shape as a bug",
        )
    logits: Tensor = model(input_ids=tokens_BT, use_cache=False).logits
    return logits


def grow_model(
    model: str, output: Path, wanted: Architecture, storage: Storage, console: Console
) -> dict[str, Any]:
    """Writes the larger model and returns its record; `shape_of` gives a shape to change.

    Raises:
        FastDraftError: in one line, for whatever the user can mend; nothing half-written stays behind.
    """
    location, source = shape_of(model)
    check_shape(source, wanted)
    config = grown_config(raw_config(location), source, wanted, storage.torch_dtype)
    weights = Weights(location)
    check_tensors(weights, source, location)
    if output.exists():
        raise FastDraftError(output, "exists", "a new directory is written", "delete it or name another one")
    _check_disk(output, wanted.parameters * storage.torch_dtype.itemsize)
    with atomic_folder(output) as folder:
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        load_config(str(folder))  # a shape that the family refuses is told before gigabytes are written
        copy_tokenizer_files(location, folder)
        if generation := local_file(location, "generation_config.json"):
            shutil.copyfile(generation, folder / generation.name)
        grower = Grower(source, wanted, storage)
        with console.progress("grow", wanted.parameters, "parameters") as progress:
            size = write_shards(folder, grown_tensors(weights, source, wanted, grower), progress)
        console.say(f"{output.name}: comparing with {model} in float32")
        record = record_of(model, wanted, storage) | {
            "bytes": size,
            "check": asdict(compare(location, folder, storage)),
        }
        write_json(folder / RECORD, record)
    return record


def record_of(model: str, wanted: Architecture, storage: Storage) -> dict[str, Any]:
    """All that a grown model follows from; equal values mean equal weights."""
    location = TargetConfig(model=model).location
    source = model_identity(model, location, None, "fp32")
    return {"schema": 1, "source": source, "shape": wanted.as_dict(), "storage": asdict(storage)}


def shape_of(model: str) -> tuple[str, Architecture]:
    """Where a model lies, and its shape."""
    location = TargetConfig(model=model).location
    return location, read_architecture(load_config(location), location)


def _check_disk(output: Path, needed: int) -> None:
    place = next(folder for folder in (output.absolute(), *output.absolute().parents) if folder.exists())
    free = shutil.disk_usage(place).free
    if free < needed:
        raise FastDraftError(
            output, f"{format_count(free)} bytes free", f"needs {format_count(needed)}", "free some space"
        )
