"""Drafts from a few layers of a trained model: which are kept, what is fitted, what is refused."""

from __future__ import annotations

import copy
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from conftest import write_recipe, write_target
from family_fixture import designed
from fastdraft import cli
from fastdraft.errors import RecipeError, TargetError
from fastdraft.modeling.drafts import build_draft
from fastdraft.modeling.families import DRAFT_FAMILIES
from fastdraft.modeling.narrowing import main_directions, narrow_layers, rotate
from fastdraft.modeling.pruning import choose_layers, fit_vocabulary, mean_loss, prune, refit, residual_states
from fastdraft.pipeline import run
from fastdraft.recipe.recipe import load_recipe
from fastdraft.reporting.page import read_run, render
from fastdraft.run_folder import RunFolder
from fastdraft.target import Target

PRUNED = {"kind": "pruned", "layers": 2}


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random target of six layers."""
    return write_target(tmp_path_factory.mktemp("deep"), layers=6)


def small(layers: int = 4, **changes: Any) -> tuple[LlamaForCausalLM, LlamaConfig]:
    """A random Llama in which every layer matters, and a config of two layers."""
    shape = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4}
    shape |= {"num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.3, **changes}
    torch.manual_seed(0)
    config = LlamaConfig(num_hidden_layers=layers, **shape)
    return LlamaForCausalLM(config).eval(), LlamaConfig(num_hidden_layers=2, **shape)


def some_rows(vocab: int = 50, rows: int = 24, length: int = 16) -> torch.Tensor:
    return torch.randint(0, vocab, (rows, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("tied", [True, False])
def test_with_all_layers_kept_the_logits_are_the_sources_own(tied: bool) -> None:
    source, _ = small(tie_word_embeddings=tied)
    draft, kept, similarities = prune(source, source.config, 4, some_rows())
    assert kept == [0, 1, 2, 3]
    assert len(similarities) == 4
    assert all(-1 <= each <= 1 for each in similarities)
    assert (draft.get_input_embeddings().weight is draft.get_output_embeddings().weight) is tied
    with torch.no_grad():
        assert torch.equal(draft(some_rows()).logits, source(some_rows()).logits)


@torch.no_grad()
@pytest.mark.parametrize("family", DRAFT_FAMILIES)
def test_every_family_of_drafts_is_pruned(family: str) -> None:
    _, plain = small()
    keys = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    shape = {name: getattr(plain, name) for name in keys}
    config = AutoConfig.for_model(family, **shape, num_hidden_layers=3, pad_token_id=0)
    source, fewer = AutoModelForCausalLM.from_config(config).eval(), copy.deepcopy(config)
    whole, _, _ = prune(source, config, 3, some_rows())
    assert torch.equal(whole(some_rows()).logits, source(some_rows()).logits)
    fewer.num_hidden_layers = 2
    draft, kept, _ = prune(source, fewer, 2, some_rows())
    assert kept == [0, 2]
    assert draft(some_rows()).logits.isfinite().all()


def test_first_layers_of_a_prefix_are_copied_and_only_the_one_at_the_gap_is_fitted() -> None:
    source, config = small()
    draft, kept, _ = prune(source, config, [0, 1], some_rows())
    first, second = draft.model.layers
    assert kept == [0, 1]
    for own, layer in ((first, 0), (second, 1)):
        for name, weight in own.named_parameters():
            same = torch.equal(weight, source.model.layers[layer].get_parameter(name))
            assert same is not (layer == 1 and name == "mlp.down_proj.weight"), name


def test_a_fit_brings_the_states_nearer_to_the_sources_on_other_rows_too() -> None:
    source, config = small()
    rows, other = some_rows(rows=128), some_rows(rows=140)[128:]
    fitted, _, _ = prune(source, config, [0, 3], rows)
    cut = build_draft(config, 0)
    cut.load_state_dict(fitted.state_dict())
    for own, layer in zip(cut.model.layers, (0, 3), strict=True):
        own.load_state_dict(source.model.layers[layer].state_dict())
    wanted = residual_states(source, other)[-1].float()
    errors = [float((residual_states(m, other)[-1].float() - wanted).square().mean()) for m in (fitted, cut)]
    assert errors[0] < 0.8 * errors[1]


@torch.no_grad()
def test_a_gap_that_a_linear_map_bridges_is_nearly_closed() -> None:
    source, config = small()
    draft = build_draft(config, 0)
    draft.load_state_dict({k: v for k, v in source.state_dict().items() if k in draft.state_dict()})
    down, rows = draft.model.layers[1].mlp.down_proj.weight, some_rows(rows=128)
    before = down.clone()
    down.mul_(3.0)
    states = residual_states(draft, rows)
    down.copy_(before)
    errors = [(residual_states(draft, rows)[-1] - states[-1]).float().square().mean()]
    refit(draft, [0, 1], [states[0], states[1], states[1], states[2]])
    errors.append((residual_states(draft, rows)[-1] - states[-1]).float().square().mean())
    assert errors[1] < 0.05 * errors[0]


@pytest.mark.parametrize(
    ("turns", "count", "kept"),
    [
        ([9, 40, 1, 1, 1, 40, 9], 3, [0, 1, 6]),
        ([9, 1, 1, 40, 1, 1, 9], 3, [0, 3, 6]),
        ([9, 1, 1, 1, 1, 1, 9], 2, [0, 6]),
        ([9, 1, 1, 1, 1, 1, 9], 7, [0, 1, 2, 3, 4, 5, 6]),
    ],
)
def test_the_layers_that_turn_the_states_most_are_kept(turns: list[int], count: int, kept: list[int]) -> None:
    angles = torch.tensor([0, *turns]).cumsum(0) * torch.pi / 180
    states = [torch.stack([angle.cos(), angle.sin()]).expand(2, 3, 2) for angle in angles]
    assert choose_layers(states, count) == kept


@torch.no_grad()
@pytest.mark.parametrize(
    ("config_class", "model_class", "changes"),
    [
        (LlamaConfig, LlamaForCausalLM, {"attention_bias": True, "mlp_bias": True}),
        (Qwen2Config, Qwen2ForCausalLM, {"tie_word_embeddings": True}),
        (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 8}),
    ],
)
def test_a_rotation_of_the_whole_residual_stream_changes_no_logit(
    config_class: Any, model_class: Any, changes: dict[str, Any]
) -> None:
    _, plain = small()
    keys = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    shape = {name: getattr(plain, name) for name in keys} | {"num_hidden_layers": 3, **changes}
    torch.manual_seed(0)
    source = model_class(config_class(**shape, initializer_range=0.3)).eval()
    for weight in source.parameters():
        weight.add_(0.3 * torch.randn_like(weight))  # gains and biases too
    config = config_class(**{**shape, "tie_word_embeddings": False})
    weights, draft = source.state_dict(), build_draft(config, 0)
    basis = main_directions(residual_states(source, some_rows()), 16)
    assert torch.allclose(basis.T @ basis, torch.eye(16), atol=1e-5)
    rotate(weights, 3, basis)
    draft.load_state_dict(weights)
    torch.testing.assert_close(draft(some_rows()).logits, source(some_rows()).logits, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_heads_and_neurons_that_add_nothing_are_cut_first_and_change_no_logit() -> None:
    source, _ = small(layers=2)
    for layer in source.model.layers:
        layer.self_attn.o_proj.weight[:, :8] = 0  # the first key-value head's two queries
        layer.mlp.down_proj.weight[:, 3:9] = 0
    config = LlamaConfig(**{**source.config.to_dict(), "intermediate_size": 18, "num_key_value_heads": 1})
    config.num_attention_heads, config.head_dim = 2, 4
    draft, _, _ = prune(source, config, [0, 1], some_rows())
    torch.testing.assert_close(draft(some_rows()).logits, source(some_rows()).logits, atol=2e-2, rtol=2e-2)
    contributions = [{"o_proj": torch.ones(16), "down_proj": torch.arange(24.0)}] * 2
    weights = source.state_dict()
    narrow_layers(weights, source.config, config, contributions)
    kept = weights["model.layers.0.mlp.up_proj.weight"]
    assert torch.equal(kept, source.model.layers[0].mlp.up_proj.weight[6:])


def test_a_main_direction_is_the_one_along_which_states_lie() -> None:
    states = torch.randn(4, 10, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 9.0, 0.1])
    first = main_directions([states], 1)[:, 0]
    assert first.abs().argmax() == 1
    assert first.norm() == pytest.approx(1)


@pytest.mark.parametrize("size", [40, 50, 60])
def test_padding_rows_are_cut_or_added_with_a_mean_logit(size: int) -> None:
    source, _ = small()
    ids = some_rows(40)
    with torch.no_grad():
        before = source(ids).logits
        fit_vocabulary(source, size)
        after = source(ids).logits
    assert after.shape[-1] == size == source.config.vocab_size
    torch.testing.assert_close(after[..., : min(size, 50)], before[..., : min(size, 50)])
    for place in range(50, size):
        torch.testing.assert_close(after[..., place], before.mean(-1))


def test_the_loss_is_that_of_transformers() -> None:
    source, _ = small()
    with torch.no_grad():
        wanted = float(source(some_rows(), labels=some_rows()).loss)
    assert mean_loss(source, some_rows()) == pytest.approx(wanted, rel=1e-5)


def test_a_pruned_draft_loads_in_transformers_and_its_manifest_says_what_it_cost(
    deep: Path, tmp_path: Path
) -> None:
    target = tmp_path / "target"
    shutil.copytree(deep, target)
    (target / "README.md").write_text("---\nlanguage: en\nlicense: mit\n---\n# A model\n", encoding="utf-8")
    folder, manifest = designed(tmp_path / "run", target, draft=PRUNED)
    model, about = AutoModelForCausalLM.from_pretrained(folder), manifest["start"]
    assert len(model.model.layers) == model.config.num_hidden_layers == 2
    assert sum(p.numel() for p in model.parameters()) == manifest["parameters"]
    assert manifest["initialization"] == "pruned"
    assert (about["source"], about["license"], about["of"]) == (str(target), "mit", 6)
    assert about["layers"] == [0, 5]
    assert len(about["similarities"]) == 6
    assert min(about["loss_of_source"], about["loss"]) > 0
    card = render("model_card.md.j2", read_run(RunFolder(tmp_path / "run")), k=3, checks={})
    assert re.search(r"first weights: .*target \(mit\)", card)


def test_a_sibling_with_fewer_padding_rows_gives_a_draft_of_the_targets_vocabulary(
    tiny_target: Path, tmp_path: Path
) -> None:
    sibling = write_target(tmp_path / "sibling", layers=3, hidden=16, padded_vocab=304)
    folder, manifest = designed(tmp_path / "run", tiny_target, draft={**PRUNED, "model": str(sibling)})
    assert AutoModelForCausalLM.from_pretrained(folder).config.vocab_size == 320
    assert manifest["architecture"]["hidden_size"] == 16
    assert Target.at(folder).vocabulary.special_digest == Target.at(tiny_target).vocabulary.special_digest


def test_a_narrower_draft_loads_in_transformers_and_has_the_parameters_that_were_planned(
    deep: Path, tmp_path: Path
) -> None:
    sizes = {"hidden_size": 24, "intermediate_size": 40, "num_heads": 2}
    folder, manifest = designed(tmp_path / "run", deep, draft={**PRUNED, **sizes})
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert (model.config.hidden_size, model.config.head_dim, model.config.num_key_value_heads) == (24, 8, 1)
    assert sum(p.numel() for p in model.parameters()) == manifest["parameters"]
    assert manifest["start"]["loss"] < 12


def test_the_shape_digest_changes_with_the_sources_weights(deep: Path, tmp_path: Path) -> None:
    other = write_target(tmp_path / "other", layers=6, seed=5)
    found = [designed(tmp_path / f"r{n}", target, draft=PRUNED)[1] for n, target in enumerate((deep, other))]
    assert found[0]["shape_digest"] != found[1]["shape_digest"]


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"draft": {**PRUNED, "layers": 7}}, r"layers: 7: must be ascending numbers of the 6 layers"),
        ({"draft": {**PRUNED, "layers": [3, 1]}}, r"layers: \[3, 1\]: must be ascending"),
        ({"draft": {**PRUNED, "layers": [0, 6]}}, r"layers: \[0, 6\]: must be ascending"),
        ({"draft": {**PRUNED, "layers": []}}, r"layers: \[\]: must be ascending"),
        ({"draft": {**PRUNED, "hidden_size": 64}}, "hidden_size: 64: must be at most that model's 32"),
        ({"draft": {**PRUNED, "num_heads": 3}}, "num_heads: 3: must be a multiple of 2"),
        ({"draft": {**PRUNED, "hidden_size": 30}}, "hidden_size: 30: must be a multiple of the 4 heads"),
        ({"draft": {**PRUNED, "layers": 1}}, "layers: 1: must be greater than or equal to 2"),
        ({"draft": PRUNED, "initialization": "target_embeddings"}, "kind: pruned, which brings its own"),
    ],
)
def test_bad_settings_are_refused_in_one_line(
    deep: Path, tmp_path: Path, section: dict[str, Any], words: str
) -> None:
    with pytest.raises(RecipeError, match=words) as caught:
        designed(tmp_path / "run", deep, **section)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_model_of_another_vocabulary_or_family_or_without_weights_is_refused(
    deep: Path, tmp_path: Path
) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(deep, bare)
    (bare / "model.safetensors").unlink()
    with pytest.raises(TargetError, match=r"no model\.safetensors"):
        designed(tmp_path / "run", deep, draft={**PRUNED, "model": str(bare)})
    gemma = tmp_path / "gemma"
    shutil.copytree(deep, gemma)
    config = json.loads((gemma / "config.json").read_text(encoding="utf-8"))
    config = {**config, "model_type": "gemma2", "hidden_activation": "gelu_pytorch_tanh"}
    (gemma / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(RecipeError, match="family gemma2; a draft's family must be one of llama"):
        designed(tmp_path / "run", gemma, draft=PRUNED)
    tokenizer = json.loads((bare / "tokenizer.json").read_text(encoding="utf-8"))
    tokenizer["model"]["merges"] = tokenizer["model"]["merges"][:-1]
    (bare / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    with pytest.raises(TargetError, match="ordinary tokens, merges and splitting rules must be equal"):
        designed(tmp_path / "run", deep, draft={**PRUNED, "model": str(bare)})


def test_a_model_whose_weights_are_not_finite_is_refused_in_one_line(deep: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(deep)
    model.model.layers[3].mlp.up_proj.weight.data[0, 0] = float("nan")
    shutil.copytree(deep, tmp_path / "broken")
    model.save_pretrained(tmp_path / "broken")
    with pytest.raises(TargetError, match="its loss on text is not finite"):
        designed(tmp_path / "run", deep, draft={**PRUNED, "model": str(tmp_path / "broken")})


def test_a_recipe_prunes_on_its_prepared_rows(
    deep: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(write_recipe(tmp_path, deep, design={"draft": PRUNED}))
    assert cli.main(["check", path, "--json"]) == 0
    forecast = json.loads(capsys.readouterr().out)["stages"][:2]
    assert [stage["stage"] for stage in forecast] == ["prepare", "design"]
    assert forecast[1]["memory_bytes"] > 4 * Target.at(deep).architecture.parameters
    folder = run(load_recipe(path), only=["prepare", "design"])
    prepared = folder.folder("prepare").digest()
    assert folder.folder("design").stored_fingerprint()["shape"]["reads"] == {"prepare": prepared}
    assert folder.folder("design").manifest()["start"]["tokens"] > 0
