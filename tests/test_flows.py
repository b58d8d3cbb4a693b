"""Whole runs other than the usual one: a base model, an earlier draft for another fine-tune, texts met in
training.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file, save_file

from conftest import TEXT, write_recipe, write_tokenizer
from fastdraft import pipeline
from fastdraft.errors import RecipeError
from fastdraft.recipe.recipe import Recipe, load_recipe
from fastdraft.run_folder import RunFolder

EVALUATE = {"num_speculative_tokens": [2], "exact": {"num_speculative_tokens": [2], "prompts": 3}}


def write_base(folder: Path) -> Path:
    """A random Mistral with a sliding window and without a chat template, its greedy text well defined."""
    write_tokenizer(folder, chat=False)
    config = transformers.MistralConfig(
        vocab_size=320,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=0,
        eos_token_id=3,
        pad_token_id=0,
        sliding_window=8,
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(20)
    model.save_pretrained(folder)
    return folder


def small_recipe(
    folder: Path, target: Path, leave_out: tuple[str, ...] = (), **changes: dict[str, Any]
) -> Recipe:
    """A recipe of few tokens; `changes` are merged into the sections."""
    path = write_recipe(folder, target)
    value = yaml.safe_load(path.read_text(encoding="utf-8"))
    value["prepare"]["corpora"][0]["tokens"] = "8k"
    value["pretrain"].update({"tokens": 1024, "validate_every": 0})
    value["synthesize"].update(
        {"tokens": 600, "prompts": [p for p in value["synthesize"]["prompts"] if p["kind"] != "magpie"]}
    )
    value["align"].update({"tokens": 1024, "validate_every": 2})
    value["evaluate"].update(EVALUATE)
    for section, keys in changes.items():
        value[section].update(keys)
    path.write_text(
        yaml.safe_dump({k: v for k, v in value.items() if k not in leave_out}, sort_keys=False),
        encoding="utf-8",
    )
    return load_recipe(str(path))


def own_prompts(folder: Path) -> dict[str, Any]:
    """Prompts that need no prepared corpus."""
    return {"prompts": [{"kind": "jsonl", "name": "instructions", "path": str(folder / "prompts.jsonl")}]}


def read(run: RunFolder, name: str) -> Any:
    return json.loads((run.root / name).read_text(encoding="utf-8"))


def test_a_base_model_without_chat_template_goes_through_every_stage(tmp_path: Path) -> None:
    run = pipeline.run(small_recipe(tmp_path, write_base(tmp_path / "target")))
    assert (run.root / "report" / "report.html").is_file()
    results = read(run, "evaluate/results.json")
    assert results["greedy_check"]["texts"] == 3
    assert results["greedy_check"]["different"] == 0
    assert set(read(run, "synthesize/manifest.json")["by_source"]) == {"instructions", "code"}


@pytest.fixture(scope="module")
def family_draft(tmp_path_factory: pytest.TempPathFactory, tiny_target: Path) -> Path:
    """What an earlier run for the family's first model left: the folder of its stage pretrain."""
    folder = tmp_path_factory.mktemp("family")
    later = ("continue_pretrain", "synthesize", "align", "evaluate", "export", "report")
    return pipeline.run(small_recipe(folder, tiny_target, later)).root / "pretrain"


@pytest.fixture(scope="module")
def fine_tune(tmp_path_factory: pytest.TempPathFactory, tiny_target: Path) -> Path:
    """Another fine-tune of the family: equal vocabulary, other weights."""
    folder = shutil.copytree(tiny_target, tmp_path_factory.mktemp("fine-tune") / "target")
    weights = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(5)
    moved = {
        name: weight + 0.01 * torch.randn(weight.shape, generator=generator)
        for name, weight in weights.items()
    }
    save_file(moved, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize("corpora", [False, True])
def test_an_earlier_draft_serves_another_fine_tune_without_new_pre_training(
    tmp_path: Path, family_draft: Path, fine_tune: Path, corpora: bool
) -> None:
    left_out = ("pretrain", "continue_pretrain") if corpora else ("prepare", "pretrain", "continue_pretrain")
    changes = {} if corpora else {"synthesize": own_prompts(tmp_path)}
    recipe = small_recipe(
        tmp_path,
        fine_tune,
        left_out,
        design={"draft": {"kind": "from", "path": str(family_draft)}},
        **changes,
    )
    run = pipeline.run(recipe)
    assert (run.root / "design/draft/model.safetensors").read_bytes() == (
        family_draft / "checkpoint/model.safetensors"
    ).read_bytes()
    assert read(run, "align/fingerprint.json")["mixture"] == ({"text": 1.0, "code": 1.0} if corpora else None)
    rows = read(run, "evaluate/results.json")["rows"]
    assert {row["checkpoint"] for row in rows} == {"align"}
    assert read(run, "export/manifest.json")["source"] == "align"
    assert (run.root / "report" / "report.html").is_file()


def test_a_share_of_pre_training_asked_for_without_any_corpus_is_refused(
    tmp_path: Path, family_draft: Path, fine_tune: Path
) -> None:
    recipe = small_recipe(
        tmp_path,
        fine_tune,
        ("prepare", "pretrain", "continue_pretrain"),
        design={"draft": {"kind": "from", "path": str(family_draft)}},
        align={"pretraining_share": 0.1},
        synthesize=own_prompts(tmp_path),
    )
    with pytest.raises(RecipeError, match=r"align\.pretraining_share.*set align\.pretraining_share: 0"):
        pipeline.run(recipe)


def test_evaluation_texts_that_stand_in_the_prepared_shards_are_found(
    tmp_path: Path, tiny_target: Path
) -> None:
    tasks = tmp_path / "met.jsonl"
    new = "Zebras 9182 quietly juggle 55 purple umbrellas; nobody 731 watched them all fall."
    lines = [{"id": "met", "prompt": TEXT[0]}, {"id": "new", "prompt": new}]
    tasks.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    recipe = small_recipe(
        tmp_path,
        tiny_target,
        ("continue_pretrain", "synthesize", "align", "export", "report"),
        evaluate={"tasks": [{"kind": "file", "name": "own", "path": str(tasks), "max_new_tokens": 8}]},
    )
    found = read(pipeline.run(recipe), "evaluate/results.json")["contamination"]["own"]
    assert (found["prompts"], found["prompts_with_overlap"]) == (2, 1)
    assert 0 < found["ngrams_matched"] < found["ngrams"]
