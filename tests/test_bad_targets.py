"""Everything that can be wrong with a target's folder: one line with a remedy, exit code 2, nothing begun, before any stage runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bad_input_fixture import config_with, file_with, refused, spoiled


def adapter_only(folder: Path) -> None:
    for path in list(folder.iterdir()):
        path.unlink()
    (folder / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "base_model_name_or_path": "x/y"}), encoding="utf-8"
    )


def gguf_only(folder: Path) -> None:
    for path in list(folder.iterdir()):
        path.unlink()
    (folder / "model-q4.gguf").write_bytes(b"GGUF" + b"\0" * 60)


def emptied(folder: Path) -> None:
    for path in list(folder.iterdir()):
        path.unlink()


def without(name: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).unlink()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (emptied, "no config.json"),
        (adapter_only, "an adapter (LoRA), not a model"),
        (gguf_only, "a GGUF file, which is llama.cpp's"),
        (file_with("config.json", b""), "not JSON"),
        (file_with("config.json", b"{"), "not JSON"),
        (file_with("config.json", b"\xff\xfe"), "not JSON"),
        (file_with("config.json", b"[" * 5000), "not JSON"),
        (file_with("config.json", b"[]"), "a JSON list: must be a model's config, an object"),
        (config_with(vocab_size=None), "no vocab_size"),
        (config_with(vocab_size=0), "vocab_size 0: must be a whole number from 1"),
        (config_with(vocab_size="many"), "vocab_size 'many'"),
        (config_with(vocab_size=10**15), "vocab_size 1000000000000000"),
        (config_with(hidden_size=-4), "hidden_size -4"),
        (config_with(num_hidden_layers=1.5), "num_hidden_layers 1.5"),
        (config_with(model_type=None), "model family 'None'"),
        (config_with(model_type="t5"), "model family 't5'"),
        (config_with(model_type="bert"), "model family 'bert'"),
        (config_with(model_type=["llama"]), "model family"),
    ],
)
def test_a_folder_that_holds_no_target_we_can_draft_for_is_refused_by_check(
    tmp_path: Path,
    tiny_target: Path,
    capsys: pytest.CaptureFixture[str],
    change: Callable[[Path], Any],
    said: str,
) -> None:
    recipe = spoiled(tmp_path, tiny_target, change)
    assert said in refused(capsys, "check", recipe)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    "change",
    [
        file_with("tokenizer.json", b"{"),
        file_with("tokenizer.json", b""),
        file_with("tokenizer.json", b"{}"),
        without("tokenizer.json"),
    ],
)
def test_a_target_without_a_whole_tokenizer_is_refused(
    tmp_path: Path, tiny_target: Path, capsys: pytest.CaptureFixture[str], change: Callable[[Path], Any]
) -> None:
    recipe = spoiled(tmp_path, tiny_target, change)
    assert str(tmp_path / "target") in refused(capsys, "run", recipe)
