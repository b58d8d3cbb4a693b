"""Ways to take one optimiser step of the same batch: transformers' Trainer, a plain loop, FastDraft.

All see the same tokens per optimiser step, clip at 1 and use AdamW; each has its own usual micro-batch
(`rows`).
"""

from __future__ import annotations

import contextlib
import itertools
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from fastdraft.training.batches import Batch, packed_batch
from fastdraft.training.fast_decoder import fast_decoder, kept_memory
from fastdraft.training.gpu_attention import flash_decoder
from fastdraft.training.objective import CrossEntropy
from fastdraft.training.optimizer import build_optimizers
from fastdraft.training.step import TrainStep, autocast_dtype, default_micro_batch_tokens

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
TEXTS = 4  # of a row, where they are kept apart
Wait = Callable[[], bool]
"""Called before every optimiser step; blocks until it may be taken; False ends the loop."""


@dataclass(frozen=True)
class Shape:
    """A draft, its rows, and the tokens of one optimiser step."""

    family: str
    vocab: int
    hidden: int
    layers: int
    heads: int
    ffn: int
    tied: bool
    length: int
    batch: int

    @property
    def attention_flops(self) -> float:
        """Of a token, forward and backward, causal."""
        return 6.0 * self.layers * self.hidden * self.length

    def build(self) -> Any:
        """A model of that shape with seeded first weights, fp32, in training mode."""
        import transformers

        configs = {"llama": transformers.LlamaConfig, "phi3": transformers.Phi3Config}
        config = configs[self.family](
            vocab_size=self.vocab,
            hidden_size=self.hidden,
            intermediate_size=self.ffn,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.heads,
            max_position_embeddings=8192,
            tie_word_embeddings=self.tied,
            pad_token_id=0,
            use_cache=False,
        )
        torch.manual_seed(0)
        build = transformers.AutoModelForCausalLM.from_config
        return build(config, attn_implementation="sdpa", dtype=torch.float32).train()

    def tokens(self, rows: int, step: int = 0) -> torch.Tensor:
        """Rows [rows, length + 1] of a step: random ids."""
        generator = torch.Generator().manual_seed(1000 + step)
        return torch.randint(0, self.vocab, (rows, self.length + 1), generator=generator)


SHAPES = {  # three for a CPU, the two published drafts for a GPU, one for a dry run
    "tiny": Shape("llama", 512, 32, 2, 2, 64, True, 64, 256),
    "1.5m": Shape("llama", 8192, 128, 2, 2, 384, True, 512, 16_384),
    "7m": Shape("llama", 16_384, 256, 4, 4, 704, True, 512, 16_384),
    "27m": Shape("llama", 8192, 512, 6, 8, 1408, False, 512, 8_192),
    "phi-3-mini-50m": Shape("phi3", 32_064, 512, 6, 8, 1408, False, 2048, 262_144),
    "llama-3.1-8b-150m": Shape("llama", 128_256, 512, 6, 8, 1792, False, 2048, 524_288),
}


@dataclass(frozen=True)
class Setting:
    """What a contender is given."""

    name: str
    shape: Shape
    device: torch.device
    batch: int  # tokens of an optimiser step
    rows: int  # of a micro-batch; 0: its own default
    backend: str = "inductor"  # of torch.compile; a dry run has one without a code generator

    def parts(self, rows: int) -> list[torch.Tensor]:
        """The batch in micro-batches of `rows` rows."""
        count = max(1, self.batch // (rows * self.shape.length))
        return list(self.shape.tokens(rows * count).split(rows))

    def facts(self, model: Any, micro: int) -> dict[str, Any]:
        """Useful operations of a token: 6 for every weight of a matrix product, and attention."""
        products = sum(part.weight.numel() for part in model.modules() if isinstance(part, nn.Linear))
        flops, size = 6.0 * products + self.shape.attention_flops, sum(p.numel() for p in model.parameters())
        return {"parameters": size, "flops_per_token": flops, "micro_batch_tokens": micro}


def drive(setting: Setting, wait: Wait, found: dict[str, Any]) -> None:
    """Takes steps as long as `wait` says so."""
    if setting.name.startswith("ours"):
        with kept_memory(setting.device):
            _ours(setting, wait, found)
    else:
        (_trainer if setting.name == "trainer" else _plain)(setting, wait, found)


def our_step(setting: Setting) -> tuple[Any, TrainStep, list[Batch]]:
    """The product's step as `fastdraft run` puts it together (training/defaults.py), without its recipe."""
    shape, device = setting.shape, setting.device
    model = shape.build().to(device)
    decoder: Any = model.get_decoder()
    compiled = setting.name.endswith("compiled")
    runs = fast_decoder(decoder, device, compiled=compiled, backend=setting.backend)
    if setting.name.endswith("modules"):  # what runs on an accelerator, on a CPU too
        runs = flash_decoder(decoder)
    optimizers = build_optimizers(model, kind="adamw", learning_rate=1e-3)
    low = None if setting.name.endswith("fp32") else autocast_dtype("auto", device)
    head, parameters = model.get_output_embeddings().weight, list(model.parameters())
    step = TrainStep(runs, head, parameters, optimizers, CrossEntropy(1e-5), device, low)
    micro = setting.rows * shape.length or default_micro_batch_tokens(device)
    rows = max(1, min(micro, setting.batch) // shape.length)
    batches = [packed_batch(part.numpy()) for part in setting.parts(rows)]
    if setting.name.endswith("masked"):  # the same rows as `TEXTS` texts each that do not see each other
        places = torch.arange(shape.length).remainder(shape.length // TEXTS)
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
    model = setting.shape.build().to(setting.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=0.1)
    parts = [part.to(setting.device) for part in setting.parts(setting.rows or 4)]
    found |= setting.facts(model, parts[0][:, 1:].numel())
    forward = torch.compile(model, backend=setting.backend) if setting.name == "plain_compiled" else model
    low = torch.autocast(setting.device.type, dtype=torch.bfloat16, enabled=setting.name != "plain_fp32")
    while wait():
        for part in parts:
            with low:
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
    model, count = shape.build(), max(1, setting.batch // (rows * shape.length))
    found |= setting.facts(model, rows * shape.length)

    class Turns(transformers.TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
            if state.global_step and not wait():
                raise _Done

        def on_train_begin(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
            wait()

    drawn = _Endless(shape.tokens(rows * count)[:, :-1])
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
        transformers.Trainer(model, arguments, train_dataset=drawn, callbacks=[Turns()]).train()


class _Endless(torch.utils.data.IterableDataset[dict[str, torch.Tensor]]):
    """The same rows over and over."""

    def __init__(self, rows: torch.Tensor) -> None:
        self.rows = rows

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        return ({"input_ids": row, "labels": row} for row in itertools.cycle(self.rows))


class _Done(Exception):
    """Ends the Trainer's loop."""
