"""Vocabularies, loading and saving, and every way in which a model cannot be loaded."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from conftest import write_target
from fastdraft.errors import FastDraftError, RecipeError, TargetError
from fastdraft.modeling import loading
from fastdraft.modeling.source import copy_tokenizer_files, tokenizer_digest
from fastdraft.modeling.vocabulary import check_same, describe, id_ranges
from fastdraft.recipe.run import TargetConfig


def test_the_vocabulary_tells_padding_bos_eos(tiny_target: Path) -> None:
    vocabulary = loading.load_vocabulary(TargetConfig(model=str(tiny_target)))
    assert (vocabulary.size, vocabulary.num_tokens, vocabulary.missing_ids) == (
        320,
        300,
        tuple(range(300, 320)),
    )
    assert (vocabulary.bos_token_id, vocabulary.eos_token_ids, vocabulary.pad_token_id) == (0, (3,), 0)
    assert vocabulary.as_dict()["missing_ids"] == [[300, 319]]


def test_the_generation_configs_eos_ids_join_the_tokenizers(tiny_target: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_target, tmp_path / "t")
    (tmp_path / "t" / "generation_config.json").write_text(
        json.dumps({"eos_token_id": [0, 5], "temperature": 0.6, "do_sample": True})
    )
    assert loading.load_vocabulary(TargetConfig(model=str(tmp_path / "t"))).eos_token_ids == (3, 0, 5)


def test_id_ranges_are_closed() -> None:
    assert id_ranges((3, 4, 5, 9)) == [[3, 5], [9, 9]]


def test_each_difference_between_vocabularies_is_named(tiny_target: Path) -> None:
    same = loading.load_vocabulary(TargetConfig(model=str(tiny_target)))
    check_same(same, same)
    for changed, words in (
        (replace(same, size=384), "vocab_size, padding included"),
        (replace(same, digest="other"), "ordinary tokens"),
        (replace(same, special_digest="other"), "special tokens"),
        (replace(same, eos_token_ids=(7,)), r"draft \[7\], target \[3\]: the EOS tokens"),
    ):
        with pytest.raises(TargetError, match=words):
            check_same(same, changed)
    check_same(same, replace(same, special_digest="other", eos_token_ids=(7,)), special_tokens=False)


def test_a_tokenizer_larger_than_the_config_is_refused(tmp_path: Path) -> None:
    write_target(tmp_path, padded_vocab=304)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "vocab_size": 200}))
    with pytest.raises(TargetError, match="vocab_size is 200"):
        loading.load_vocabulary(TargetConfig(model=str(tmp_path)))


def test_a_target_loads_in_fp32_on_a_cpu_and_splits_into_decoder_and_head(tiny_target: Path) -> None:
    model = loading.load_target(TargetConfig(model=str(tiny_target)), "cpu")
    assert model.dtype == torch.float32
    assert not model.training
    decoder, head = loading.split_head(model)
    ids = torch.tensor([[1, 2, 3]])
    with torch.inference_mode():
        assert torch.allclose(decoder(ids).last_hidden_state @ head.T, model(ids).logits, atol=1e-5)


def test_a_saved_draft_is_complete_and_its_tokenizer_files_are_byte_for_byte(
    tiny_draft: Path, tmp_path: Path
) -> None:
    model = loading.load_draft(tiny_draft)
    loading.save_draft(model, tmp_path / "saved", tiny_draft)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / "saved" / name).read_bytes() == (tiny_draft / name).read_bytes()
    again = loading.load_draft(tmp_path / "saved")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert tokenizer_digest(tmp_path / "saved") == tokenizer_digest(tiny_draft)
    assert not [path for path in tmp_path.iterdir() if path.name != "saved"]


def _broken(source: Path, folder: Path, kind: str) -> Path:
    shutil.copytree(source, folder)
    if kind == "no config":
        (folder / "config.json").unlink()
    elif kind == "bad config":
        (folder / "config.json").write_text("{")
    elif kind == "no weights":
        (folder / "model.safetensors").unlink()
    elif kind == "pickle":
        (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    elif kind == "truncated":
        (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:5000])
    elif kind == "missing tensor":
        from safetensors.torch import load_file, save_file

        tensors = load_file(folder / "model.safetensors")
        del tensors["model.layers.0.mlp.up_proj.weight"]
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    elif kind == "missing shard":
        (folder / "model.safetensors").unlink()
        (folder / "model.safetensors.index.json").write_text(
            json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors"}})
        )
    else:
        config = json.loads((folder / "config.json").read_text())
        change = {
            "family": {"model_type": "mamba"},
            "remote code": {"model_type": "mine", "auto_map": {"AutoConfig": "a.B"}},
            "wrong shape": {"hidden_size": 64},
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
        ("family", "model family 'mamba'"),
        ("remote code", "needs Python code of its own"),
        ("wrong shape", "weights of other shapes"),
    ],
)
def test_every_way_in_which_a_target_cannot_be_loaded_is_one_line(
    tiny_target: Path, tmp_path: Path, kind: str, words: str
) -> None:
    folder = _broken(tiny_target, tmp_path / "broken", kind)
    with pytest.raises(TargetError, match=words) as caught:
        loading.load_target(TargetConfig(model=str(folder)), "cpu")
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


def test_a_missing_directory_is_not_sought_on_the_hub(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match="no such directory"):
        loading.load_target(TargetConfig(model=str(tmp_path / "nothing" / "here")), "cpu")


def test_an_unreachable_hub_is_one_line() -> None:
    with pytest.raises(TargetError, match="the hub cannot be reached"):
        loading.load_target(TargetConfig(model="nobody/no-such-model"), "cpu")


def test_a_corrupt_checkpoint_is_an_artifact_error(tiny_draft: Path, tmp_path: Path) -> None:
    with pytest.raises(FastDraftError, match="damaged or missing weights"):
        loading.load_draft(_broken(tiny_draft, tmp_path / "broken", "truncated"))


def test_a_directory_without_tokenizer_is_refused(tiny_target: Path, tmp_path: Path) -> None:
    shutil.copy(tiny_target / "config.json", tmp_path)
    with pytest.raises(TargetError, match=r"no tokenizer\.json"):
        loading.load_tokenizer(str(tmp_path))
    with pytest.raises(TargetError, match="no tokenizer files"):
        copy_tokenizer_files(tmp_path, tmp_path / "out")


def test_an_unknown_or_absent_device_is_refused() -> None:
    assert loading.pick_device("cpu") == torch.device("cpu")
    with pytest.raises(RecipeError, match=r"run\.device: gpu9: must be auto"):
        loading.pick_device("gpu9")
    with pytest.raises(RecipeError, match="cuda:99"):
        loading.pick_device("cuda:99")


def test_a_loaded_draft_holds_its_own_weights_and_not_its_file(tiny_draft: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_draft, tmp_path / "draft")
    draft = loading.load_draft(folder)
    before = [parameter.clone() for parameter in draft.parameters()]
    with open(folder / "model.safetensors", "r+b") as file:
        file.write(bytes((folder / "model.safetensors").stat().st_size))
    assert all(
        torch.equal(parameter, kept) for parameter, kept in zip(draft.parameters(), before, strict=True)
    )
    assert all(parameter.data_ptr() % 64 == 0 for parameter in draft.parameters())


def test_a_tokenizer_is_loaded_once_and_anew_when_its_files_change(tiny_target: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_target, tmp_path / "target")
    first = loading.load_tokenizer(str(folder))
    assert loading.load_tokenizer(str(folder)) is first
    old = loading.load_vocabulary(TargetConfig(model=str(folder)))
    state = json.loads((folder / "tokenizer.json").read_text())
    state["added_tokens"][-1]["content"] = "<|renamed|>"
    (folder / "tokenizer.json").write_text(json.dumps(state))
    assert loading.load_tokenizer(str(folder)) is not first
    new = loading.load_vocabulary(TargetConfig(model=str(folder)))
    assert new.digest == old.digest
    assert new.special_digest != old.special_digest


def test_a_loaded_tokenizer_is_that_of_transformers_and_copies_are_copies_again(tiny_target: Path) -> None:
    import copy

    from transformers import AutoTokenizer

    loaded, plain = loading.load_tokenizer(str(tiny_target)), AutoTokenizer.from_pretrained(tiny_target)
    assert loaded.backend_tokenizer.to_str() == plain.backend_tokenizer.to_str()
    assert loaded.special_tokens_map == plain.special_tokens_map
    assert loaded.chat_template == plain.chat_template
    assert copy.deepcopy(loaded.backend_tokenizer) is not loaded.backend_tokenizer


def test_the_digests_of_a_vocabulary_stay_what_finished_runs_hold() -> None:
    state = {
        "added_tokens": [{"id": 3, "content": "<|end|>", "special": True}],
        "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel"},
        "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]]},
    }
    described = describe(json.dumps(state))
    assert (described.digest, described.special_digest, described.ids) == (
        "b8192c4a68cd721d5f4f",
        "52edda605a40bfc24ee2",
        {0, 1, 2, 3},
    )
