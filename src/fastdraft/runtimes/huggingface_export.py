"""The draft as transformers loads it: a directory for `assistant_model`, and proof that it works."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedConfig, PreTrainedModel

from fastdraft.modeling.drafts import load_draft, save_draft
from fastdraft.modeling.families import text_config
from fastdraft.modeling.model_files import quiet
from fastdraft.modeling.vocabulary import Vocabulary
from fastdraft.target import Target

OUTSIDE_MASS_LIMIT = 0.01  # mean probability on ids that a trimmed head lacks, in runtimes that load it whole
PADDING_MASS_LIMIT = (
    1e-4  # mean probability on padding ids from which runtimes that do not mask them waste proposals
)
_PADDING_TOKENS = 512  # read of each text


def write_huggingface(checkpoint: Path, folder: Path, num_speculative_tokens: int) -> None:
    """Writes a complete directory: fp32 weights as they were evaluated, tokenizer files byte for byte."""
    model = load_draft(checkpoint)
    # transformers' own defaults, 20 tokens and 0.4, change between releases and make small drafts slower.
    model.generation_config.num_assistant_tokens = num_speculative_tokens
    model.generation_config.num_assistant_tokens_schedule = "constant"
    model.generation_config.assistant_confidence_threshold = 0.0
    save_draft(model, folder, Target.at(checkpoint))


def load_assistant(folder: Path, device: torch.device | str = "cpu") -> PreTrainedModel:
    """The exported draft loaded as a user would load it, without any of our own code."""
    with quiet():
        return AutoModelForCausalLM.from_pretrained(folder).to(device).eval()


def check_assisted(
    target: PreTrainedModel,
    draft: PreTrainedModel,
    prompt_ids: Sequence[int],
    vocabulary: Vocabulary,
    max_new_tokens: int = 48,
) -> tuple[bool, list[int]]:
    """Whether the target's greedy text is the same with the draft as `assistant_model`, and that text.

    In half precision or at exact ties the two may differ: a pass over several tokens rounds differently.
    """
    prompt = torch.tensor([list(prompt_ids)], device=target.device)
    eos: Any = list(vocabulary.eos_token_ids) or None
    # Leaves nothing to the models' own generation configs.
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=eos,
        pad_token_id=vocabulary.pad_token_id if vocabulary.pad_token_id is not None else (eos or [0])[0],
        bos_token_id=vocabulary.bos_token_id,
    )
    asked: dict[str, Any] = {"attention_mask": torch.ones_like(prompt), "generation_config": settings}
    with quiet():
        alone = target.generate(prompt, **asked)
        assisted = target.generate(prompt, **asked, assistant_model=draft, **text_positions(target, prompt))
    return torch.equal(alone, assisted), alone[0, prompt.shape[1] :].tolist()


def text_positions(target: PreTrainedModel, prompt: torch.Tensor) -> dict[str, torch.Tensor]:
    """What `generate` must be told beside a prompt [1, T] by a target with several position axes (Qwen2-VL).

    By itself it hands positions [axes, 1, T] on to the draft, which reads one for each token and fails.
    """
    if not needs_positions(target.config):
        return {}
    return {"position_ids": torch.arange(prompt.shape[1], device=prompt.device)[None]}


def needs_positions(config: PreTrainedConfig) -> bool:
    """Whether `generate` makes positions on several axes for this target."""
    rope = getattr(text_config(config), "rope_parameters", None) or {}
    return bool(rope.get("mrope_section"))


@torch.inference_mode()
def padding_mass(
    draft: PreTrainedModel, vocabulary: Vocabulary, texts: Sequence[Sequence[int]]
) -> tuple[float, float]:
    """Mean and largest probability, at temperature 1, of all ids without a token together."""
    missing = list(vocabulary.missing_ids)
    if not missing:
        return 0.0, 0.0
    masses = []
    for ids in texts:
        input_ids = torch.tensor([list(ids[:_PADDING_TOKENS])], device=draft.device)
        probs_TV = draft(input_ids=input_ids).logits[0].float().softmax(-1)
        masses.append(probs_TV[:, missing].sum(-1).cpu().double())  # not every accelerator has float64
    mass = torch.cat(masses)
    return float(mass.mean()), float(mass.max())


@torch.inference_mode()
def outside_head(
    draft: PreTrainedModel, ids_K: Tensor, texts: Sequence[Sequence[int]], head_VD: Tensor
) -> tuple[int, float]:
    """Of a draft with a trimmed head in a runtime that loads it whole: at how many tokens an id that it lacks
    is the likeliest, and the mean probability of all these ids at temperature 1.

    `head_VD`: the whole head as the runtime's file holds it.
    """
    outside_V = torch.ones(len(head_VD), dtype=torch.bool, device=draft.device)
    outside_V[ids_K.to(draft.device)] = False
    proposed, masses = 0, []
    for ids in texts:
        input_ids = torch.tensor([list(ids[:_PADDING_TOKENS])], device=draft.device)
        hidden_TD = draft.get_decoder()(input_ids=input_ids, use_cache=False).last_hidden_state[0]
        logits_TV = (hidden_TD @ head_VD.to(hidden_TD).T).float()
        proposed += int(outside_V[logits_TV.argmax(-1)].sum())
        masses.append(logits_TV.softmax(-1)[:, outside_V].sum(-1))
    return proposed, float(torch.cat(masses).mean())
