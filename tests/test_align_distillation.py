"""Token-level distillation through the stages: every loss from both sources, the mixture's rows, refusals,
resuming.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
import yaml

from conftest import write_recipe
from fastdraft import pipeline
from fastdraft.console import Console
from fastdraft.data.sparse_logits import read_with_logits
from fastdraft.errors import Interrupted
from fastdraft.functional.distillation import token_loss
from fastdraft.modeling.drafts import load_draft
from fastdraft.modeling.heads import output_head, split_head
from fastdraft.recipe.recipe import Recipe, load_recipe
from fastdraft.recipe.training import TokenLossName
from fastdraft.run_folder import StageFolder, digest
from fastdraft.stages import align
from fastdraft.target import Target
from fastdraft.training.batches import Sample, packed_batch, padded_batch
from fastdraft.training.metrics import read_metrics
from fastdraft.training.objective import CrossEntropy, LoadedTarget, TokenDistillation
from test_pretrain import StopAfter

LOSSES = get_args(TokenLossName)
BEFORE = ("design", "prepare", "pretrain", "synthesize")


class Folder:
    """A run up to synthesize, made once, with logits; align runs in copies of it."""

    def __init__(self, root: Path, target: Path) -> None:
        self.root = root
        value = yaml.safe_load(write_recipe(root, target).read_text(encoding="utf-8"))
        for stage in ("continue_pretrain", "evaluate", "export", "report"):
            value.pop(stage)
        value["synthesize"] |= {
            "tokens": "2k",
            "logits": {"kind": "top_k", "k": 32},
            "prompts": [value["synthesize"]["prompts"][2]],
        }
        value["pretrain"]["tokens"] = "4k"
        self.path = root / "recipe.yaml"
        self.path.write_text(yaml.safe_dump(value), encoding="utf-8")
        self.made = pipeline.run(load_recipe(str(self.path)), only=BEFORE).root

    def recipe(self, name: str, objective: dict[str, Any], **changes: Any) -> Recipe:
        values = {"tokens": "3k", "pretraining_share": 0, "validate_every": 0, "batch_tokens": 300, **changes}
        overrides = [f"align.{key}={json.dumps(value)}" for key, value in values.items()]
        recipe = load_recipe(
            str(self.path), [f"run.name={name}", f"align.objective={json.dumps(objective)}", *overrides]
        )
        for stage in BEFORE:
            if not (recipe.run.root / stage).exists():
                shutil.copytree(self.made / stage, recipe.run.root / stage)
        return recipe

    def align(self, name: str, objective: dict[str, Any], **changes: Any) -> StageFolder:
        return pipeline.run(self.recipe(name, objective, **changes), only=["align"]).folder("align")


@pytest.fixture(scope="module")
def folder(tiny_target: Path, tmp_path_factory: pytest.TempPathFactory) -> Folder:
    return Folder(tmp_path_factory.mktemp("distil"), tiny_target)


def losses(artifact: StageFolder) -> list[float]:
    return [record["loss"] for record in read_metrics(artifact.path) if "loss" in record]


@pytest.mark.parametrize(
    ("loss", "source"),
    [*((loss, "stored") for loss in LOSSES), ("forward_kl", "target"), ("lk_hybrid", "target")],
)
def test_every_loss_from_either_source_improves_in_training(folder: Folder, loss: str, source: str) -> None:
    artifact = folder.align(f"{loss}-{source}", {"kind": "token_kd", "loss": loss, "source": source})
    found, manifest = losses(artifact), artifact.manifest()
    assert np.isfinite(found).all()
    assert np.mean(found[-3:]) < np.mean(found[:3])
    assert manifest["skipped_steps"] == 0
    assert manifest["validation_loss"]["responses"] > 0
    assert (artifact.path / "checkpoint/model.safetensors").is_file()


def test_stored_and_loaded_targets_begin_with_nearly_the_same_loss(folder: Folder) -> None:
    objective = {"kind": "token_kd", "loss": "forward_kl"}
    dense, sparse = (
        losses(folder.align(f"same-{source}", {**objective, "source": source}, tokens=300))[0]
        for source in ("target", "stored")
    )
    assert sparse < dense
    assert sparse == pytest.approx(dense, rel=0.2)


def test_a_batchs_stored_rows_belong_to_its_labels(folder: Folder) -> None:
    placed = list(read_with_logits(StageFolder(folder.made / "synthesize")))[:5]
    samples = [
        Sample(row.prompt_ids, row.response_ids[: 3 + i], logits) for i, (row, logits) in enumerate(placed)
    ]
    samples.append(Sample([], placed[0][0].response_ids, placed[0][1]))
    batch = padded_batch(samples)
    assert batch.target is not None
    expected = [logits.read(0, 3 + i) for i, (_, logits) in enumerate(placed)]
    expected.append(placed[0][1].read(1, len(placed[0][0].response_ids)))
    np.testing.assert_array_equal(batch.target.ids, np.concatenate([part.ids for part in expected]))
    assert len(batch.target.ids) == batch.num_trained
    torch.testing.assert_close(batch.target.logprobs.exp().sum(-1), torch.ones(batch.num_trained))


def test_a_loaded_target_gives_its_own_distribution_at_the_trained_positions_padding_ids_included(
    tiny_target: Path,
) -> None:
    model = Target.at(tiny_target).model("cpu")
    batch = padded_batch([Sample([5, 6, 7], [8, 9]), Sample([10], [11, 12, 13, 14])])
    logits = LoadedTarget(*output_head(model)).distribution(batch).logits
    with torch.no_grad():
        whole = model(input_ids=batch.input_ids).logits.flatten(0, 1)[batch.index]
    torch.testing.assert_close(
        torch.cat([logits(slice(0, 4)), logits(slice(4, 9))]), whole, rtol=1e-4, atol=1e-4
    )
    assert whole.shape[1] == 320
    assert torch.isfinite(whole[:, 300:]).all()


def test_rows_of_the_mixture_have_cross_entropy_unless_the_target_is_there_to_ask(
    tiny_target: Path, tiny_draft: Path
) -> None:
    draft, target = load_draft(tiny_draft), Target.at(tiny_target).model("cpu")
    batch = packed_batch(np.arange(60, dtype=np.int64).reshape(2, 30))
    decoder, head = split_head(draft)
    with torch.no_grad():
        hidden = decoder(input_ids=batch.input_ids).last_hidden_state.flatten(0, 1)
        plain = CrossEntropy().loss(hidden, head, batch)
        stored = TokenDistillation(token_loss("forward_kl")).loss(hidden, head, batch)
        teacher = LoadedTarget(*output_head(target))
        asked = TokenDistillation(token_loss("forward_kl"), teacher).loss(hidden, head, batch)
    assert stored == plain
    assert asked != plain


@pytest.mark.parametrize("source", ["target", "stored"])
def test_a_stopped_and_rerun_stage_ends_bit_for_bit_like_an_undisturbed_one(
    folder: Folder, source: str
) -> None:
    objective = {"kind": "token_kd", "loss": "lk_hybrid", "source": source}
    changes = {"tokens": "2k", "pretraining_share": 0.3}
    expected = folder.align(f"whole-{source}", objective, **changes)
    recipe, rounds = folder.recipe(f"stopped-{source}", objective, **changes), 0
    context = pipeline.make_context(recipe, Console(quiet=True))
    config, artifact = context.section("align"), context.folder("align")
    artifact.begin(align.fingerprint(config, context))
    while not artifact.is_complete():
        rounds += 1
        with contextlib.suppress(Interrupted):
            align.run(config, dataclasses.replace(context, console=StopAfter(2)))
    assert rounds > 2
    weights = "checkpoint/model.safetensors"
    assert (artifact.path / weights).read_bytes() == (expected.path / weights).read_bytes()


def test_the_fingerprint_holds_the_objective_and_the_target_only_where_it_teaches(folder: Folder) -> None:
    def fingerprint(objective: dict[str, Any]) -> dict[str, Any]:
        recipe = folder.recipe("fingerprint", objective)
        context = pipeline.make_context(recipe, Console(quiet=True))
        return align.fingerprint(recipe.sections()["align"], context)  # type: ignore[arg-type]

    taught = [
        {"kind": "token_kd"},
        {"kind": "token_kd", "loss": "tvd"},
        {"kind": "token_kd", "source": "stored"},
        {"kind": "sequence_kd"},
    ]
    found = [fingerprint(objective) for objective in taught]
    assert len({digest(one) for one in found}) == 4
    assert ["target" in one for one in found] == [True, True, False, False]
    assert found[3]["config"]["objective"] == {"kind": "sequence_kd"}
