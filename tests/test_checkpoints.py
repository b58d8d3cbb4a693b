"""What lies in a checkpoint is used or refused, and no config.json, as it lies on the hub, ends in a traceback."""

from __future__ import annotations

import io
import json
import shutil
from contextlib import redirect_stdout, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from family_fixture import FACTORS, designed, family_config
from fastdraft.commands import inspect
from fastdraft.console import Console
from fastdraft.errors import FastDraftError, TargetError
from fastdraft.modeling.architecture import draft_hf_config, read_architecture
from fastdraft.modeling.drafts import build_draft, load_draft
from fastdraft.modeling.shapes import natural
from fastdraft.target import Target

EMBEDDING, HEAD, UP = "model.embed_tokens.weight", "lm_head.weight", "model.layers.0.mlp.up_proj.weight"


def changed(source: Path, folder: Path, tensors: dict[str, Any] | None = None, **config: Any) -> Path:
    """A copy with other tensors (None: four ones) and other keys of config.json; an ellipsis takes one out."""
    shutil.copytree(source, folder, dirs_exist_ok=True)
    path, file = folder / "config.json", folder / "model.safetensors"
    if tensors:
        more = {name: torch.ones(4) if value is None else value for name, value in tensors.items()}
        kept = {name: value for name, value in (load_file(file) | more).items() if value is not ...}
        save_file(kept, file, {"format": "pt"})
    values = {**json.loads(path.read_text()), **config}
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not ...}))
    return folder


def refusal(folder: Path) -> str:
    """The one line of the look at the heads of the files; loading it as a draft says the same."""
    lines = []
    for look in (lambda: Target.at(folder).check_tensors(), lambda: load_draft(folder)):
        with pytest.raises(TargetError) as caught:
            look()
        lines.append(str(caught.value))
    assert lines[0] == lines[1]
    assert "\n" not in lines[0]
    return lines[0]


def inspected(folder: Path) -> str:
    """What `fastdraft inspect` prints, on one line."""
    printed = io.StringIO()
    with redirect_stdout(printed):
        inspect.run(str(folder), console=Console(quiet=True))
    return " ".join(printed.getvalue().split())


NORM = "model.layers.0.self_attn.q_norm.weight"
MISFITS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    (f"unused tensor {UP}_scale (and 1 more)", {f"{UP}_scale": None, f"{UP}_shift": None}, {}),
    ("q_proj.bias; config.json describes", {"model.layers.0.self_attn.q_proj.bias": None}, {}),
    (f"unused tensor {NORM}", {NORM: None}, {}),
    ("unused tensor base_model.lora_A.weight", {"base_model.lora_A.weight": None}, {}),
    ("unused tensor model.layers.1.input_layernorm.weight (and 8 more)", {}, {"num_hidden_layers": 1}),
    ("no weights for model.layers.2.input_layernorm.weight (and 8 more)", {}, {"num_hidden_layers": 3}),
    ("down_proj.weight is [32, 64], config.json makes it [32, 80]", {}, {"intermediate_size": 80}),
    (f"{UP} is of type I8; only quantised weights are", {UP: torch.ones(64, 32, dtype=torch.int8)}, {}),
    ("asks for; write tie_word_embeddings: true", {HEAD: ...}, {}),
    (f"{HEAD} is not {EMBEDDING}, but config.json says", {}, {"tie_word_embeddings": True}),
]


@pytest.mark.parametrize(("words", "tensors", "config"), MISFITS)
def test_what_does_not_fit_the_model_is_refused_by_its_first_name(
    tiny_target: Path, tmp_path: Path, words: str, tensors: dict[str, Any], config: dict[str, Any]
) -> None:
    assert words in refusal(changed(tiny_target, tmp_path, tensors, **config))


def test_an_earlier_draft_is_looked_at_before_anything_is_made(tiny_target: Path, tmp_path: Path) -> None:
    draft = changed(tiny_target, tmp_path / "draft", {UP.replace("weight", "SCB"): None})
    with pytest.raises(TargetError, match=r"unused tensor model\.layers\.0\.mlp\.up_proj\.SCB"):
        designed(tmp_path / "run", tiny_target, draft={"kind": "from", "path": str(draft)})
    assert not (tmp_path / "run" / "design" / "draft").exists()


