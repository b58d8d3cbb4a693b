"""The draft as transformers loads it: a directory for `assistant_model`, and proof that it loads and keeps its promise.

Decides that num_speculative_tokens and the confidence threshold are pinned in the generation config (transformers'
own defaults, 20 tokens and 0.4, change between releases and make small drafts slower), and what is tested on the files
themselves: assisted greedy text against the target alone, and the draft's probability on ids without a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fastdraft.modeling.drafts import load_draft, save_draft
from fastdraft.modeling.families import text_config
from fastdraft.modeling.model_files import quiet
from fastdraft.modeling.vocabulary import Vocabulary
from fastdraft.target import Target

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

PADDING_MASS_LIMIT = 1e-4
"""Mean probability on padding ids above which runtimes that do not mask them waste proposals."""
_CHUNK = 512


@dataclass(frozen=True)
class AssistedCheck:
    """What transformers' assisted generation did with the exported files."""

    same_text: bool
    """Whether the greedy tokens with and without the draft are equal."""
    num_tokens: int
    response_ids: list[int]
    """What the target wrote alone."""


def write_huggingface(
    checkpoint: Path, folder: Path, num_speculative_tokens: int, confidence_threshold: float
) -> list[str]:
    """Writes a complete Hugging Face directory from a checkpoint and returns the names of its files.

    Weights are stored in fp32, bit for bit those that were evaluated; tokenizer files are copied byte for byte.

    Args:
        checkpoint: Directory of the trained draft, tokenizer files included.
        folder: Replaced when it exists.
        num_speculative_tokens: K, kept constant by the runtime.
        confidence_threshold: The draft stops proposing below this probability; 0 never stops early.

    Raises:
        FastDraftError: when the checkpoint is damaged. FastDraftError: when the disk is full.
    """
    model = load_draft(checkpoint)
    config = model.generation_config
    config.num_assistant_tokens = num_speculative_tokens
    config.num_assistant_tokens_schedule = "constant"
    config.assistant_confidence_threshold = confidence_threshold
    save_draft(model, folder, Target.at(checkpoint))
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def load_assistant(folder: Path, device: torch.device | str = "cpu") -> PreTrainedModel:
    """The exported draft loaded as a user would load it, without any of our own code."""
    from transformers import AutoModelForCausalLM

    with quiet():
        return AutoModelForCausalLM.from_pretrained(folder).to(device).eval()


def check_assisted(
    target: PreTrainedModel,
    draft: PreTrainedModel,
    prompt_ids: Sequence[int],
    vocabulary: Vocabulary,
    max_new_tokens: int = 48,
) -> AssistedCheck:
    """Greedy text of the target alone and with the draft as `assistant_model`, for one prompt.

    In half precision or at exact ties the two may differ, because a pass over several tokens rounds differently from a
    pass over one.
    """
    prompt = torch.tensor([list(prompt_ids)], device=target.device)
    settings = _greedy(vocabulary, max_new_tokens)
    mask = torch.ones_like(prompt)
    positions = text_positions(target, prompt)
    with quiet():
        alone = target.generate(prompt, attention_mask=mask, generation_config=settings)
        assisted = target.generate(
            prompt, attention_mask=mask, generation_config=settings, assistant_model=draft, **positions
        )
    response = alone[0, prompt.shape[1] :].tolist()
    return AssistedCheck(response == assisted[0, prompt.shape[1] :].tolist(), len(response), response)


def text_positions(target: PreTrainedModel, prompt: torch.Tensor) -> dict[str, torch.Tensor]:
    """What `generate` must be told beside the prompt [1, T] for a target that counts positions on several axes (Qwen2-VL).

    By itself it makes positions [axes, 1, T] for pictures and hands them on to the draft, which, as any text model, reads one for
    each token and fails. Told the positions in the text, [1, T], both use them.
    """
    return (
        {"position_ids": torch.arange(prompt.shape[1], device=prompt.device)[None]}
        if needs_positions(target.config)
        else {}
    )


def needs_positions(config: PreTrainedConfig) -> bool:
    """Whether `generate` must be told the positions in the text, by the target's config."""
    rope = getattr(text_config(config), "rope_parameters", None) or {}
    return bool(rope.get("mrope_section"))


def _greedy(vocabulary: Vocabulary, max_new_tokens: int) -> GenerationConfig:
    """Settings that leave nothing to the models' own generation configs."""
    from transformers import GenerationConfig

    eos: Any = list(vocabulary.eos_token_ids) or None
    pad = vocabulary.pad_token_id if vocabulary.pad_token_id is not None else (eos or [0])[0]
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=eos,
        pad_token_id=pad,
        bos_token_id=vocabulary.bos_token_id,
    )


@torch.inference_mode()
def padding_mass(
    draft: PreTrainedModel, vocabulary: Vocabulary, texts: Sequence[Sequence[int]]
) -> tuple[float, float]:
    """Mean and largest probability that the draft gives, at temperature 1, to all ids without a token together.

    Args:
        draft: In eval mode.
        vocabulary: Names the ids without a token.
        texts: Token ids of texts; each is read from its beginning, at most 512 tokens of it.
    """
    missing = list(vocabulary.missing_ids)
    if not missing:
        return 0.0, 0.0
    masses = []
    for ids in texts:
        logits_TV = draft(input_ids=torch.tensor([list(ids[:_CHUNK])], device=draft.device)).logits[0].float()
        masses.append(
            logits_TV.softmax(-1)[:, missing].sum(-1).cpu().double()
        )  # not every accelerator has float64
    mass = torch.cat(masses)
    return float(mass.mean()), float(mass.max())
