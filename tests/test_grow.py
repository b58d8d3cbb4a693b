"""benchmarks/real_size_pair.py: larger models with the same outputs, ordinary weights where nobody looks."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from conftest import write_tokenizer
from fastdraft.recipe.recipe import load_recipe

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
import real_size_pair

SHAPE = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def write_model(folder: Path, family: str = "llama", **changes: Any) -> Path:
    """A random model with all its vectors random too, so that a wrong place of any of them shows."""
    write_tokenizer(folder)
    ids = {"bos_token_id": 0, "eos_token_id": 3, "pad_token_id": 0}
    values = {**SHAPE, **ids, "vocab_size": 300, "max_position_embeddings": 128, "head_dim": 8, **changes}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **values))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.2) if parameter.ndim == 2 else parameter.normal_(1.0, 0.2)
    model.save_pretrained(folder)
    return folder


def logits(folder: Path) -> torch.Tensor:
    tokens = torch.randint(300, (2, 24), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(input_ids=tokens).logits


@pytest.mark.parametrize(
    ("source", "sizes"),
    [
        ({}, (32, 2, 64, 4, 2)),
        ({}, (48, 5, 200, 16, 2)),
        ({}, (64, 5, 320, 8, 8)),
        ({"num_key_value_heads": 1}, (40, 2, 64, 8, 4)),
        ({"tie_word_embeddings": True}, (64, 3, 320, 8, 4)),
        ({"family": "mistral", "sliding_window": 8}, (64, 3, 96, 8, 4)),
        ({"family": "qwen3"}, (64, 3, 96, 8, 4)),
    ],
)
def test_a_grown_model_has_the_logits_of_its_source(
    tmp_path: Path, source: dict[str, Any], sizes: tuple[int, ...]
) -> None:
    folder = write_model(tmp_path / "source", **source)
    real_size_pair.grow(folder, tmp_path / "grown", sizes, torch.float32)
    expected = logits(folder)
    torch.testing.assert_close(
        logits(tmp_path / "grown"), expected, rtol=0, atol=1e-5 * max(1.0, float(expected.abs().max()))
    )


def test_random_values_fill_every_matrix_within_the_range_of_the_trained_row(tmp_path: Path) -> None:
    """Equal matrices would be stored as one; a wider range would coarsen the scales of int8 rows and int4
    groups.
    """
    source = write_model(tmp_path / "source")
    real_size_pair.grow(source, tmp_path / "grown", (64, 5, 320, 8, 4), torch.float32)
    before, after = (
        load_file(source / "model.safetensors"),
        load_file(tmp_path / "grown" / "model.safetensors"),
    )
    matrices = [tensor for tensor in after.values() if tensor.ndim == 2]
    assert all(tensor.any() for tensor in matrices)
    assert len({tensor.numpy().tobytes() for tensor in matrices}) == len(matrices)
    for name in (
        "model.layers.0.mlp.up_proj.weight",
        "model.layers.1.mlp.down_proj.weight",
        "lm_head.weight",
    ):
        rows = len(before[name])
        assert torch.equal(after[name][:rows].amax(1), before[name].amax(1))
        assert torch.equal(after[name][:rows].amin(1), before[name].amin(1))


@pytest.mark.parametrize(
    ("sizes", "words"),
    [((16, 2, 64, 4, 2), "hidden_size 16: must not be smaller"), ((32, 2, 64, 9, 2), "do not fit 9 heads")],
)
def test_a_shape_that_cannot_be_is_one_line(tmp_path: Path, sizes: tuple[int, ...], words: str) -> None:
    with pytest.raises(SystemExit, match=words):
        real_size_pair.grow(write_model(tmp_path / "source"), tmp_path / "grown", sizes, torch.float32)
    assert not (tmp_path / "grown").exists()


def test_a_pair_is_grown_once_and_its_recipe_is_valid(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, sizes = write_model(tmp_path / "source"), ["64", "3", "96", "8", "4"]
    command = [
        "--target",
        str(source),
        "--draft",
        str(source),
        "--output",
        str(tmp_path / "out"),
        "--until",
        "grow",
    ]
    command += ["--draft-shape", *sizes, "--target-shape", *sizes]
    assert real_size_pair.main(command) == 0
    assert list(load_recipe(str(tmp_path / "out" / "recipe.yaml")).sections()) == [
        "design",
        "export",
        "benchmark",
        "report",
    ]
    assert real_size_pair.main(command) == 0
    assert capsys.readouterr().err.count("already grown") == 2