@pytest.mark.parametrize(
    "names",
    [
        ["model.layers.0.self_attn.rotary_emb.inv_freq", "model.layers.1.self_attn.rotary_emb.inv_freq"],
        ["transformer.h.0.attn.masked_bias"],
        ["model.vision_tower.blocks.0.weight"],
        ["model.mtp_block.weight", "mtp.layers.0.weight"],
        ["model.layers.2.eh_proj.weight", "model.layers.2.mlp.up_proj.weight"],
    ],
)
def test_what_no_text_needs_is_passed_over_and_told(
    tiny_target: Path, tmp_path: Path, names: list[str]
) -> None:
    target = Target.at(changed(tiny_target, tmp_path, dict.fromkeys(names)))
    assert target.check_tensors() == names
    assert target.model("cpu").config.vocab_size == 320
    assert f"Not used of the checkpoint: {names[0]}{' and 1 more' * (len(names) - 1)}." in inspected(tmp_path)


@pytest.mark.parametrize("kept", [(EMBEDDING, HEAD), (EMBEDDING,), (HEAD,)])
def test_a_tied_model_may_name_its_matrix_once_or_twice(
    tiny_target: Path, tmp_path: Path, kept: tuple[str, ...]
) -> None:
    matrix = torch.arange(320 * 32.0).view(320, 32)
    tensors = {name: matrix.clone() if name in kept else ... for name in (EMBEDDING, HEAD)}
    target = Target.at(changed(tiny_target, tmp_path, tensors, tie_word_embeddings=True))
    assert target.check_tensors() == ([HEAD] if len(kept) == 2 else [])
    assert target.architecture.parameters == sum(p.numel() for p in target.model("cpu").parameters())


