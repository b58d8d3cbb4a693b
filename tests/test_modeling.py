"""Shapes counted against real modules, the search, first weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, LlamaConfig, MistralConfig, Phi3Config, Qwen2Config, Qwen3Config

from fastdraft.errors import RecipeError
from fastdraft.modeling import drafts, shapes
from fastdraft.modeling.architecture import Architecture, count, draft_hf_config, read_architecture, resample
from fastdraft.target import Target

LLAMA_8B = Architecture("llama", 128256, 4096, 32, 32, 8, 128, 14336, False, 131072)
STARTER = Architecture("llama", 8192, 256, 6, 4, 2, 64, 768, True, 2048)
PHI_3_MINI = {"vocab_size": 32064, "max_position_embeddings": 4096, "sliding_window": 2047}
LLAMA_3_ROPE = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0}
LLAMA_3_ROPE |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
WIDTHS = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 80}
DEPTHS = {"num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
IDS = {"max_position_embeddings": 128, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0}


def parameters_of(config: Any) -> int:
    """Of the real modules."""
    return count(config).stored


def _small(cls: Any, **values: Any) -> Any:
    return cls(**{**WIDTHS, **DEPTHS, **IDS, **values})


def _explicit(
    config: Any, hidden_size: int, num_layers: int, intermediate_size: int, **heads: Any
) -> Architecture:
    sizes = {"hidden_size": hidden_size, "num_layers": num_layers, "intermediate_size": intermediate_size}
    return shapes.explicit(read_architecture(config), **sizes, **heads)


HALF_ROPE = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
FAMILY_CONFIGS = [
    _small(LlamaConfig),
    _small(LlamaConfig, tie_word_embeddings=True, attention_bias=True, mlp_bias=True),
    _small(LlamaConfig, head_dim=32),
    _small(MistralConfig, head_dim=32, sliding_window=16),
    _small(Qwen2Config),
    _small(Qwen2Config, tie_word_embeddings=True),
    _small(Qwen3Config, head_dim=32),
    _small(Qwen3Config, attention_bias=True, tie_word_embeddings=True),
    _small(Phi3Config),
    _small(Phi3Config, rope_parameters=HALF_ROPE),
]


@pytest.mark.parametrize(
    "config", FAMILY_CONFIGS, ids=lambda c: f"{c.model_type}-{'tied' if c.tie_word_embeddings else 'untied'}"
)
def test_the_formula_counts_the_parameters_of_the_real_module(config: Any) -> None:
    assert read_architecture(config).parameters == parameters_of(config)


@pytest.mark.parametrize("config", FAMILY_CONFIGS, ids=lambda c: c.model_type)
def test_a_draft_of_every_family_has_the_counted_size_and_runs(config: Any) -> None:
    shape = _explicit(config, 128, 2, 192)
    draft = draft_hf_config(config, shape)
    assert parameters_of(draft) == shape.parameters
    model = drafts.build_draft(draft, seed=0)
    with torch.inference_mode():
        assert model(torch.tensor([[1, 2, 3]])).logits.shape == (1, 3, 96)


def test_the_preset_phi_3_mini_50m_has_exactly_52107776_parameters() -> None:
    target = Phi3Config(**PHI_3_MINI)
    shape = shapes.preset("phi-3-mini-50m", read_architecture(target))
    assert parameters_of(draft_hf_config(target, shape)) == shape.parameters == 52_107_776
    assert (shape.hidden_size, shape.num_layers, shape.intermediate_size) == (512, 6, 1408)
    assert (shape.num_heads, shape.num_kv_heads, shape.tied) == (8, 8, False)


def test_the_preset_llama_3_1_8b_150m_has_exactly_154147328_parameters() -> None:
    widths = {"vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336}
    depths = {"max_position_embeddings": 131072} | {
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    }
    target = LlamaConfig(**widths, **depths, rope_parameters=LLAMA_3_ROPE)
    shape = shapes.preset("llama-3.1-8b-150m", read_architecture(target))
    assert parameters_of(target) == read_architecture(target).parameters == 8_030_261_248
    assert parameters_of(draft_hf_config(target, shape)) == shape.parameters == 154_147_328
    assert shape.read_parameters / LLAMA_8B.read_parameters == pytest.approx(0.012, abs=5e-4)


def test_a_draft_inherits_all_but_width_depth_and_heads() -> None:
    values = {"vocab_size": 320, "max_position_embeddings": 131072, "rope_parameters": LLAMA_3_ROPE}
    values |= {"rms_norm_eps": 1e-5, "hidden_act": "gelu", "eos_token_id": [7, 9]}
    target = LlamaConfig(**values)
    draft = draft_hf_config(target, _explicit(target, 64, 1, 128))
    for name in (*values, "bos_token_id", "model_type"):
        assert getattr(draft, name) == getattr(target, name), name


def test_a_draft_attends_to_its_full_context() -> None:
    mistral = _small(MistralConfig, sliding_window=16)
    qwen = _small(Qwen2Config, use_sliding_window=True, sliding_window=16, max_window_layers=1)
    for target in (mistral, qwen):
        draft = draft_hf_config(target, _explicit(target, 64, 5, 128))
        assert draft.sliding_window is None
        assert set(getattr(draft, "layer_types", None) or ["full_attention"]) == {"full_attention"}
        assert len(getattr(draft, "layer_types", None) or range(5)) == 5


def _longrope() -> Any:
    factors = [1.0 + i / 4 for i in range(48)]
    original = {"original_max_position_embeddings": 4096}
    both = {"short_factor": factors, "long_factor": [2 * factor for factor in factors]}
    rope = {"rope_type": "longrope", "rope_theta": 1e4, **both, **original}
    return Phi3Config(**{**PHI_3_MINI, "max_position_embeddings": 131072}, rope_parameters=rope, **original)


def test_longrope_factors_are_resampled_for_another_head_width() -> None:
    target = _longrope()
    draft = draft_hf_config(target, shapes.preset("phi-3-mini-50m", read_architecture(target)))
    factors = draft.rope_parameters["short_factor"]
    assert len(factors) == 32
    assert factors[0] == 1.0
    assert factors == sorted(factors)
    assert parameters_of(draft) == 52_107_776


def test_resampling_to_the_same_length_changes_nothing() -> None:
    assert resample([1.0, 2.0, 4.0], 3) == [1.0, 2.0, 4.0]
    assert resample([1.0, 3.0], 4) == [1.0, 2.0, 3.0, 3.0]


def test_the_search_stays_within_three_percent_and_prefers_few_layers() -> None:
    wide = replace(STARTER, vocab_size=32064)
    for target, budget in ((LLAMA_8B, 150e6), (LLAMA_8B, 50e6), (STARTER, 1.5e6), (wide, 50e6)):
        shape = shapes.search(target, int(budget))
        assert abs(shape.parameters - budget) <= 0.03 * budget
        assert shape.num_layers <= 8
        assert shape.hidden_size % 64 == 0
        assert shape.intermediate_size % 64 == 0
    assert shapes.search(LLAMA_8B, 150_000_000, num_layers=3).num_layers == 3


@settings(max_examples=60, deadline=None)
@given(st.integers(20_000_000, 600_000_000))
def test_any_budget_gives_a_fitting_shape_or_a_named_alternative(budget: int) -> None:
    try:
        shape = shapes.search(LLAMA_8B, budget)
    except RecipeError as error:
        named = str(error).partition("the nearest: ")[2]
    else:
        assert abs(shape.parameters - budget) <= 0.03 * budget
        assert shape.num_heads % shape.num_kv_heads == 0
        assert shape.num_heads * shape.head_dim == shape.hidden_size
        return
    assert named[0].isdigit()


def test_only_small_drafts_of_tied_targets_are_tied() -> None:
    assert shapes.search(STARTER, 1_500_000).tied
    assert not shapes.search(STARTER, 30_000_000).tied
    assert not shapes.search(replace(STARTER, tied=False), 1_500_000).tied


def test_an_untied_input_embedding_is_not_read() -> None:
    tied, untied = replace(STARTER, tied=True), replace(STARTER, tied=False)
    assert untied.parameters - tied.parameters == 8192 * 256
    assert tied.bytes_per_token(8) == untied.bytes_per_token(8) == tied.parameters
    assert untied.flops_per_token == 2 * tied.parameters


def _draft_model(tied: bool = False, seed: int = 0) -> Any:
    target = _small(LlamaConfig, tie_word_embeddings=tied, vocab_size=2000)
    shape = _explicit(target, 128, 4, 256, num_heads=4, num_kv_heads=2, tied=tied)
    return drafts.build_draft(draft_hf_config(target, shape), seed)


def test_first_weights_follow_the_seed_and_leave_the_callers_random_state_alone() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, again, other = _draft_model(seed=1), _draft_model(seed=1), _draft_model(seed=2)
    assert torch.equal(torch.get_rng_state(), before)
    pairs = zip(first.parameters(), again.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)


def test_first_weights_have_the_stated_scales_and_the_loss_starts_at_ln_vocabulary() -> None:
    model = _draft_model()
    layer = model.model.layers[0]
    assert layer.mlp.up_proj.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert layer.mlp.down_proj.weight.std().item() == pytest.approx(0.02 / 8**0.5, rel=0.05)
    assert layer.self_attn.o_proj.weight.std().item() == pytest.approx(0.02 / 8**0.5, rel=0.05)
    assert torch.equal(model.model.norm.weight, torch.ones(128))
    ids = torch.randint(0, 2000, (4, 64), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        loss = torch.nn.functional.cross_entropy(model(ids).logits.flatten(0, 1), ids.roll(-1, 1).flatten())
    assert loss.item() == pytest.approx(torch.tensor(2000.0).log().item(), abs=0.1)


def test_projection_keeps_the_directions_in_which_tokens_differ() -> None:
    generator = torch.Generator().manual_seed(0)
    latent = torch.randn(500, 8, generator=generator)
    matrix = latent @ torch.randn(8, 64, generator=generator) + 3.0  # rank 8 around a common mean
    projected = drafts.project(matrix, 16, seed=1)
    assert projected.shape == (500, 16)
    assert projected.std().item() == pytest.approx(0.02, rel=1e-3)
    centred = matrix - matrix.mean(0)
    before, after = torch.cdist(centred, centred), torch.cdist(projected, projected)
    assert torch.allclose(after / after.mean(), before / before.mean(), atol=1e-3)


def test_projected_embeddings_need_only_the_two_matrices(tiny_target: Path) -> None:
    config = AutoConfig.from_pretrained(tiny_target)
    model = drafts.build_draft(draft_hf_config(config, _explicit(config, 64, 1, 64, tied=False)), 0)
    body = model.model.layers[0].mlp.up_proj.weight.clone()
    head = model.lm_head.weight.clone()
    drafts.set_projected_embeddings(model, Target.at(tiny_target), 0)
    assert torch.equal(body, model.model.layers[0].mlp.up_proj.weight)
    assert not torch.equal(head, model.lm_head.weight)
    assert model.lm_head.weight.std().item() <= 0.0201


def test_an_export_in_int4_reads_its_head_in_int8() -> None:
    body, head = LLAMA_8B.body_parameters, LLAMA_8B.embedding_parameters
    assert LLAMA_8B.exported_bytes_per_token("int4") == body / 2 + head
    assert LLAMA_8B.exported_bytes_per_token("int8") == body + head == LLAMA_8B.bytes_per_token(8)
    assert LLAMA_8B.exported_bytes_per_token("fp16") == LLAMA_8B.bytes_per_token(16)
