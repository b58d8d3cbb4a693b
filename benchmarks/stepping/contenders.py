"""Ways to take one optimiser step of the same batch: transformers' Trainer, a plain loop, FastDraft.

All see the same tokens per optimiser step, clip at 1 and use AdamW; each has its own usual micro-batch (`rows`).
"""

from __future__ import annotations

import contextlib
import itertools
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from fastdraft.training.batches import Batch, packed_batch
from fastdraft.training.fast_decoder import fast_decoder, kept_memory
from fastdraft.training.gpu_attention import flash_decoder
from fastdraft.training.objective import CrossEntropy
from fastdraft.training.optimizer import build_optimizers
from fastdraft.training.step import TrainStep, autocast_dtype, default_micro_batch_tokens
from stepping.shapes import Shape, build_model, tokens

WORDS = {
    "trainer": "transformers Trainer, bf16",
    "plain_fp32": "plain loop, fp32",
    "plain_bf16": "plain loop, bf16 autocast",
    "plain_compiled": "plain loop, bf16, torch.compile",
    "ours_fp32": "FastDraft, fp32",
    "ours": "FastDraft",
    "ours_compiled": "FastDraft, compile: true",
    "ours_masked": "FastDraft, texts of a row apart",
}
NAMES = tuple(WORDS)
TEXTS = 4
"""Of a row, where they are kept apart."""
Wait = Callable[[], bool]
"""Called before every optimiser step; blocks until it may be taken; False ends the loop."""


@dataclass(frozen=True)
class Setting:
    """What a contender is given."""

    name: str
    shape: Shape
    device: torch.device
    batch: int
    """Tokens of an optimiser step."""
    rows: int
    """Of a micro-batch; 0: FastDraft's own default."""
    backend: str = "inductor"
    """Of torch.compile; a dry run has one without a code generator."""

    def parts(self, rows: int) -> list[torch.Tensor]:
        """The batch in micro-batches of `rows` rows."""
        count = max(1, self.batch // (rows * self.shape.length))
        return list(tokens(self.shape, rows * count).split(rows))

    def facts(self, model: Any, micro: int) -> dict[str, Any]:
        size = sum(parameter.numel() for parameter in model.parameters())
        return {
            "parameters": size,
            "flops_per_token": self.shape.flops_per_token(model),
            "micro_batch_tokens": micro,
        }


def drive(setting: Setting, wait: Wait, found: dict[str, Any]) -> None:
    """Takes steps as long as `wait` says so."""
    ours = setting.name.startswith("ours")
    with kept_memory(setting.device) if ours else contextlib.nullcontext():
        run = _trainer if setting.name.startswith("trainer") else _ours if ours else _plain
        run(setting, wait, found)


def our_step(setting: Setting) -> tuple[Any, TrainStep, list[Batch]]:
    """The product's step as `fastdraft run` puts it together (training/defaults.py), without its recipe."""
    model = build_model(setting.shape).to(setting.device)
    decoder: Any = model.get_decoder()
    compiled = setting.name.endswith("compiled")
    runs = fast_decoder(decoder, setting.device, compiled=compiled, backend=setting.backend)
    if setting.name.endswith("modules"):  # what runs on an accelerator, on a CPU too
        runs = flash_decoder(decoder)
    optimizers = build_optimizers(model, kind="adamw", learning_rate=1e-3)
    low = None if setting.name.endswith("fp32") else autocast_dtype("auto", setting.device)
    head, parameters = model.get_output_embeddings().weight, list(model.parameters())
    step = TrainStep(runs, head, parameters, optimizers, CrossEntropy(1e-5), setting.device, low)
    micro = setting.rows * setting.shape.length or default_micro_batch_tokens(setting.device)
    rows = max(1, min(micro, setting.batch) // setting.shape.length)
    batches = [packed_batch(part.numpy()) for part in setting.parts(rows)]
    if setting.name.endswith("masked"):  # the same rows as `TEXTS` texts each that do not see each other
        places = torch.arange(setting.shape.length).remainder(setting.shape.length // TEXTS)
        batches = [replace(batch, position_ids=places.expand(rows, -1).contiguous()) for batch in batches]
    return model, step, batches


def _ours(setting: Setting, wait: Wait, found: dict[str, Any]) -> None:
    model, step, batches = our_step(setting)
    found |= setting.facts(model, batches[0].input_ids.numel())
    while wait():
        found["loss"] = step.gradients(batches)[0]
        step.update(1.0)


def _plain(setting: Setting, wait: Wait, found: dict[str, Any]) -> None:
    """The loop of a tutorial."""
    model = build_model(setting.shape).to(setting.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=0.1)
    parts = [part.to(setting.device) for part in setting.parts(setting.rows or 4)]
    found |= setting.facts(model, parts[0][:, 1:].numel())
    forward = torch.compile(model, backend=setting.backend) if setting.name == "plain_compiled" else model
    while wait():
        for part in parts:
            with torch.autocast(
                setting.device.type, dtype=torch.bfloat16, enabled=setting.name != "plain_fp32"
            ):
                loss = forward(input_ids=part[:, :-1], labels=part[:, :-1]).loss
            torch.autograd.backward(loss / len(parts))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        found["loss"] = loss.item()


def _trainer(setting: Setting, wait: Wait, found: dict[str, Any]) -> None:
    """Transformers' own loop, held between turns by a callback."""
    import transformers

    shape, rows = setting.shape, setting.rows or 4
    model = build_model(shape)
    count = max(1, setting.batch // (rows * shape.length))
    found |= setting.facts(model, rows * shape.length)

    class Turns(transformers.TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
            if state.global_step and not wait():
                raise _Done

        def on_train_begin(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
            wait()

    drawn = tokens(shape, rows * count)[:, :-1]
    quiet = {"report_to": [], "logging_strategy": "no", "save_strategy": "no", "disable_tqdm": True}
    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(_Done):
        arguments = transformers.TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=rows,
            gradient_accumulation_steps=count,
            max_steps=10**6,
            learning_rate=1e-3,
            bf16=True,
            use_cpu=setting.device.type == "cpu",
            **quiet,
        )
        transformers.Trainer(model, arguments, train_dataset=_Endless(drawn), callbacks=[Turns()]).train()


class _Endless(torch.utils.data.IterableDataset[dict[str, torch.Tensor]]):
    """The same rows over and over."""

    def __init__(self, rows: torch.Tensor) -> None:
        self.rows = rows

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        return ({"input_ids": row, "labels": row} for row in itertools.cycle(self.rows))


class _Done(Exception):
    """Ends the Trainer's loop."""
