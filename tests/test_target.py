"""Target: what it tells of a model, what it refuses, and drafts written and read beside it."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from conftest import write_target
from fastdraft.errors import RecipeError, TargetError
from fastdraft.modeling.drafts import load_draft, pick_device, save_draft
from fastdraft.modeling.heads import split_head
from fastdraft.modeling.vocabulary import check_same, describe, id_ranges
from fastdraft.recipe.run import TargetConfig
from fastdraft.target import Target


def test_the_vocabulary_tells_padding_bos_eos(tiny_target: Path) -> None:
    vocabulary = Target.at(tiny_target).vocabulary
    assert (vocabulary.size, vocabulary.num_tokens) == (320, 300)
    assert vocabulary.missing_ids == tuple(range(300, 320))
    assert (vocabulary.bos_token_id, vocabulary.eos_token_ids, vocabulary.pad_token_id) == (0, (3,), 0)
    assert vocabulary.as_dict()["missing_ids"] == [[300, 319]]
    assert id_ranges((3, 4, 5, 9)) == [[3, 5], [9, 9]]


def test_each_fact_is_read_once(tiny_target: Path) -> None:
    target = Target(TargetConfig(model=str(tiny_target)))
    assert target.tokenizer is target.tokenizer
    assert target.config is target.config
    assert (target.context_length, target.architecture.num_layers, target.has_weights) == (256, 2, True)


@pytest.mark.parametrize(
    ("written", "eos"),
    [
        ({"eos_token_id": [0, 5], "temperature": 0.6, "do_sample": True}, (3, 0, 5)),
        ({"eos_token_id": [0, 5], "num_beams": -1, "max_new_tokens": "many"}, (3, 0, 5)),
        (None, (3,)),
    ],
)
def test_the_generation_configs_eos_ids_join_the_tokenizers(
    tiny_target: Path, tmp_path: Path, written: dict[str, object] | None, eos: tuple[int, ...]
) -> None:
    folder = shutil.copytree(tiny_target, tmp_path / "t")
    (folder / "generation_config.json").unlink()
    if written:
        (folder / "generation_config.json").write_text(json.dumps(written))
    assert Target.at(folder).vocabulary.eos_token_ids == eos


def test_each_difference_between_vocabularies_is_named(tiny_target: Path) -> None:
    same = Target.at(tiny_target).vocabulary
    check_same(same, same)
    for changed, words in (
        (replace(same, size=384), "vocab_size, padding included"),
        (replace(same, digest="other"), "ordinary tokens"),
        (replace(same, special_digest="other"), "special tokens"),
        (replace(same, eos_token_ids=(7,)), r"draft \[7\], target \[3\]; the EOS tokens"),
    ):
        with pytest.raises(TargetError, match=words):
            check_same(same, changed)
    check_same(same, replace(same, special_digest="other", eos_token_ids=(7,)), special_tokens=False)


def test_a_tokenizer_larger_than_the_config_is_refused(tmp_path: Path) -> None:
    write_target(tmp_path, padded_vocab=304)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "vocab_size": 200}))
    with pytest.raises(TargetError, match="vocab_size is 200"):
        _ = Target.at(tmp_path).vocabulary


def test_a_target_loads_in_fp32_on_a_cpu_and_splits_into_decoder_and_head(tiny_target: Path) -> None:
    model = Target.at(tiny_target).model("cpu")
    assert model.dtype == torch.float32
    assert not model.training
    assert Target(TargetConfig(model=str(tiny_target), dtype="bf16")).model("cpu").dtype == torch.bfloat16
    decoder, head = split_head(model)
    ids = torch.tensor([[1, 2, 3]])
    with torch.inference_mode():
        assert torch.allclose(decoder(ids).last_hidden_state @ head.T, model(ids).logits, atol=1e-5)


def test_an_identity_changes_with_config_weights_and_precision(tiny_target: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_target, tmp_path / "t")
    first, bare = Target.at(folder).identity(), Target.at(folder).identity(weights=False)
    write_target(folder, seed=7)
    assert Target.at(folder).identity() != first
    assert Target.at(folder).identity(weights=False) == bare
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    assert Target.at(folder).identity(weights=False) != bare


def test_a_saved_draft_is_complete_and_its_tokenizer_files_are_byte_for_byte(
    tiny_draft: Path, tmp_path: Path
) -> None:
    model = load_draft(tiny_draft)
    save_draft(model, tmp_path / "saved", Target.at(tiny_draft))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / "saved" / name).read_bytes() == (tiny_draft / name).read_bytes()
    again = load_draft(tmp_path / "saved")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert Target.at(tmp_path / "saved").tokenizer_digest() == Target.at(tiny_draft).tokenizer_digest()
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


def _broken(source: Path, folder: Path, kind: str) -> Path:
    shutil.copytree(source, folder)
    weights = folder / "model.safetensors"
    if kind == "no config":
        (folder / "config.json").unlink()
    elif kind == "bad config":
        (folder / "config.json").write_text("{")
    elif kind == "no weights":
        weights.unlink()
    elif kind == "pickle":
        weights.rename(folder / "pytorch_model.bin")
    elif kind == "truncated":
        weights.write_bytes(weights.read_bytes()[:5000])
    elif kind in ("missing tensor", "not finite"):
        from safetensors.torch import load_file, save_file

        tensors = load_file(weights)
        if kind == "missing tensor":
            del tensors["model.layers.0.mlp.up_proj.weight"]
        else:
            tensors["model.layers.0.mlp.up_proj.weight"][1, 1] = torch.nan
        save_file(tensors, weights, metadata={"format": "pt"})
    elif kind.endswith("shard"):
        weights.unlink()
        name = "model-00001-of-00002.safetensors" if kind == "missing shard" else "../model.safetensors"
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    else:
        config = json.loads((folder / "config.json").read_text())
        change = {
            "family": {"model_type": "mamba"},
            "remote code": {"model_type": "mine", "auto_map": {"AutoConfig": "a.B"}},
            "wrong shape": {"hidden_size": 64},
            "no layers": {"num_hidden_layers": 0},
            "words for a size": {"hidden_size": "wide"},
        }
        (folder / "config.json").write_text(json.dumps({**config, **change[kind]}))
    return folder


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("no config", r"no config\.json"),
        ("bad config", "not JSON"),
        ("no weights", r"no model\.safetensors"),
        ("pickle", "only pickled weights"),
        ("truncated", "damaged or missing weights"),
        ("missing tensor", "no weights for"),
        ("missing shard", "no model-00001-of-00002"),
        ("outer shard", "must hold a `weight_map`"),
        ("family", "model family 'mamba'"),
        ("remote code", "needs Python code of its own"),
        ("wrong shape", "weights of other shapes"),
        ("no layers", "num_hidden_layers 0; must be a whole number"),
        ("words for a size", "hidden_size"),
    ],
)
def test_every_way_in_which_a_target_cannot_be_loaded_is_one_line(
    tiny_target: Path, tmp_path: Path, kind: str, words: str
) -> None:
    target = Target.at(_broken(tiny_target, tmp_path / "broken", kind))
    with pytest.raises(TargetError, match=words) as caught:
        _ = target.architecture
        target.model("cpu")
    assert "\n" not in str(caught.value)
    assert target.location in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "words"), [("truncated", "damaged or missing weights"), ("not finite", "NaN or infinity")]
)
def test_a_damaged_checkpoint_is_refused(tiny_draft: Path, tmp_path: Path, kind: str, words: str) -> None:
    with pytest.raises(TargetError, match=words):
        load_draft(_broken(tiny_draft, tmp_path / "broken", kind))


def test_an_unreachable_hub_is_one_line() -> None:
    with pytest.raises(TargetError, match="the hub cannot be reached"):
        Target.at("nobody/no-such-model").model("cpu")


def test_a_directory_without_tokenizer_is_refused(tiny_target: Path, tmp_path: Path) -> None:
    shutil.copy(tiny_target / "config.json", tmp_path)
    with pytest.raises(TargetError, match=r"no tokenizer\.json"):
        _ = Target.at(tmp_path).tokenizer
    with pytest.raises(TargetError, match="no tokenizer files"):
        Target.at(tmp_path).copy_tokenizer(tmp_path / "out")


@pytest.mark.parametrize("text", ["{", "", "{}", "[]"])
def test_a_damaged_tokenizer_is_one_line(tiny_target: Path, tmp_path: Path, text: str) -> None:
    folder = shutil.copytree(tiny_target, tmp_path / "t")
    (folder / "tokenizer.json").write_text(text)
    with pytest.raises(TargetError, match=str(folder)):
        _ = Target.at(folder).vocabulary


def test_an_unknown_or_absent_device_is_refused() -> None:
    assert pick_device("cpu") == torch.device("cpu")
    with pytest.raises(RecipeError, match=r"run\.device: gpu9; must be auto"):
        pick_device("gpu9")
    with pytest.raises(RecipeError, match="cuda:99"):
        pick_device("cuda:99")


def test_a_loaded_draft_holds_its_own_weights_and_not_its_file(tiny_draft: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_draft, tmp_path / "draft")
    draft = load_draft(folder)
    before = [parameter.clone() for parameter in draft.parameters()]
    with open(folder / "model.safetensors", "r+b") as file:
        file.write(bytes((folder / "model.safetensors").stat().st_size))
    assert all(torch.equal(a, b) for a, b in zip(draft.parameters(), before, strict=True))
    assert all(parameter.data_ptr() % 64 == 0 for parameter in draft.parameters())


def test_the_digests_of_a_vocabulary_stay_what_finished_runs_hold() -> None:
    state = {
        "added_tokens": [{"id": 3, "content": "<|end|>", "special": True}],
        "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel"},
        "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]]},
    }
    found = describe(json.dumps(state))
    assert found == ({0, 1, 2, 3}, "b8192c4a68cd721d5f4f", "52edda605a40bfc24ee2")
