"""The design stage and `inspect`: what a draft's directory holds, what its fingerprint depends on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from conftest import write_target
from family_fixture import designed
from fastdraft.commands import inspect
from fastdraft.console import Console
from fastdraft.errors import RecipeError, TargetError

SHAPE = {"kind": "shape", "hidden_size": 32, "num_layers": 1, "intermediate_size": 64}


def test_a_designed_draft_loads_in_transformers_with_the_targets_vocabulary_context_and_ids(
    tiny_target: Path, tmp_path: Path
) -> None:
    folder, manifest = designed(tmp_path / "run", tiny_target)
    model = AutoModelForCausalLM.from_pretrained(folder)
    config = model.config
    assert (config.vocab_size, config.max_position_embeddings, config.eos_token_id) == (320, 256, 3)
    assert sum(p.numel() for p in model.parameters()) == manifest["parameters"]
    assert manifest["vocabulary"]["missing_ids"] == [[300, 319]]
    assert manifest["target"]["parameters"] == 39_072
    assert 0 < manifest["cost_ratio_bytes"] < 1


def test_designing_twice_gives_the_same_bytes_and_the_targets_tokenizer_files(
    tiny_target: Path, tmp_path: Path
) -> None:
    first, _ = designed(tmp_path / "a", tiny_target)
    second, _ = designed(tmp_path / "b", tiny_target)
    assert (first / "model.safetensors").read_bytes() == (second / "model.safetensors").read_bytes()
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (first / name).read_bytes() == (tiny_target / name).read_bytes()


def test_the_shape_digest_ignores_the_targets_weights_unless_they_are_used(
    tiny_target: Path, tmp_path: Path
) -> None:
    fine_tune = write_target(tmp_path / "fine-tune", seed=7)
    plain = [designed(tmp_path / f"r{i}", target)[1] for i, target in enumerate((tiny_target, fine_tune))]
    assert plain[0]["shape_digest"] == plain[1]["shape_digest"]
    assert plain[0]["fingerprint"] == plain[1]["fingerprint"]
    embeddings = {"initialization": "target_embeddings"}
    projected = [
        designed(tmp_path / f"p{i}", t, **embeddings)[1] for i, t in enumerate((tiny_target, fine_tune))
    ]
    assert projected[0]["shape_digest"] != projected[1]["shape_digest"]
    assert designed(tmp_path / "s", tiny_target, seed=3)[1]["shape_digest"] != plain[0]["shape_digest"]


def test_a_changed_chat_template_changes_the_design_but_not_the_shape(
    tiny_target: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny_target, other)
    (other / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    (_, first), (_, second) = designed(tmp_path / "a", tiny_target), designed(tmp_path / "b", other)
    assert first["shape_digest"] == second["shape_digest"]
    assert first["fingerprint"] != second["fingerprint"]


def test_an_earlier_draft_gives_its_weights_to_a_fine_tune_of_the_target(
    tiny_target: Path, tmp_path: Path
) -> None:
    earlier, _ = designed(tmp_path / "a", tiny_target, seed=5)
    fine_tune = write_target(tmp_path / "fine-tune", seed=7)
    for path in (earlier, earlier.parent):
        draft = {"kind": "from", "path": str(path)}
        folder, manifest = designed(tmp_path / f"b-{path.name}", fine_tune, draft=draft)
        assert manifest["initialization"] == "from"
        weights = [AutoModelForCausalLM.from_pretrained(where).parameters() for where in (earlier, folder)]
        assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


def test_an_earlier_draft_of_another_vocabulary_is_refused(tiny_target: Path, tmp_path: Path) -> None:
    other = write_target(tmp_path / "other", padded_vocab=384)
    with pytest.raises(TargetError, match="draft 384, target 320; vocab_size"):
        designed(tmp_path / "run", tiny_target, draft={"kind": "from", "path": str(other)})
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"draft": {"kind": "budget", "parameters": "10k"}}, "must be at least"),
        ({"draft": {"kind": "budget", "parameters": -1}}, "whole count"),
        ({"draft": {"kind": "preset", "name": "gpt-5"}}, "phi-3-mini-50m"),
        ({"draft": {"kind": "preset", "name": "phi-3-mini-50m"}}, "this preset is for phi3"),
        ({"draft": {**SHAPE, "num_heads": 5}}, "must divide hidden_size"),
        ({"draft": {**SHAPE, "num_heads": 4, "num_kv_heads": 3}}, "must divide num_heads 4"),
        ({"draft": {**SHAPE, "hiden_size": 5}}, "did you mean 'hidden_size'"),
        ({"draft": {"kind": "from", "path": "/nowhere"}}, "must be a directory with config.json"),
        ({"draft": {"kind": "from", "path": "x"}, "initialization": "target_embeddings"}, "brings its own"),
    ],
)
def test_bad_settings_are_refused_in_one_line(
    tiny_target: Path, tmp_path: Path, section: dict[str, Any], words: str
) -> None:
    with pytest.raises(RecipeError, match=words) as caught:
        designed(tmp_path / "run", tiny_target, **section)
    assert "\n" not in str(caught.value)


def test_inspect_tells_anatomy_traps_and_candidates_in_80_columns(capsys: pytest.CaptureFixture[str]) -> None:
    inspect.run("shipped:targets/starter", console=Console(quiet=True))
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80
    for words in ("6,819,072", "Traps", "Candidate drafts", "K=8", "0.45"):
        assert words in text


def test_inspect_needs_no_weights(
    tiny_target: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(tiny_target, tmp_path / "t")
    (tmp_path / "t" / "model.safetensors").unlink()
    inspect.run(str(tmp_path / "t"), console=Console(quiet=True), as_json=True)
    value = json.loads(capsys.readouterr().out)
    assert value["parameters"] == 39_072
    assert any("Padded vocabulary: 20 of 320 ids" in trap for trap in value["traps"])


def test_inspect_lists_presets_of_the_family_and_the_papers_cost_ratios(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_target(tmp_path)
    (tmp_path / "model.safetensors").unlink()  # of another shape than the config below
    config = json.loads((tmp_path / "config.json").read_text())
    large = {"vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}
    heads = {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128}
    (tmp_path / "config.json").write_text(json.dumps({**config, **large, **heads}))
    inspect.run(str(tmp_path), console=Console(quiet=True), as_json=True)
    candidates = {c["name"]: c for c in json.loads(capsys.readouterr().out)["candidates"]}
    preset = candidates["llama-3.1-8b-150m"]
    assert preset["parameters"] == 154_147_328
    assert preset["cost_ratio_parameters"] == pytest.approx(0.0192, abs=1e-4)
    assert preset["cost_ratio_bytes_int8_draft_int4_target"] == pytest.approx(2 * preset["cost_ratio_bytes"])
    assert len(preset["mbsu_bytes"]["0.45"]) == 8
