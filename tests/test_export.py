"""The export stage: what the directory holds, that it serves as an assistant, what is recorded."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from conftest import write_target
from fastdraft.console import Console
from fastdraft.errors import FastDraftError, TargetError
from fastdraft.modeling.drafts import load_draft
from fastdraft.recipe.base import Config, load_config
from fastdraft.recipe.evaluation import ExportConfig
from fastdraft.recipe.run import RunConfig
from fastdraft.recipe.training import DesignConfig
from fastdraft.run_folder import RunFolder, read_json
from fastdraft.runtimes import huggingface_export
from fastdraft.stages import design, export
from fastdraft.stages.context import StageContext
from fastdraft.target import Target


class _Section(Config):
    """Stands for a training stage's section."""


@pytest.fixture
def context(tiny_target: Path, tmp_path: Path) -> StageContext:
    """A run whose design stage has finished."""
    shape = {"kind": "shape", "hidden_size": 32, "num_layers": 1, "intermediate_size": 64}
    config = load_config(DesignConfig, {"draft": shape}, "design")
    run, settings = RunFolder(tmp_path / "run"), RunConfig(name="run", device="cpu")
    context = StageContext(run, settings, Target.at(tiny_target), {"design": config}, Console(quiet=True))
    context.folder("design").begin(design.fingerprint(config, context))
    design.run(config, context)
    return context


def _export(context: StageContext, **settings: Any) -> tuple[Path, dict[str, Any]]:
    config = load_config(ExportConfig, settings, "export")
    artifact = context.folder("export")
    artifact.begin(export.fingerprint(config, context))
    export.run(config, context)
    return artifact.path / "huggingface", artifact.manifest()


def test_the_export_pins_k_for_transformers(context: StageContext) -> None:
    folder, _ = _export(context, num_speculative_tokens=5)
    pinned = read_json(folder / "generation_config.json")
    assert pinned["num_assistant_tokens"] == 5
    assert pinned["num_assistant_tokens_schedule"] == "constant"
    assert pinned["assistant_confidence_threshold"] == 0.0


def test_weights_and_tokenizer_are_those_of_the_checkpoint(context: StageContext, tiny_target: Path) -> None:
    folder, manifest = _export(context)
    checkpoint = context.folder("design").path / "draft"
    weights = load_draft(folder).parameters(), load_draft(checkpoint).parameters()
    assert all(torch.equal(*pair) for pair in zip(*weights, strict=True))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (folder / name).read_bytes() == (tiny_target / name).read_bytes()
    assert sorted(manifest["files"]) == sorted(path.name for path in folder.iterdir())


def test_the_export_serves_as_assistant_model_without_changing_greedy_text(
    context: StageContext, tiny_target: Path
) -> None:
    folder, manifest = _export(context)
    assert manifest["checks"]["assistant_same_greedy_text"] is True
    target, draft = map(AutoModelForCausalLM.from_pretrained, (tiny_target, folder))
    inputs = AutoTokenizer.from_pretrained(folder)("The quick brown", return_tensors="pt")
    asked = {**inputs, "do_sample": False, "max_new_tokens": 24}
    assert torch.equal(target.generate(**asked), target.generate(**asked, assistant_model=draft))


def test_a_trained_stage_goes_before_the_design_and_must_have_finished(context: StageContext) -> None:
    trained = replace(context, sections={**context.sections, "align": _Section()})
    with pytest.raises(FastDraftError, match="needs the result of 'align'"):
        _export(trained)
    assert export.source_of(context)[0] == "design"


def test_padding_mass_is_measured_and_reported(
    context: StageContext, capsys: pytest.CaptureFixture[str]
) -> None:
    _, manifest = _export(replace(context, console=Console(quiet=True)))
    checks = manifest["checks"]
    # Untrained: every id is equally likely.
    assert checks["padding_mass_mean"] == pytest.approx(20 / 320, rel=0.3)
    assert checks["padding_mass_ok"] is False
    assert "ids without a token" in capsys.readouterr().err


def test_padding_mass_is_the_softmax_share_of_ids_without_a_token(context: StageContext) -> None:
    draft, vocabulary = load_draft(context.folder("design").path / "draft"), context.target.vocabulary
    texts = [[1, 2, 3], list(range(60))]
    with torch.no_grad():
        draft.model.embed_tokens.weight.fill_(1.0)
        # Nothing is added to the residual stream: every hidden state is all ones.
        for layer in draft.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        draft.lm_head.weight.zero_()
        found = huggingface_export.padding_mass(draft, vocabulary, texts)
        assert found == pytest.approx((20 / 320, 20 / 320))
        draft.lm_head.weight[300:] = -1.0
    mean, largest = huggingface_export.padding_mass(draft, vocabulary, texts)
    assert mean <= largest < huggingface_export.PADDING_MASS_LIMIT


def test_a_checkpoint_of_another_vocabulary_is_refused(context: StageContext, tmp_path: Path) -> None:
    other = write_target(tmp_path / "other", padded_vocab=384)
    with pytest.raises(TargetError, match="vocab_size"):
        _export(replace(context, target=Target.at(other)))
    assert not (context.folder("export").path / "huggingface").exists()


def test_a_damaged_checkpoint_is_refused(context: StageContext) -> None:
    weights = context.folder("design").path / "draft" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:3000])
    with pytest.raises(FastDraftError, match="damaged or missing weights"):
        _export(context)


def test_the_model_card_says_what_was_measured_and_no_more(context: StageContext) -> None:
    folder, _ = _export(context)
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\nlibrary_name: transformers")
    said = "assistant_model=draft", "This draft was not evaluated", "NOT under 1e-04"
    assert all(words in card for words in (*said, "was equal to the target's alone"))


def test_a_target_whose_weights_are_elsewhere_still_gets_its_draft_exported_and_the_card_says_so(
    context: StageContext, tiny_target: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(tiny_target, bare, ignore=shutil.ignore_patterns("*.safetensors"))
    folder, manifest = _export(replace(context, target=Target.at(bare), console=Console(quiet=True)))
    assert "assistant_same_greedy_text" not in manifest["checks"]
    assert manifest["checks"]["padding_mass_mean"] > 0
    assert load_draft(folder).config.vocab_size == 320
    assert "not tried with the target" in (folder / "README.md").read_text(encoding="utf-8")
    assert "weights are not in" in capsys.readouterr().err
