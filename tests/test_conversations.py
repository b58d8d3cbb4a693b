"""Conversations through the stages: trained turn by turn, evaluated with the target's own answers before each
turn.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from transformers import AutoTokenizer

from conftest import write_recipe
from fastdraft import pipeline
from fastdraft.commands import check
from fastdraft.console import Console
from fastdraft.data.rows import ids_hash, read_all, read_rows
from fastdraft.errors import DataError
from fastdraft.evaluation.tasks import load_task
from fastdraft.evaluation.texts import GivenTexts, trained_prompts
from fastdraft.functional.intervals import group_numbers, ratio_interval
from fastdraft.recipe.evaluation import FileTask
from fastdraft.recipe.recipe import load_recipe
from fastdraft.run_folder import RunFolder, read_json

QUESTIONS = ("What is {i}?", "And {i} plus one?", "Why?")


def talk(number: int, turns: int = 3, system: str = "Be brief.") -> dict[str, Any]:
    messages = [{"role": "system", "content": system}] if system else []
    for question in QUESTIONS[:turns]:
        messages += [
            {"role": "user", "content": question.format(i=number)},
            {"role": "assistant", "content": "LOGGED"},
        ]
    return {"id": f"talk{number}", "messages": messages}


def write_lines(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_target: Path) -> RunFolder:
    """A run that trains and evaluates on conversations."""
    folder = tmp_path_factory.mktemp("talks")
    training = write_lines(folder / "training.jsonl", [talk(i, turns=1 + i % 3) for i in range(60)])
    tasks = write_lines(
        folder / "own.jsonl",
        [talk(100), {"id": "bare", "prompt": "Tell me about the fox."}, talk(101, 2, "")],
    )
    path = write_recipe(folder, tiny_target)
    recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    for name in ("prepare", "pretrain", "continue_pretrain", "export", "report"):
        del recipe[name]
    recipe["synthesize"]["prompts"] = [
        {"kind": "jsonl", "name": "talks", "path": training, "field": "messages"}
    ]
    recipe["synthesize"]["tokens"] = "1500"
    recipe["align"] |= {"tokens": "2k", "pretraining_share": 0}
    recipe["evaluate"]["tasks"] = [{"kind": "file", "name": "talks", "path": tasks, "max_new_tokens": 12}]
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return pipeline.run(load_recipe(str(path)))


def test_every_answer_of_a_conversation_is_trained(finished: RunFolder, tiny_target: Path) -> None:
    artifact, tokenizer = finished.folder("synthesize"), AutoTokenizer.from_pretrained(tiny_target)
    rows, manifest = list(read_all(artifact)), artifact.manifest()
    prompts = [tokenizer.decode(row.prompt_ids) for row in rows]
    assert {text.count("<|user|>") for text in prompts} == {1, 2, 3}
    assert not any("LOGGED" in text for text in prompts)
    assert manifest["asked"] == manifest["written"] + sum(manifest["filtered"].values()) + manifest["failed"]
    for text in prompts:  # every turn but the first stands behind an answer that is a row of its own, or was one but for its end
        assert text.startswith("<|user|>\nBe brief.\n\nWhat is")
    trained = finished.folder("align").manifest()
    assert trained["rows"] == len(list(read_all(artifact, "train")))


def test_turns_of_one_conversation_are_held_out_together(finished: RunFolder, tiny_target: Path) -> None:
    artifact, tokenizer = finished.folder("synthesize"), AutoTokenizer.from_pretrained(tiny_target)
    first = {
        split: {tokenizer.decode(r.prompt_ids).split("<|end|>")[0] for r in read_all(artifact, split)}
        for split in ("train", "validation")
    }  # type: ignore[arg-type]
    assert first["validation"]
    assert not first["train"] & first["validation"]


def test_every_turn_is_evaluated_behind_the_targets_own_greedy_answers(
    finished: RunFolder, tiny_target: Path
) -> None:
    folder, tokenizer = finished.folder("evaluate").path, AutoTokenizer.from_pretrained(tiny_target)
    turns = read_json(folder / "conversations" / "talks.json")["turns"]
    names = ["talk100", "talk100#2", "talk100#3", "talk101", "talk101#2"]
    assert [turn["name"] for turn in turns] == names[: len(turns)]
    assert len(turns) >= 3
    greedy = {tuple(row.prompt_ids): row for row in read_rows(folder / "generations" / "talks-0.parquet")}
    sampled = [tuple(row.prompt_ids) for row in read_rows(folder / "generations" / "talks-0.6.parquet")]
    assert list(greedy) == sampled  # the same prompts at every temperature
    assert len(greedy) == len(turns) + 1
    by_name = {turn["name"]: turn["prompt_ids"] for turn in turns}
    for before, after in (("talk100", "talk100#2"), ("talk101", "talk101#2")):
        if after in by_name:
            said = tokenizer.decode([i for i in greedy[tuple(by_name[before])].response_ids if i > 3])
            assert f"<|assistant|>\n{said}<|end|>" in tokenizer.decode(by_name[after])
    rows = read_json(folder / "results.json")["rows"]
    assert {(row["num_prompts"], row["num_conversations"]) for row in rows if row["method"] == "replay"} == {
        (len(greedy), 3)
    }


def test_intervals_draw_turns_of_a_conversation_together(finished: RunFolder) -> None:
    folder = finished.folder("evaluate").path
    row = next(
        row
        for row in read_json(folder / "results.json")["rows"]
        if row["temperature"] == 0.6 and row["num_speculative_tokens"] == 3
    )
    counts = np.load(folder / "replay" / "align-talks-0.6.npz")["by_k"][2]
    turns = [
        turn["name"].split("#")[0] for turn in read_json(folder / "conversations" / "talks.json")["turns"]
    ]
    low, high = ratio_interval(counts[:, 2], counts[:, 1], 0, group_numbers(["bare", *turns]))
    assert low < high
    assert (row["acceptance_rate_low"], row["acceptance_rate_high"]) == (
        pytest.approx(low, abs=1e-6),
        pytest.approx(high, abs=1e-6),
    )


def test_prompts_that_the_draft_was_aligned_on_are_told_turn_by_turn(finished: RunFolder) -> None:
    artifact = finished.folder("synthesize")
    trained, held_out = (list(read_all(artifact, split)) for split in ("train", "validation"))
    later = [row for row in trained if row.prompt_key != ids_hash(row.prompt_ids)]
    assert later, "rows of later turns carry the key of the first"
    assert trained_prompts(artifact) == {ids_hash(row.prompt_ids) for row in trained}
    texts = GivenTexts()
    texts.take([*later, *held_out], context_length=256, trained=trained_prompts(artifact))
    assert texts.left_out == {"trained_on": len(later)}
    assert sum(map(len, texts.rows.values())) == len(held_out)


def test_check_counts_every_turn_of_a_conversation(
    finished: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    check.run(load_recipe(str(finished.root / "recipe.yaml")), Console(), as_json=True)
    stages = {stage["stage"]: stage for stage in json.loads(capsys.readouterr().out)["stages"]}
    assert stages["evaluate"]["tokens"] == 12 * (2 * (1 + 3 + 2) + 3), (
        "six prompts at two temperatures, three earlier answers"
    )


@pytest.mark.parametrize(
    ("row", "found"),
    [
        ({"messages": 7}, "a int"),
        ({"messages": []}, "an empty prompt"),
        ({"messages": [{"role": "system", "content": "a"}]}, "nothing that a user says"),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "tool", "content": "b"}]}, "tools"),
    ],
)
def test_a_task_that_cannot_be_asked_is_one_clear_line(
    row: dict[str, Any], found: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=found):
        load_task(FileTask(kind="file", path=write_lines(tmp_path / "t.jsonl", [row])))


def test_a_task_may_hold_texts_and_conversations(tmp_path: Path) -> None:
    task = load_task(
        FileTask(
            kind="file",
            path=write_lines(tmp_path / "t.jsonl", [{"prompt": "a"}, {**talk(7), "reference": "R"}]),
        )
    )
    assert [prompt.text for prompt in task.prompts] == ["a", "What is 7?"]
    assert task.prompts[1].conversation is not None
    assert task.prompts[1].everything == "Be brief.\n\nWhat is 7?\n\nAnd 7 plus one?\n\nWhy?R"
