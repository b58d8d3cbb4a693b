"""Tiny random targets of every family, with a padded vocabulary and a real tokenizer, and noisy copies that
serve as drafts.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from conftest import write_tokenizer
from fastdraft.console import Console
from fastdraft.recipe.base import load_config
from fastdraft.recipe.run import RunConfig
from fastdraft.recipe.training import DesignConfig
from fastdraft.run_folder import RunFolder
from fastdraft.stages import design
from fastdraft.stages.context import StageContext
from fastdraft.target import Target

_WIDTHS = {"vocab_size": 320, "hidden_size": 32, "intermediate_size": 48, "max_position_embeddings": 160}
_HEADS = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
_IDS = {"bos_token_id": 0, "eos_token_id": [3, 5], "pad_token_id": 0}
SHAPE = {**_WIDTHS, **_HEADS, **_IDS, "tie_word_embeddings": False}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "decoder_sparse_step": 1}
VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
VISION |= {"image_size": 28, "patch_size": 14}
QWEN_VISION = {
    "depth": 1,
    "embed_dim": 16,
    "hidden_size": 32,
    "num_heads": 2,
    "mlp_ratio": 2,
    "patch_size": 14,
}
QWEN_IDS = {"image_token_id": 310, "video_token_id": 311, "vision_start_token_id": 312}
QWEN_IDS |= {"vision_end_token_id": 313, "tie_word_embeddings": False}
PICTURES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "gemma3": (
        {**VISION, "model_type": "siglip_vision_model"},
        {"mm_tokens_per_image": 4, "image_token_index": 310},
    ),
    "llava": ({**VISION, "model_type": "clip_vision_model"}, {"image_token_index": 310}),
    "mistral3": ({**VISION, "model_type": "pixtral"}, {"image_token_index": 310}),
    "qwen2_vl": (QWEN_VISION, QWEN_IDS),
    "qwen2_5_vl": (QWEN_VISION, QWEN_IDS),
}
FACTORS = {"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [1.0, 2.0, 3.0, 4.0]}
LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, **FACTORS}
WINDOW = {"sliding_window": 8}
MIXED = {"layer_types": ["sliding_attention", "full_attention"], **WINDOW}
AXES = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}


def rope(kind: str, **values: Any) -> dict[str, Any]:
    """Rope scaling of a Llama."""
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 1e4, "factor": 4.0, **values}}


LLAMA3 = rope("llama3", low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=40)
GRANITE = {"logits_scaling": 4.0, "embedding_multiplier": 6.0}
GRANITE |= {"residual_multiplier": 0.5, "attention_multiplier": 0.2}
GEMMA = {**MIXED, "tie_word_embeddings": True, "query_pre_attn_scalar": 8}
TARGETS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-rope-llama3": ("llama", LLAMA3),
    "llama-rope-yarn": ("llama", rope("yarn", original_max_position_embeddings=40)),
    "llama-rope-linear": ("llama", rope("linear")),
    "llama-rope-dynamic": ("llama", rope("dynamic")),
    "mistral-window": ("mistral", WINDOW),
    "qwen2-mixed": ("qwen2", {"use_sliding_window": True, "max_window_layers": 1, **WINDOW}),
    "qwen3": ("qwen3", {"tie_word_embeddings": True}),
    "phi3-longrope": ("phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": 16}),
    "gemma": ("gemma", {"tie_word_embeddings": True}),
    "gemma2": ("gemma2", {**GEMMA, "final_logit_softcapping": 5.0}),
    "gemma3-text": ("gemma3_text", GEMMA),
    "gpt2": ("gpt2", {"n_positions": 160, "tie_word_embeddings": True}),
    "gpt-neox": ("gpt_neox", {}),
    "mixtral": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2-moe": ("qwen2_moe", {**EXPERTS, "shared_expert_intermediate_size": 24}),
    "qwen3-moe": ("qwen3_moe", EXPERTS),
    "granite": ("granite", GRANITE),
    "cohere": ("cohere", {"logit_scale": 0.25, "tie_word_embeddings": True}),
    "cohere2": ("cohere2", {**MIXED, "logit_scale": 0.25, "tie_word_embeddings": True}),
    "gemma3-pictures": ("gemma3", {**MIXED, "query_pre_attn_scalar": 8}),
    "llava-mistral": ("llava", {"model_type": "mistral"}),
    "mistral3": ("mistral3", {"model_type": "mistral"}),
    "qwen2-vl": ("qwen2_vl", AXES),
    "qwen2.5-vl": ("qwen2_5_vl", AXES),
}


def family_config(name: str) -> Any:
    """The config of one of `TARGETS`."""
    from transformers import AutoConfig

    family, changes = TARGETS[name]
    text = {**SHAPE, **changes}
    without = ["head_dim"] if family in ("gpt2", "gpt_neox", "phi3", "qwen2", "qwen2_moe") else []
    without += ["num_key_value_heads", "max_position_embeddings"] if family == "gpt2" else []
    text = {key: value for key, value in text.items() if key not in without}
    if family not in PICTURES:
        return AutoConfig.for_model(family, **text)
    vision, others = PICTURES[family]
    return AutoConfig.for_model(family, text_config=text, vision_config=vision, **others)


def write_family(folder: Path, name: str) -> Path:
    """A random target of a family, sharpened so that its greedy text is well defined and not one token."""
    import torch
    from transformers import GenerationConfig

    from fastdraft.modeling.architecture import auto_class

    config = family_config(name)
    folder.mkdir(parents=True, exist_ok=True)
    write_tokenizer(folder)
    torch.manual_seed(0)
    model = auto_class(config).from_config(config, dtype=torch.float32)
    with torch.no_grad():
        tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
        # A tied model whose embedding is large says its last token again.
        for parameter in model.parameters():
            if parameter.ndim >= 2 and not (tied and parameter is model.get_input_embeddings().weight):
                parameter.mul_(20 if tied else 6)
    model.generation_config = GenerationConfig(bos_token_id=0, eos_token_id=[3, 5], pad_token_id=0)
    model.save_pretrained(folder)
    return folder


def noisy(model: Any, share: float = 0.1) -> Any:
    """A copy with noise on its matrices: a draft whose proposals are sometimes accepted."""
    import copy

    import torch

    draft, generator = copy.deepcopy(model), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in draft.parameters():
            if parameter.ndim >= 2:
                parameter.add_(share * parameter.std() * torch.randn(parameter.shape, generator=generator))
    return draft.eval()


def designed(
    root: Path, target: Path, seed: int = 0, console: Console | None = None, **section: Any
) -> tuple[Path, dict[str, Any]]:
    """The design stage on a target: the draft's folder and the manifest."""
    shape = {"kind": "shape", "hidden_size": 32, "num_layers": 1, "intermediate_size": 64}
    config = load_config(DesignConfig, {"draft": shape, **section}, "design")
    settings = RunConfig(name="test", seed=seed)
    context = StageContext(RunFolder(root), settings, Target.at(target), {}, console or Console(quiet=True))
    folder = context.folder("design")
    folder.begin(design.fingerprint(config, context))
    design.run(config, context)
    return folder.path / "draft", folder.manifest()
