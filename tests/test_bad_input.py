"""Whatever a user gets wrong ends in one line on stderr, exit code 2, and nothing half-written: through the command line."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path

import pytest

from conftest import write_recipe, write_target, write_tokenizer
from fastdraft import cli


def fails(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line with which this command line ends, with exit code 2."""
    capsys.readouterr()
    assert cli.main(list(arguments)) == 2
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line.startswith("fastdraft: ")]
    assert len(lines) == 1
    assert captured.err.rstrip().endswith(lines[0])
    return lines[0]


def leftovers(folder: Path) -> list[str]:
    """Temporary files that a failed write left behind."""
    return [str(path) for path in folder.rglob("*.tmp")]


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("pretrain.tokns=5", "pretrain.tokns: 5: unknown key; did you mean 'tokens'?"),
        ("pretrain.tokens=many", "pretrain.tokens: 'many'"),
        ("evaluate.num_speculative_tokens=[0]", "num_speculative_tokens must be between 1 and 64"),
        ("evaluate.temperatures=[-1]", "temperatures must be between 0 and 10"),
        ("export.num_speculative_tokens=0", "export.num_speculative_tokens"),
        ("run.device=gpu9", "run.device"),
        ("target.model=nowhere-at-all", "nowhere-at-all"),
        ("prepare.corpora[0].path=missing.jsonl", "missing.jsonl"),
        ("evaluate.tasks[0].path=missing.jsonl", "missing.jsonl"),
        ("prepare.corpora[1].path=python:site-packages/no_such_package", "no_such_package"),
        ("design.draft={kind: budget, parameters: 100}", "design.draft"),
        ("design.draft={kind: from, path: nowhere}", "nowhere"),
        ("pretrain.batch_tokens=1M", "at least one batch"),
    ],
)
def test_a_bad_recipe_is_refused_by_check_and_by_run(
    tiny_recipe: Path, capsys: pytest.CaptureFixture[str], override: str, said: str
) -> None:
    assert said in fails(capsys, "check", str(tiny_recipe), override)
    assert said in fails(capsys, "run", str(tiny_recipe), override)
    assert leftovers(tiny_recipe.parent) == []


def test_an_empty_corpus_is_refused(tiny_recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tiny_recipe.parent / "text.jsonl").write_text("", encoding="utf-8")
    line = fails(capsys, "run", str(tiny_recipe))
    assert "text" in line
    assert not (tiny_recipe.parent / "runs" / "tiny" / "prepare" / "manifest.json").exists()


def test_a_corpus_under_one_batch_is_refused(tiny_recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tiny_recipe.parent / "text.jsonl").write_text(
        json.dumps({"text": "short " * 60}) + "\n", encoding="utf-8"
    )
    assert "text" in fails(capsys, "run", str(tiny_recipe))


def test_a_damaged_corpus_line_is_named(tiny_recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tiny_recipe.parent / "text.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines()
    lines[7] = lines[7][:20]
    path.write_text("\n".join(lines), encoding="utf-8")
    assert "text.jsonl" in (line := fails(capsys, "run", str(tiny_recipe)))
    assert "8" in line


def test_a_tokenizer_that_does_not_fit_the_model_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = write_target(tmp_path / "target", padded_vocab=304)
    write_tokenizer(target, vocab_size=400)
    recipe = write_recipe(tmp_path, target)
    assert "vocab_size is 304" in fails(capsys, "run", str(recipe))


def test_an_earlier_draft_of_another_vocabulary_is_refused(
    tmp_path: Path, tiny_target: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = write_target(tmp_path / "other", padded_vocab=336)
    recipe = write_recipe(tmp_path, tiny_target)
    assert "draft 336, target 320" in fails(
        capsys, "check", str(recipe), f"design.draft={{kind: from, path: '{other}'}}"
    )


def test_a_target_that_needs_remote_code_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = write_target(tmp_path / "target")
    config = json.loads((target / "config.json").read_text(encoding="utf-8"))
    config |= {
        "model_type": "homemade",
        "auto_map": {
            "AutoConfig": "configuration_homemade.Config",
            "AutoModelForCausalLM": "modeling_homemade.Model",
        },
    }
    (target / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (target / "configuration_homemade.py").write_text("raise SystemExit('remote code ran')", encoding="utf-8")
    assert "target" in fails(capsys, "run", str(write_recipe(tmp_path, target)))


def test_pickled_weights_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = write_target(tmp_path / "target")
    (target / "model.safetensors").rename(target / "pytorch_model.bin")
    assert "safetensors" in fails(capsys, "run", str(write_recipe(tmp_path, target)))


@pytest.fixture
def prepared(tiny_recipe: Path) -> Path:
    """A recipe whose first stages, up to pretrain, are done."""
    for stage in ("design", "prepare", "pretrain"):
        assert cli.main([stage, str(tiny_recipe), "--quiet"]) == 0
    return tiny_recipe


def test_a_corrupt_shard_is_refused(prepared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shard = next((prepared.parent / "runs" / "tiny" / "prepare" / "code").glob("*.bin"))
    shard.write_bytes(shard.read_bytes()[:-10])
    assert shard.name in fails(capsys, "continue_pretrain", str(prepared))
    assert not (prepared.parent / "runs" / "tiny" / "continue_pretrain" / "manifest.json").exists()


@pytest.mark.parametrize("content", [b"", b"not safetensors", b"\xff" * 64])
def test_a_corrupt_checkpoint_is_refused(
    prepared: Path, capsys: pytest.CaptureFixture[str], content: bytes
) -> None:
    for name in ("undecayed", "checkpoint"):
        (prepared.parent / "runs" / "tiny" / "pretrain" / name / "model.safetensors").write_bytes(content)
    assert "pretrain" in fails(capsys, "continue_pretrain", str(prepared))


def test_a_missing_file_of_a_finished_stage_is_named(
    prepared: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(prepared.parent / "runs" / "tiny" / "pretrain" / "undecayed")
    assert "undecayed" in fails(capsys, "continue_pretrain", str(prepared))


def test_a_full_disk_is_one_line_and_the_run_goes_on_later(
    prepared: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import os

    real = os.fsync

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert "no space left" in fails(capsys, "continue_pretrain", str(prepared))
    monkeypatch.setattr(os, "fsync", real)
    assert leftovers(prepared.parent) == []
    assert cli.main(["continue_pretrain", str(prepared), "--quiet"]) == 0


def test_a_loss_that_is_not_a_number_stops_with_one_line(
    prepared: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    path = prepared.parent / "runs" / "tiny" / "pretrain" / "undecayed" / "model.safetensors"
    weights = load_file(path)
    weights["model.norm.weight"] = torch.full_like(weights["model.norm.weight"], float("nan"))
    save_file(weights, path, metadata={"format": "pt"})
    line = fails(capsys, "continue_pretrain", str(prepared))
    assert "nan" in line.lower() or "finite" in line.lower()
    assert not (prepared.parent / "runs" / "tiny" / "continue_pretrain" / "manifest.json").exists()


def test_a_run_in_use_is_refused(tiny_recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from fastdraft.run_folder import RunFolder

    with RunFolder(tiny_recipe.parent / "runs" / "tiny").lock():
        assert "in use by another process" in fails(capsys, "design", str(tiny_recipe))


def test_magpie_without_a_chat_template_is_refused_by_check(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(tmp_path, write_target(tmp_path / "base", chat=False))
    assert "needs a chat template" in fails(capsys, "check", str(recipe))
