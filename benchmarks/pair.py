"""A target, its draft and prompts for benchmarks that need torch and transformers only.

The draft is a directory, a finished run, or, without either, the target's own first layers with its
embeddings, norm and head: untrained, accepted now and then, the same on every machine. No id is masked: its
vocabulary is the target's.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

import torch
from machine import ROOT, options
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from fastdraft.functional.same_text import compare_texts
from fastdraft.modeling.vocabulary import Vocabulary

SHIPPED = ROOT / "src/fastdraft/shipped"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
Texts = Sequence[Sequence[int]]


def pair_options(about: str | None, name: str) -> argparse.ArgumentParser:
    """machine.options and what a pair needs."""
    parser = options(about, name)
    add = parser.add_argument
    add("--target", default=str(SHIPPED / "targets/starter"), help="directory or hub id; default: starter")
    add("--draft", help="a draft's directory, or a run's; without it, the target's first layers")
    add("--draft-layers", type=int, default=1, help="layers of that draft")
    add("--task", default=str(SHIPPED / "tasks/code.jsonl"), help="JSONL with `prompt` in each line")
    add("--chat", action="store_true", help="put the prompts through the chat template")
    add("--prompts", type=int, default=20)
    add("--max-new-tokens", type=int, default=64)
    add("--dtype", choices=DTYPES, default="fp32")
    add("--temperatures", type=float, nargs="+", default=[0.0, 0.6])
    add("--turns", type=int, default=5)
    add("--k", type=int, default=3, help="num_speculative_tokens")
    return parser


class Pair:
    """Both models, the prompts that leave room for an answer and `spare` tokens, what ends a text."""

    def __init__(self, given: argparse.Namespace, spare: int) -> None:
        self.given, self.target = given, _load(given.target, given)
        self.draft = _draft(self.target, given)
        eos = self.target.generation_config.eos_token_id
        self.eos_ids = [] if eos is None else [eos] if isinstance(eos, int) else list(eos)
        size = self.target.config.vocab_size
        self.vocabulary = Vocabulary(size, size, (), None, tuple(self.eos_ids), None, "")
        context = min(model.config.max_position_embeddings for model in (self.target, self.draft))
        self.prompts = _read_prompts(given, context - given.max_new_tokens - spare)
        models = {"target": self.target, "draft": self.draft}
        self.parameters = {name: sum(p.numel() for p in one.parameters()) for name, one in models.items()}

    def gaps(self, texts: Texts, own: Texts) -> list[float | None]:
        """Of every text that is not the target's own: the gap in log-prob where they part; None: one ends."""
        texts_of = zip(self.prompts, own, texts, strict=True)
        return [found.gap for texts in texts_of if (found := compare_texts(*texts, self._gap)) is not None]

    @torch.inference_mode()
    def _gap(self, ids: list[int], first: int, second: int) -> float:
        inputs = torch.tensor([ids], device=self.target.device)
        logits_V = self.target(input_ids=inputs, use_cache=False, logits_to_keep=1).logits[0, -1].float()
        return float(logits_V[first] - logits_V[second])


def _load(folder: str | Path, given: argparse.Namespace) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[given.dtype])
    return model.to(given.device).eval()


def _draft(target: PreTrainedModel, given: argparse.Namespace) -> PreTrainedModel:
    if given.draft:
        exported = Path(given.draft) / "export/huggingface"  # of a run
        return _load(exported if exported.is_dir() else given.draft, given)
    config = copy.deepcopy(target.config)
    config.num_hidden_layers = given.draft_layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[: given.draft_layers]
    draft = AutoModelForCausalLM.from_config(config, dtype=target.dtype).to(target.device).eval()
    weights = target.state_dict()
    draft.load_state_dict({name: weights[name] for name in draft.state_dict()})
    return draft


def _read_prompts(given: argparse.Namespace, room: int) -> list[list[int]]:
    """The first prompts that fit, as token ids."""
    tokenizer = AutoTokenizer.from_pretrained(given.target)
    found: list[list[int]] = []
    for line in Path(given.task).read_text(encoding="utf-8").splitlines():
        text = json.loads(line)["prompt"]
        if given.chat:
            turn = [{"role": "user", "content": text}]
            text = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, add_special_tokens=not given.chat)["input_ids"]
        if 0 < len(ids) <= room:
            found.append(ids)
    return found[: given.prompts]
