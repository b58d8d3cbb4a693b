"""Drafts from a few layers of a trained model: which are kept, what is fitted, what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from conftest import write_recipe, write_target
from family_fixture import designed
from fastdraft import cli
from fastdraft.errors import RecipeError, TargetError
from fastdraft.modeling.drafts import build_draft
from fastdraft.modeling.pruning import choose_layers, fit_vocabulary, mean_loss, prune, refit, residual_states
from fastdraft.pipeline import run
from fastdraft.recipe.recipe import load_recipe
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
    model, about = AutoModelForCausalLM.from_pretrained(folder), manifest["pruned"]
    assert len(model.model.layers) == model.config.num_hidden_layers == 2
    assert sum(p.numel() for p in model.parameters()) == manifest["parameters"]
    assert manifest["initialization"] == "pruned"
    assert (about["source"], about["license"], about["of"]) == (str(target), "mit", 6)
    assert about["layers"] == [0, 5]
    assert len(about["similarities"]) == 6
    assert min(about["loss_of_source"], about["loss"]) > 0


def test_a_sibling_with_fewer_padding_rows_gives_a_draft_of_the_targets_vocabulary(
    tiny_target: Path, tmp_path: Path
) -> None:
    sibling = write_target(tmp_path / "sibling", layers=3, hidden=16, padded_vocab=304)
    folder, manifest = designed(tmp_path / "run", tiny_target, draft={**PRUNED, "model": str(sibling)})
    assert AutoModelForCausalLM.from_pretrained(folder).config.vocab_size == 320
    assert manifest["architecture"]["hidden_size"] == 16
    assert Target.at(folder).vocabulary.special_digest == Target.at(tiny_target).vocabulary.special_digest


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


def test_a_recipe_prunes_on_its_prepared_rows(deep: Path, tmp_path: Path) -> None:
    path = str(write_recipe(tmp_path, deep, design={"draft": PRUNED}))
    assert cli.main(["check", path, "--quiet"]) == 0
    folder = run(load_recipe(path), only=["prepare", "design"])
    prepared = folder.folder("prepare").digest()
    assert folder.folder("design").stored_fingerprint()["shape"]["reads"] == {"prepare": prepared}
    assert folder.folder("design").manifest()["pruned"]["tokens"] > 0