QWEN: dict[str, Any] = {"vision_config": {"depth": 1, "hidden_size": 32, "num_heads": 2}}
QWEN |= {"rope_parameters": ..., "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}}
SU = {"rope_parameters": ..., "rope_scaling": {"type": "su", **FACTORS}}
AS_ON_THE_HUB: list[dict[str, Any]] = [
    {**QWEN, "model_type": "qwen2_vl"},
    {**QWEN, "model_type": "qwen2_5_vl"},
    {**SU, "model_type": "phi3", "original_max_position_embeddings": 64},
    {"head_dim": ..., "num_key_value_heads": ...},
    {"head_dim": None, "num_key_value_heads": None, "rope_scaling": None, "quantization_config": None},
    {"dtype": ..., "torch_dtype": "bfloat16"},
    {"quantization_config": {}, "pad_token_id": 320},
    {"pad_token_id": -1, "bos_token_id": -1, "eos_token_id": -1},
    {"eos_token_id": [3, 5, -1], "pad_token_id": None},
]


@pytest.mark.parametrize("config", AS_ON_THE_HUB)
def test_a_config_as_it_lies_on_the_hub_is_inspected_and_designed_for(
    tiny_target: Path, tmp_path: Path, config: dict[str, Any]
) -> None:
    folder = changed(tiny_target, tmp_path / "t", **config)
    (folder / "model.safetensors").unlink()
    (folder / "generation_config.json").write_text('{"eos_token_id": -1, "pad_token_id": -1}')
    assert "hidden 32, feed-forward 64" in inspected(folder)
    assert load_draft(designed(tmp_path / "run", folder)[0]).config.vocab_size == 320


NTK = {"rope_type": "ntk", "factor": 4.0}
NO_MODEL = [
    ("rope type 'ntk'; must be one of default, linear", {"rope_parameters": NTK}),
    ("Field 'vocab_size' expected int, got str (value: '320')", {"vocab_size": "320"}),
    (
        "factor of the rope '2'; must be a number above 0",
        {"rope_parameters": {**NTK, "rope_type": "linear", "factor": "2"}},
    ),
    ("rope_theta of the rope 0; must be a number above 0", {"rope_parameters": {"rope_theta": 0}}),
    ("num_hidden_layers 0; must be a whole number of at least 1", {"num_hidden_layers": 0}),
    ("text of model family 'opt'", {"text_config": {"model_type": "opt"}, "model_type": "llava"}),
    ("KeyError: 'silly'", {"hidden_act": "silly"}),
]


@pytest.mark.parametrize(("words", "config"), NO_MODEL)
def test_a_config_of_no_model_is_one_line(
    tiny_target: Path, tmp_path: Path, words: str, config: dict[str, Any]
) -> None:
    with pytest.raises(TargetError) as caught:
        inspected(changed(tiny_target, tmp_path, **config))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


FAMILIES = ("llama", "phi3-longrope", "qwen2-mixed", "gemma3-text", "qwen2-vl")
CONFIGS = {name: family_config(name).to_dict() for name in FAMILIES}
FIELDS = st.sampled_from([(name, field) for name in FAMILIES for field in sorted(CONFIGS[name])])


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(FIELDS, st.sampled_from([..., None, -1, 0, 1.5, "3", [1], {"a": 1}]))
def test_no_value_of_any_field_is_a_traceback(
    tiny_target: Path, tmp_path: Path, place: tuple[str, str], value: Any
) -> None:
    folder = changed(tiny_target, tmp_path / place[0], **{**CONFIGS[place[0]], place[1]: value})
    (folder / "model.safetensors").unlink()
    with suppress(FastDraftError):
        inspected(folder)


@pytest.mark.parametrize("name", ["llama", "mistral-window", "phi3-longrope", "qwen2-mixed", "qwen3"])
def test_the_row_of_the_padding_id_learns_too(tmp_path: Path, name: str) -> None:
    config = family_config(name)
    build_draft(draft_hf_config(config, natural(read_architecture(config), 64)), 0).save_pretrained(tmp_path)
    for _ in range(2):  # of a draft, and of a checkpoint that it became
        draft = load_draft(tmp_path)
        draft(torch.tensor([[0, 1, 2]])).logits.sum().backward()
        assert (draft.get_input_embeddings().weight.grad[:3].abs().sum(1) > 0).all()
        assert draft.config.pad_token_id == 0
        draft.save_pretrained(tmp_path)


COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize("revision", [None, COMMIT])
@pytest.mark.parametrize("sharded", [False, True])
def test_a_complete_cache_serves_offline(
    tiny_target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, revision: str | None, sharded: bool
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    repository, here = tmp_path / "models--acme--tiny", Target.at(tiny_target)
    folder = Path(shutil.copytree(tiny_target, repository / "snapshots" / COMMIT))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    if sharded:
        names = load_file((folder / "model.safetensors").rename(folder / "a.safetensors"))
        index = {"metadata": {}, "weight_map": dict.fromkeys(names, "a.safetensors")}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    target = Target.at("acme/tiny", revision)
    assert target.check_tensors() == []
    assert target.files.weights([EMBEDDING])[EMBEDDING].parent == folder
    assert target.tokenizer_digest() == here.tokenizer_digest()
    assert target.model("cpu").config.vocab_size == 320
    assert target.vocabulary == here.vocabulary
    with pytest.raises(TargetError, match="the hub cannot be reached"):
        _ = Target.at("acme/other", revision).config


OTHERS = {"openvino_model.xml": "an OpenVINO model", "adapter_model.safetensors": "a LoRA adapter; must be"}
OTHERS |= {"tiny.Q4_K_M.gguf": "GGUF weights", "pytorch_model.bin": "only pickled weights"}


@pytest.mark.parametrize("name", OTHERS)
def test_weights_of_another_kind_are_called_by_their_name(
    tiny_target: Path, tmp_path: Path, name: str
) -> None:
    changed(tiny_target, tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "some.bin")
    (tmp_path / name).touch()
    with pytest.raises(TargetError, match=OTHERS[name]):
        Target.at(tmp_path).model("cpu")


def test_an_adapter_beside_the_weights_is_refused(tiny_target: Path, tmp_path: Path) -> None:
    (changed(tiny_target, tmp_path) / "adapter_config.json").touch()
    assert "adapter_config.json beside the weights; merge the adapter" in refusal(tmp_path)


@pytest.mark.parametrize("method", ["modelopt", "awq", "compressed-tensors"])
def test_a_quantisers_library_is_asked_for_without_loading(
    tiny_target: Path, tmp_path: Path, method: str
) -> None:
    quantiser = {"quant_method": method, "bits": 4, "group_size": 128}
    target = Target.at(changed(tiny_target, tmp_path, {NORM: None}, quantization_config=quantiser))
    with pytest.raises(TargetError, match=f"weights quantised by {method}; transformers must be able"):
        target.check_quantiser()
    assert target.check_tensors() == []  # a quantiser's names are its own
    Target.at(tiny_target).check_quantiser()
