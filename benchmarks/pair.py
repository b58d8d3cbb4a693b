"""A target, its draft and prompts for benchmarks that need torch and transformers only.

Decides that the draft is a directory, a finished run, or, without either, the target's own first layers with its embeddings,
norm and head: untrained, accepted now and then, the same on every machine. And that no id is masked: the stand-in's
vocabulary is the target's.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

import torch
from machine import ROOT
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from fastdraft.modeling.vocabulary import Vocabulary

SHIPPED = ROOT / "src/fastdraft/shipped"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def add_pair_arguments(parser: argparse.ArgumentParser) -> None:
    """--target, --draft, --draft-layers, --task, --chat, --prompts, --max-new-tokens, --dtype."""
    parser.add_argument(
        "--target",
        default=str(SHIPPED / "targets/starter"),
        help="directory or hub id (default: the shipped starter)",
    )
    parser.add_argument(
        "--draft", help="a draft's directory, or a run's; without it, the target's first layers"
    )
    parser.add_argument("--draft-layers", type=int, default=1, help="layers of that stand-in")
    parser.add_argument(
        "--task", default=str(SHIPPED / "tasks/code.jsonl"), help="JSONL with `prompt` in each line"
    )
    parser.add_argument("--chat", action="store_true", help="put the prompts through the chat template")
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")


class Pair:
    """Everything loaded once: both models in evaluation mode, the prompts that leave room for an answer, what ends a text.

    Args:
        arguments: Of `add_pair_arguments` and machine.add_arguments.
        spare: Tokens beyond prompt and answer that must fit into the context.
    """

    def __init__(self, arguments: argparse.Namespace, spare: int) -> None:
        self.arguments, self.target = arguments, load(arguments.target, arguments)
        self.draft = (
            load(draft_folder(arguments.draft), arguments)
            if arguments.draft
            else shortened(self.target, arguments.draft_layers)
        )
        self.eos_ids = end_ids(self.target)
        size = self.target.config.vocab_size
        self.vocabulary = Vocabulary(size, size, (), None, tuple(self.eos_ids), None, "")
        context = min(model.config.max_position_embeddings for model in (self.target, self.draft))
        self.prompts = read_prompts(arguments, context - arguments.max_new_tokens - spare)

    @property
    def parameters(self) -> dict[str, int]:
        return {
            name: sum(p.numel() for p in model.parameters())
            for name, model in (("target", self.target), ("draft", self.draft))
        }


def load(folder: str | Path, arguments: argparse.Namespace) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[arguments.dtype])
    return model.to(arguments.device).eval()


def draft_folder(path: str) -> str:
    """The draft itself, where a run's folder is given."""
    exported = Path(path) / "export/huggingface"
    return str(exported) if exported.is_dir() else path


def shortened(target: PreTrainedModel, layers: int) -> PreTrainedModel:
    """The target with its first layers only."""
    config = copy.deepcopy(target.config)
    config.num_hidden_layers = layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:layers]
    draft = AutoModelForCausalLM.from_config(config, dtype=target.dtype).to(target.device).eval()
    weights = target.state_dict()
    draft.load_state_dict({name: weights[name] for name in draft.state_dict()})
    return draft


def end_ids(model: PreTrainedModel) -> list[int]:
    eos = model.generation_config.eos_token_id
    return [] if eos is None else [eos] if isinstance(eos, int) else list(eos)


def read_prompts(arguments: argparse.Namespace, room: int) -> list[list[int]]:
    """The first prompts that fit, as token ids."""
    tokenizer = AutoTokenizer.from_pretrained(arguments.target)
    found: list[list[int]] = []
    for line in Path(arguments.task).read_text(encoding="utf-8").splitlines():
        text = json.loads(line)["prompt"]
        if arguments.chat:
            text = tokenizer.apply_chat_template(
                [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
            )
        ids = tokenizer(text, add_special_tokens=not arguments.chat)["input_ids"]
        if 0 < len(ids) <= room:
            found.append(ids)
    return found[: arguments.prompts]


def first_difference(text: list[int], own: list[int]) -> int | None:
    """The place of the first token that differs; None for equal texts."""
    if text == own:
        return None
    return next(
        (i for i, (a, b) in enumerate(zip(text, own, strict=False)) if a != b), min(len(text), len(own))
    )


@torch.inference_mode()
def gap_at(
    target: PreTrainedModel, prompt: list[int], own: list[int], text: list[int], place: int
) -> float | None:
    """How much more log-prob the target itself gives one of the two tokens there, asked again in one pass; None where a text ends."""
    if place >= min(len(own), len(text)):
        return None
    ids = torch.tensor([prompt + own[:place]], device=target.device)
    logprobs_V = (
        target(input_ids=ids, use_cache=False, logits_to_keep=1).logits[0, -1].float().log_softmax(-1)
    )
    return abs(float(logprobs_V[own[place]] - logprobs_V[text[place]]))
