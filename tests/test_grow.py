"""The growing tool: larger models with the same outputs, ordinary weights where nobody looks, and shapes that are refused."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from conftest import write_target, write_tokenizer
from fastdraft.modeling.loading import load_target
from fastdraft.recipe.recipe import load_recipe
from fastdraft.recipe.run import TargetConfig

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
SHAPE = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def _load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", BENCHMARKS / f"{name}.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


grow = _load("grow")
from growing import model as growing_model  # noqa: E402 - the folder is on the path only now


def write_model(folder: Path, family: str = "llama", **changes: Any) -> Path:
    """A random model with all its vectors random too, so that a wrong place of any of them shows."""
    from transformers import AutoConfig, AutoModelForCausalLM

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
        return load_target(TargetConfig(model=str(folder), dtype="fp32"), "cpu")(input_ids=tokens).logits


def grown(source: Path, folder: Path, *options: object) -> Path:
    assert grow.main([str(source), str(folder), "--dtype", "fp32", *map(str, options)]) == 0
    return folder


def assert_same(source: Path, folder: Path) -> None:
    torch.testing.assert_close(
        logits(folder), logits(source), rtol=0, atol=1e-5 * max(1.0, float(logits(source).abs().max()))
    )


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("source"), tie_word_embeddings=False)


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("tied"), tie_word_embeddings=True)


WIDER = ("--hidden-size", 64, "--layers", 5, "--intermediate-size", 320, "--heads", 8)


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("--layers", 5),
        ("--hidden-size", 48),
        ("--intermediate-size", 200),
        ("--heads", 16, "--kv-heads", 2),
        ("--heads", 4, "--kv-heads", 4),
        (*WIDER, "--kv-heads", 2),
        (*WIDER, "--kv-heads", 4),
        (*WIDER, "--kv-heads", 8),
        (*WIDER, "--kv-heads", 8, "--fill", "zero"),
    ],
    ids=lambda options: " ".join(map(str, options)).replace("--", "") or "same shape",
)
def test_a_grown_model_has_the_logits_of_its_source(
    source: Path, tmp_path: Path, options: tuple[object, ...]
) -> None:
    assert_same(source, grown(source, tmp_path / "grown", *options))


def test_a_tied_model_grows_tied_and_untied(tied: Path, tmp_path: Path) -> None:
    assert_same(tied, grown(tied, tmp_path / "tied", *WIDER))
    assert_same(tied, grown(tied, tmp_path / "untied", *WIDER, "--untied"))
    assert "lm_head.weight" not in load_file(tmp_path / "tied" / "model.safetensors")
    assert load_file(tmp_path / "untied" / "model.safetensors")["lm_head.weight"].shape == (300, 64)


@pytest.mark.parametrize("kv_heads", [1, 2, 4, 8])
def test_queries_keep_their_keys_when_one_head_served_them_all(tmp_path: Path, kv_heads: int) -> None:
    source = write_model(tmp_path / "source", num_key_value_heads=1)
    assert_same(
        source, grown(source, tmp_path / "grown", "--heads", 8, "--kv-heads", kv_heads, "--hidden-size", 40)
    )


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("mistral", {}),
        ("qwen2", {}),
        ("qwen3", {}),
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("mistral", {"sliding_window": 8}),
    ],
)
def test_other_families_and_biases_grow_too(tmp_path: Path, family: str, changes: dict[str, Any]) -> None:
    source = write_model(tmp_path / "source", family, **changes)
    assert_same(source, grown(source, tmp_path / "grown", *WIDER))


def test_random_values_fill_every_matrix_and_change_nothing(source: Path, tmp_path: Path) -> None:
    random = load_file(grown(source, tmp_path / "random", *WIDER, "--kv-heads", 4) / "model.safetensors")
    zero = load_file(
        grown(source, tmp_path / "zero", *WIDER, "--kv-heads", 4, "--fill", "zero") / "model.safetensors"
    )
    matrices = {name: tensor for name, tensor in random.items() if tensor.ndim == 2}
    assert all(tensor.any() for tensor in matrices.values())
    assert len({tensor.numpy().tobytes() for tensor in matrices.values()}) == len(
        matrices
    )  # equal ones would be stored as one
    assert sum(int(tensor.count_nonzero()) for tensor in matrices.values()) > 2 * sum(
        int(zero[name].count_nonzero()) for name in matrices
    )
    torch.testing.assert_close(logits(tmp_path / "random"), logits(tmp_path / "zero"), rtol=0, atol=1e-5)


def test_random_values_stay_within_the_range_of_the_trained_row(source: Path, tmp_path: Path) -> None:
    """A wider range would coarsen the scales of int8 rows and int4 groups."""
    before = load_file(source / "model.safetensors")
    after = load_file(grown(source, tmp_path / "grown", *WIDER, "--kv-heads", 4) / "model.safetensors")
    for name in (
        "model.layers.0.mlp.up_proj.weight",
        "model.layers.1.mlp.down_proj.weight",
        "lm_head.weight",
    ):
        rows = len(before[name])
        assert torch.equal(after[name][:rows].amax(1), before[name].amax(1))
        assert torch.equal(after[name][:rows].amin(1), before[name].amin(1))


def test_what_is_beside_the_weights_travels_byte_for_byte(tmp_path: Path) -> None:
    source = write_target(tmp_path / "source")
    folder = grown(source, tmp_path / "grown", "--layers", 3, "--context-length", 512)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (folder / name).read_bytes() == (source / name).read_bytes()
    config = json.loads((folder / "config.json").read_text())
    assert (config["max_position_embeddings"], config["num_hidden_layers"], config["dtype"]) == (
        512,
        3,
        "float32",
    )
    assert (folder / "model.safetensors").stat().st_mode == (folder / "config.json").stat().st_mode


def test_half_precision_keeps_matrices_and_norms_exact(source: Path, tmp_path: Path) -> None:
    assert grow.main([str(source), str(tmp_path / "grown"), *map(str, WIDER)]) == 0
    tensors = load_file(tmp_path / "grown" / "model.safetensors")
    record = json.loads((tmp_path / "grown" / "growth.json").read_text())
    assert {str(tensor.dtype) for tensor in tensors.values()} == {"torch.float16", "torch.float32"}
    assert all(tensor.dtype == torch.float32 for name, tensor in tensors.items() if "norm" in name)
    assert record["check"]["max_difference"] < 1e-5 * record["check"]["largest_logit"]
    assert record["check"]["max_difference_to_source"] > record["check"]["max_difference"]


def test_large_weights_are_written_in_shards_that_load(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(growing_model, "SHARD_BYTES", 50_000)
    folder = grown(source, tmp_path / "grown", *WIDER)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) == len(list(folder.glob("*.safetensors"))) > 2
    assert_same(source, folder)


def test_a_model_with_other_logits_is_never_left_behind(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(growing_model.Grower, "_norm", lambda self, weight, hidden: torch.ones(hidden.size))
    assert grow.main([str(source), str(tmp_path / "grown"), "--hidden-size", "48"]) == 2
    assert "logits differ" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--hidden-size", 16), "--hidden-size: 16: must not be smaller than the source's 32"),
        (("--layers", 1), "--layers: 1: must not be smaller"),
        (("--head-dim", 16), "--head-dim: 16: must stay 8"),
        (("--heads", 9, "--kv-heads", 2), "--kv-heads: 2: must divide --heads 9"),
        (("--heads", 5, "--kv-heads", 5, "--hidden-size", 32), "must load in transformers"),
        (("--context-length", 64), "--context-length: 64"),
        (("--layers", "many"), "--layers: invalid int value"),
    ],
)
def test_a_shape_that_cannot_be_is_one_line(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: tuple[object, ...], words: str
) -> None:
    try:
        code = grow.main([str(source), str(tmp_path / "grown"), *map(str, options)])
    except SystemExit as stop:
        code = stop.code
    error = capsys.readouterr().err
    assert code == 2
    assert words in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_too_few_key_value_heads_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_model(tmp_path / "source", num_attention_heads=8, num_key_value_heads=2, hidden_size=64)
    assert (
        grow.main(
            [str(source), str(tmp_path / "grown"), "--heads", "9", "--kv-heads", "3", "--hidden-size", "72"]
        )
        == 2
    )
    assert (
        "--kv-heads: 3: must be at least 4 at 3 queries a key-value head, 4 in the source"
        in capsys.readouterr().err
    )


def test_an_unknown_tensor_or_an_existing_directory_is_refused(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from safetensors.torch import save_file

    strange = write_model(tmp_path / "strange")
    tensors = load_file(strange / "model.safetensors")
    save_file(
        {**tensors, "model.layers.0.mlp.router.weight": torch.ones(2, 2)}, strange / "model.safetensors"
    )
    assert grow.main([str(strange), str(tmp_path / "grown")]) == 2
    assert "mlp.router.weight" in capsys.readouterr().err
    assert grow.main([str(source), str(strange)]) == 2
    assert "exists" in capsys.readouterr().err


def test_a_pair_is_grown_once_and_its_recipe_is_valid(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pair = _load("real_size_pair")
    sizes = ["64", "3", "96", "8", "4"]
    command = [
        "--target",
        str(source),
        "--draft",
        str(source),
        "--output",
        str(tmp_path / "out"),
        "--until",
        "grow",
        "--draft-shape",
        *sizes,
    ]
    assert pair.main([*command, "--target-shape", *sizes]) == 0
    recipe = load_recipe(str(tmp_path / "out" / "recipe.yaml"))
    assert list(recipe.sections()) == ["design", "export", "benchmark", "report"]
    assert recipe.target.model == str((tmp_path / "out" / "target").resolve())
    assert pair.main([*command, "--target-shape", *sizes]) == 0
    assert capsys.readouterr().err.count("already grown") == 2
    assert pair.main([*command, "--target-shape", "64", "4", "96", "8", "4"]) == 2
    assert "another shape" in capsys.readouterr().err
