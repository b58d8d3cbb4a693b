"""Every family of targets through the whole pipeline, tiny: design to report, and the exported draft beside
the target in transformers.

The three ways to align take turns over the families, so that heads which are scaled or capped meet each of
them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from conftest import write_recipe
from family_fixture import TARGETS, write_family
from fastdraft import pipeline
from fastdraft.modeling.families import draft_family
from fastdraft.recipe.recipe import Recipe, load_recipe
from fastdraft.runtimes.huggingface_export import load_assistant, text_positions
from fastdraft.target import Target

STAGES = ("design", "align", "export")
WAYS: list[dict[str, Any]] = [
    {"kind": "sequence_kd"},
    {"kind": "token_kd", "loss": "forward_kl", "source": "target"},
    {"kind": "token_kd", "loss": "tvd", "source": "stored"},
]


def _recipe(folder: Path, target: Path, objective: dict[str, Any]) -> Recipe:
    """Every stage, as few tokens as each takes."""
    path = write_recipe(folder, target)
    value = yaml.safe_load(path.read_text(encoding="utf-8"))
    value["prepare"]["corpora"][0]["tokens"] = value["prepare"]["corpora"][1]["tokens"] = "4k"
    for stage in ("pretrain", "continue_pretrain"):
        value[stage].update({"tokens": 1024, "validate_every": 0})
    value["synthesize"].update({"tokens": 500, "temperatures": [0, 1.0], "max_new_tokens": 16})
    value["synthesize"]["prompts"] = [
        prompts for prompts in value["synthesize"]["prompts"] if prompts["kind"] != "magpie"
    ]
    if objective.get("source") == "stored":
        value["synthesize"]["logits"] = {"kind": "top_k", "k": 8}
    value["align"].update({"tokens": 1024, "validate_every": 2, "objective": objective})
    exact = {"num_speculative_tokens": [2], "prompts": 3}
    value["evaluate"].update({"temperatures": [0], "num_speculative_tokens": [2], "exact": exact})
    path.write_text(yaml.safe_dump(value, sort_keys=False), encoding="utf-8")
    return load_recipe(str(path))


@pytest.mark.parametrize(("place", "name"), list(enumerate(TARGETS)), ids=list(TARGETS))
def test_a_target_of_every_family_goes_through_the_whole_pipeline_and_takes_the_draft_as_assistant(
    place: int, name: str, tmp_path: Path
) -> None:
    folder, objective = write_family(tmp_path / "target", name), WAYS[place % len(WAYS)]
    root = pipeline.run(_recipe(tmp_path, folder, objective)).root
    found = {
        stage: json.loads((root / stage / "manifest.json").read_text(encoding="utf-8")) for stage in STAGES
    }
    assert found["design"]["family"]["draft"] == draft_family(found["design"]["family"]["target"])
    assert found["align"]["train_loss"] > 0
    results = json.loads((root / "evaluate" / "results.json").read_text(encoding="utf-8"))
    assert results["greedy_check"] == {"texts": 3, "different": 0, "near_ties": 0, "cases": []}
    assert {row["method"] for row in results["rows"]} == {"replay", "exact"}
    assert all(1 <= row["block_efficiency"] <= 3 for row in results["rows"])
    assert found["export"]["checks"]["assistant_same_greedy_text"]
    config = json.loads((root / "export" / "huggingface" / "config.json").read_text(encoding="utf-8"))
    assert (config["vocab_size"], config["max_position_embeddings"]) == (320, 160)
    assert config.get("sliding_window") is None
    assert (root / "report" / "report.html").is_file()
    _assert_taken_by_generate(folder, root / "export" / "huggingface")
    card = (root / "export" / "huggingface" / "README.md").read_text(encoding="utf-8")
    assert ('inputs["position_ids"]' in card) == name.startswith(("qwen2-vl", "qwen2.5-vl"))


def _assert_taken_by_generate(target_folder: Path, draft_folder: Path) -> None:
    """Greedy text with our draft as `assistant_model` is the target's own, in transformers' own loops, past a
    refused proposal.
    """
    target, draft = Target.at(target_folder).model("cpu"), load_assistant(draft_folder)
    prompt = torch.tensor([[7 + (i * 37) % 280 for i in range(20)]])
    settings = {"attention_mask": torch.ones_like(prompt), "do_sample": False, "max_new_tokens": 24}
    alone = target.generate(prompt, pad_token_id=0, **settings)
    settings |= {"assistant_model": draft, **text_positions(target, prompt)}
    assert torch.equal(alone, target.generate(prompt, pad_token_id=0, **settings))
