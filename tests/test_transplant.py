"""Drafts from a model of another vocabulary: how its tokens are spelled, which rows they get."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from conftest import write_recipe
from family_fixture import designed
from fastdraft import cli
from fastdraft.modeling.transplant import spell, transplant
from fastdraft.target import Target

ORDINARY = ["\u2581", "t", "h", "e", "i", "n", "g", "th", "the", "in", "ing", "\u2581the"]


def write_donor(folder: Path) -> Path:
    """A random Llama of two layers whose tokenizer is as sentencepiece makes them, with bytes to fall back on."""
    special = ["<unk>", "<s>", "</s>", "<|user|>"]
    names = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), *ORDINARY]
    vocab = {name: token_id for token_id, name in enumerate(names)}
    merges = [("t", "h"), ("th", "e"), ("i", "n"), ("in", "g"), ("\u2581", "the")]
    core = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    core.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback()])
    core.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in special])
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=core, **names).save_pretrained(folder)
    torch.manual_seed(0)
    shape = {"vocab_size": len(vocab), "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    config = LlamaConfig(
        **shape, num_attention_heads=2, max_position_embeddings=128, tie_word_embeddings=True
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def donor(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_donor(tmp_path_factory.mktemp("donor"))


def names_of(target: Path, donor: Path) -> dict[str, list[str]]:
    """The pieces of every token, by name."""
    read, found = Target.at(target).tokenizer, spell(Target.at(target), Target.at(donor))
    other = Target.at(donor).tokenizer
    return {
        str(read.convert_ids_to_tokens(n)): other.convert_ids_to_tokens(ids) for n, ids in enumerate(found)
    }


def test_tokens_of_byte_level_bpe_are_spelled_in_sentencepiece(tiny_target: Path, donor: Path) -> None:
    found = names_of(tiny_target, donor)
    assert found["\u0120the"] == ["\u2581the"]
    assert found["in"] == ["in"]
    assert found["he"] == ["h", "e"]
    assert found["\u0120"] == ["\u2581"]
    assert found["f"] == ["<0x66>"]
    assert found["\u010a"] == ["<0x0A>"]
    assert found["\u00c3"] == ["<0xC3>"]  # half a character, no text by itself


def test_special_tokens_go_by_their_text_then_by_their_role_then_by_what_they_say(
    tiny_target: Path, donor: Path
) -> None:
    found = names_of(tiny_target, donor)
    assert found["<|user|>"] == ["<|user|>"]
    assert found["<|endoftext|>"] == ["<s>"]
    assert found["<|end|>"] == ["</s>"]
    assert found["<|assistant|>"][:2] == ["<0x3C>", "<0x7C>"]
    assert "in" not in found["<|assistant|>"]
    assert found["None"] == []  # padding ids


def test_tokens_of_sentencepiece_are_spelled_in_byte_level_bpe(tiny_target: Path, donor: Path) -> None:
    found = names_of(donor, tiny_target)
    assert found["\u2581the"] == ["\u0120the"]
    assert found["ing"][0] in ("i", "in", "ing")
    assert found["<0x0A>"] == ["\u010a"]
    assert found["<0xC3>"] == ["\u00c3"]
    assert found["</s>"] == ["<|end|>"]


@torch.no_grad()
@pytest.mark.parametrize("tied", [True, False])
def test_the_input_has_the_last_pieces_row_and_the_head_a_mean_that_leans_to_the_first(tied: bool) -> None:
    shape = {"vocab_size": 5, "hidden_size": 4, "intermediate_size": 4, "num_hidden_layers": 1}
    model = LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=1, tie_word_embeddings=tied))
    before, head = (each.weight.clone() for each in (model.model.embed_tokens, model.lm_head))
    transplant(model, [[2], [3, 1], [], [0, 1, 2]])
    inputs, outputs = model.model.embed_tokens.weight, model.lm_head.weight
    assert torch.equal(inputs, torch.stack([before[2], before[1], before.mean(0), before[2]]))
    wanted = [head[2], (2 * head[3] + head[1]) / 3, head.mean(0), (4 * head[0] + 2 * head[1] + head[2]) / 7]
    torch.testing.assert_close(outputs.detach(), torch.stack(wanted))
    assert model(torch.tensor([[0, 3]])).logits.shape == (1, 2, 4)
    assert not model.config.tie_word_embeddings


@torch.no_grad()
def test_a_model_of_the_same_vocabulary_keeps_the_logits_of_all_tokens(tiny_target: Path) -> None:
    target, ids = Target.at(tiny_target), torch.tensor([[5, 100, 299]])
    found, model = spell(target, target), target.model("cpu")
    assert found[:300] == [[token_id] for token_id in range(300)]
    before = model(ids).logits
    transplant(model, found)
    torch.testing.assert_close(model(ids).logits[..., :300], before[..., :300])


def test_a_transplanted_draft_speaks_the_targets_vocabulary_in_the_donors_shape(
    tiny_target: Path, donor: Path, tmp_path: Path
) -> None:
    draft = {"kind": "transplant", "model": str(donor)}
    folder, manifest = designed(tmp_path / "run", tiny_target, draft=draft)
    model = AutoModelForCausalLM.from_pretrained(folder)
    config = model.config
    assert (config.vocab_size, config.num_hidden_layers, config.max_position_embeddings) == (320, 2, 128)
    assert not config.tie_word_embeddings
    assert sum(p.numel() for p in model.parameters()) == manifest["parameters"]
    assert (manifest["initialization"], manifest["start"]["license"]) == ("transplant", "unknown")
    assert manifest["start"]["loss"] == pytest.approx(manifest["start"]["loss_of_source"])
    assert (folder / "tokenizer.json").read_bytes() == (tiny_target / "tokenizer.json").read_bytes()


def test_a_donor_may_be_cut_and_its_shorter_context_is_told(
    tiny_target: Path, donor: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    draft: dict[str, Any] = {"kind": "transplant", "model": str(donor), "layers": [0], "hidden_size": 8}
    folder, manifest = designed(tmp_path / "run", tiny_target, draft=draft)
    assert json.loads((folder / "config.json").read_text(encoding="utf-8"))["hidden_size"] == 8
    assert manifest["start"]["layers"] == [0]
    path = str(write_recipe(tmp_path, tiny_target, design={"draft": draft}))
    assert cli.main(["check", path]) == 0
    assert "the draft's context is 128 tokens, the target's 256" in " ".join(capsys.readouterr().out.split())
