"""A GGUF file as a target: made once into a Hugging Face directory in a cache, which may be thrown away.

Config and tokenizer are made at once; the weights when they are asked for, dequantised: quantised ones to
fp16, the others as they are. Greedy text is therefore not exactly that of llama.cpp, which also rounds what
it multiplies them with.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from huggingface_hub import hf_hub_download
from safetensors.torch import save_file
from torch import Tensor

from fastdraft.errors import TargetError
from fastdraft.modeling.gguf_files import SUFFIX, GGUFFile, GGUFTensor, part_names, read_gguf, require_gguf
from fastdraft.modeling.gguf_names import (
    ARCHITECTURES,
    ROPE_FREQS,
    ROPE_LONG,
    ROPE_SHORT,
    has_shifted_norms,
    hugging_face_name,
    is_turned,
    llama3_rope,
    to_halves,
)
from fastdraft.modeling.gguf_tokenizer import end_ids, tokenizer_files
from fastdraft.modeling.model_files import Header, ModelFiles, one_line
from fastdraft.run_folder import atomic_folder, atomic_path, write_json

_LAYOUT = 1  # of the cache: a release that reads files otherwise makes its directories anew
_ON_HUB = re.compile(r"([\w.-]+/[\w.-]+):(.+\.gguf)", re.IGNORECASE)
_INDEX = "model.safetensors.index.json"
_SHARD_BYTES = 2 << 30
_CHUNK = 1 << 22  # weights dequantised at a time: the library needs several times their size
# Numbers of types that are not quantised.
_PLAIN = {0: torch.float32, 1: torch.float16, 30: torch.bfloat16}
_WORDS = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
# Layers of the two models whose scores are scaled by the hidden size, as llama.cpp tells them apart.
_SCALED_BY_HIDDEN = {"gemma2": 46, "gemma3": 62}


def open_gguf(location: str, revision: str | None = None) -> GGUFFile | None:
    """The file that a location names, on this machine or as OWNER/REPO:FILE.gguf; None for other models."""
    path = Path(location)
    if path.is_file():
        return read_gguf(path)
    if path.is_dir():
        inside = sorted(path.glob(f"*{SUFFIX}")) if not (path / "config.json").is_file() else []
        if inside:
            found = f"{location}: a directory with {len(inside)} GGUF file(s) and no config.json"
            raise TargetError(found, f"name the file, for example {inside[0]}")
        return None
    if not location.lower().endswith(SUFFIX):
        return None
    match = _ON_HUB.fullmatch(location)
    if not match:
        rule = "no such file; a GGUF target is FILE.gguf or OWNER/REPO:FILE.gguf of the hub"
        raise TargetError(f"{location}: {rule}", "correct the path")
    with one_line(location):
        found_at = [hf_hub_download(match[1], name, revision=revision) for name in part_names(match[2])]
    return read_gguf(Path(found_at[0]))


def as_directory(file: GGUFFile) -> Path:
    """The Hugging Face directory of a file, made where it is not there yet: config and tokenizer."""
    root = Path(os.environ.get("FASTDRAFT_CACHE") or Path.home() / ".cache" / "fastdraft").expanduser()
    folder = root / "gguf" / f"{file.path.stem}-{file.digest[:12]}-{_LAYOUT}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):  # of several processes one makes it
        if (folder / "config.json").is_file():
            return folder
        config = hugging_face_config(file)
        ids = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
        texts = tokenizer_files(file)
        with atomic_folder(folder) as temporary:
            for name, text in texts.items():
                (temporary / name).write_text(text, encoding="utf-8")
            write_json(temporary / "generation_config.json", ids)
            write_json(temporary / "config.json", config)
    return folder


class GGUFModelFiles(ModelFiles):
    """The directory made of a GGUF file; its weights are written when somebody needs them."""

    def __init__(self, file: GGUFFile, folder: str) -> None:
        super().__init__(folder)
        self.gguf, self.where = file, str(file.path)

    def header(self) -> Header:
        """As the weights will be written."""
        return {name: (_WORDS[_dtype(tensor)], tensor.shape) for name, tensor in _weights(self.gguf)}

    def weights(self, names: Sequence[str] = ()) -> dict[str, Path]:
        self.make_weights()
        return super().weights(names)

    def check_weights(self) -> None:
        """They are in the file."""

    def make_weights(self) -> None:
        folder = Path(self.location)
        with FileLock(f"{folder}.lock"):
            if not (folder / _INDEX).is_file():
                _write_weights(self.gguf, folder)


def hugging_face_config(file: GGUFFile) -> dict[str, Any]:
    """config.json of a supported architecture."""
    architecture = file.value("general.architecture")
    if architecture not in ARCHITECTURES:
        rule = f"must be one of {', '.join(ARCHITECTURES)}"
        fix = "choose another model, or take it as a Hugging Face directory"
        raise file.wrong(f"architecture {architecture!r}; {rule}", fix)
    for name in file.tensors:
        if hugging_face_name(architecture, name) is None and not name.startswith("rope_f"):
            found = f"tensor {name} has no place in a {ARCHITECTURES[architecture]}"
            raise file.wrong(found, "take the model as a Hugging Face directory")
    if "token_embd.weight" not in file.tensors:
        raise file.wrong("no token_embd.weight; a language model has an embedding", "name the model's file")
    rows, tokens = file.tensors["token_embd.weight"].shape[0], file.value("tokenizer.ggml.tokens")
    if tokens is not None and rows != len(tokens):
        raise file.wrong(f"{rows} rows of the embedding, {len(tokens)} tokens; must be as many")
    depth, listed = (
        _number(file, "block_count"),
        {name.split(".")[1] for name in file.tensors if name[:4] == "blk."},
    )
    if depth != len(listed):
        raise file.wrong(f"{len(listed)} layers of tensors, block_count {depth}; must be as many")
    heads, hidden = _number(file, "attention.head_count"), _number(file, "embedding_length")
    rotary = _number(file, "rope.dimension_count", hidden // heads)
    wide = rotary if architecture == "llama" else hidden // heads
    head_dim = _number(file, "attention.key_length", wide)
    matrices = [tensor for tensor in file.tensors.values() if len(tensor.shape) > 1]
    pad, ends = file.value("tokenizer.ggml.padding_token_id"), end_ids(file)
    return {
        "model_type": ARCHITECTURES[architecture],
        "vocab_size": rows,
        "hidden_size": hidden,
        "intermediate_size": _number(file, "feed_forward_length"),
        "num_hidden_layers": depth,
        "num_attention_heads": heads,
        "num_key_value_heads": _number(file, "attention.head_count_kv", heads),
        "max_position_embeddings": _number(file, "context_length"),
        "rms_norm_eps": float(file.value("{arch}.attention.layer_norm_rms_epsilon", 1e-5)),
        "bos_token_id": file.value("tokenizer.ggml.bos_token_id"),
        "eos_token_id": ends[0] if len(ends) == 1 else ends or None,
        "pad_token_id": pad if pad is None or pad < rows else None,
        "tie_word_embeddings": "output.weight" not in file.tensors,
        # Accelerators overflow in fp16 where a model was trained in bf16.
        "dtype": "float32" if all(tensor.kind == 0 for tensor in matrices) else "bfloat16",
        **_of_family(file, head_dim, rotary),
    }


def _number(file: GGUFFile, key: str, default: int | None = None) -> int:
    """A count that is one for all layers."""
    value = file.value(f"{{arch}}.{key}", default)
    values = set(value) if isinstance(value, list) else {value}
    if len(values) != 1:
        raise file.wrong(f"{key} differs between layers; must be one number", "choose another model")
    [number] = values
    if type(number) is not int or number < 1:
        raise file.wrong(f"{key} {number}; must be a count")
    return number


def _of_family(file: GGUFFile, head_dim: int, rotary: int) -> dict[str, Any]:
    """What only some families have."""
    architecture, theta = file.value("general.architecture"), file.value("{arch}.rope.freq_base", 10_000.0)
    rope = _rope(file, float(theta), head_dim)
    window = file.value("{arch}.attention.sliding_window") or None  # converters write 0 for none
    hidden, heads = _number(file, "embedding_length"), _number(file, "attention.head_count")
    if architecture in ("qwen2", "phi3") and head_dim * heads != hidden:
        raise file.wrong(
            f"heads of {head_dim}; must be the hidden size by their number", "choose another model"
        )
    if architecture == "phi3":
        whole = _number(file, "context_length")
        first = file.value("{arch}.rope.scaling.original_context_length", whole)
        rope["partial_rotary_factor"] = rotary / head_dim
        return {"rope_parameters": rope, "original_max_position_embeddings": first, "sliding_window": window}
    values: dict[str, Any] = {"rope_parameters": rope, "head_dim": head_dim}
    if architecture == "qwen2":
        del values["head_dim"]
    elif architecture == "llama":
        values["attention_bias"] = "blk.0.attn_q.bias" in file.tensors
        values["mlp_bias"] = "blk.0.ffn_gate.bias" in file.tensors
    if architecture.startswith("gemma"):
        values["hidden_activation"] = "gelu_pytorch_tanh"
    if architecture in _SCALED_BY_HIDDEN:
        by_hidden = _number(file, "block_count") == _SCALED_BY_HIDDEN[architecture]
        values["query_pre_attn_scalar"] = hidden // heads if by_hidden else head_dim
        values["sliding_window"] = window
        for name in ("attn", "final"):
            values[f"{name}_logit_softcapping"] = file.value(f"{{arch}}.{name}_logit_softcapping")
    if architecture == "gemma3":
        local = float(file.value("{arch}.rope.freq_base_swa", 10_000.0))
        near = {"rope_type": "default", "rope_theta": local}
        values["rope_parameters"] = {"full_attention": rope, "sliding_attention": near}
    return values


def _rope(file: GGUFFile, theta: float, head_dim: int) -> dict[str, Any]:
    """The rope's settings, from keys and from the factors that some files hold as tensors."""

    def scaling(key: str, default: Any = None) -> Any:
        return file.value(f"{{arch}}.rope.scaling.{key}", default)

    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": theta}
    if ROPE_FREQS in file.tensors:
        found = llama3_rope(read_tensor(file, file.tensors[ROPE_FREQS]).float(), theta, head_dim)
        if found is None:
            rule = "factors that are not of Llama 3's kind"
            raise file.wrong(f"{ROPE_FREQS}: {rule}", "take the model as a Hugging Face directory")
        return found
    if ROPE_LONG in file.tensors and ROPE_SHORT in file.tensors:
        for name, tensor in (("long_factor", ROPE_LONG), ("short_factor", ROPE_SHORT)):
            rope[name] = read_tensor(file, file.tensors[tensor]).tolist()
        factor = scaling("attn_factor")
        return rope | {"rope_type": "longrope"} | ({"attention_factor": factor} if factor else {})
    kind = scaling("type", "none")
    if kind == "none" or not scaling("factor"):
        return rope
    if kind not in ("linear", "yarn"):
        raise file.wrong(f"rope.scaling.type {kind!r}; must be none, linear or yarn", "choose another model")
    rope |= {"rope_type": kind, "factor": float(scaling("factor"))}
    if kind == "yarn":
        rope["original_max_position_embeddings"] = scaling("original_context_length")
        for name in ("beta_fast", "beta_slow"):
            if (value := scaling(f"yarn_{name}")) is not None:
                rope[name] = value
    return rope


def _weights(file: GGUFFile) -> Iterator[tuple[str, GGUFTensor]]:
    """The name in transformers and the tensor of every weight."""
    architecture = file.value("general.architecture")
    for name, tensor in file.tensors.items():
        place = hugging_face_name(architecture, name)
        if place is not None:
            yield place, tensor


def _dtype(tensor: GGUFTensor) -> torch.dtype:
    return _PLAIN.get(tensor.kind, torch.float16)


def read_tensor(file: GGUFFile, tensor: GGUFTensor) -> Tensor:
    """A tensor as it lies in the file, dequantised."""
    raw, dtype = tensor.raw(), _dtype(tensor)
    if tensor.kind in _PLAIN:
        return torch.from_numpy(np.array(raw)).view(dtype).reshape(tensor.shape)
    gguf, found = require_gguf(), torch.empty(tensor.shape, dtype=dtype).flatten(0, -2)
    kind, step = gguf.GGMLQuantizationType(tensor.kind), max(1, _CHUNK // tensor.shape[-1])
    for row in range(0, len(raw), step):
        try:
            found[row : row + step] = torch.from_numpy(gguf.dequantize(np.array(raw[row : row + step]), kind))
        except NotImplementedError as error:
            fix = "take another quantisation of the model"
            raise file.wrong(f"{tensor.name} is of type {kind.name}, which gguf cannot read", fix) from error
    if not found.isfinite().all():
        raise file.wrong(f"{tensor.name} holds NaN, infinity or weights beyond fp16")
    return found.reshape(tensor.shape)


def _write_weights(file: GGUFFile, folder: Path) -> None:
    """All weights as safetensors, in shards; the index is written last and says that they are all there."""
    architecture = file.value("general.architecture")
    heads = {"q": _number(file, "attention.head_count")}
    heads["k"] = _number(file, "attention.head_count_kv", heads["q"])
    places: dict[str, str] = {}
    shard: dict[str, Tensor] = {}

    def write() -> None:
        name = f"model-{len(set(places.values())) + 1:05d}.safetensors"
        with atomic_path(folder / name) as temporary:
            save_file(shard, temporary, metadata={"format": "pt"})
        places.update(dict.fromkeys(shard, name))
        shard.clear()

    for place, tensor in _weights(file):
        weight = read_tensor(file, tensor)
        if is_turned(architecture, tensor.name):
            weight = to_halves(weight, heads["q" if ".attn_q." in tensor.name else "k"])
        if has_shifted_norms(architecture) and tensor.name.endswith("norm.weight"):
            weight = weight - 1
        if shard and sum(each.nbytes for each in shard.values()) + weight.nbytes > _SHARD_BYTES:
            write()
        shard[place] = weight.contiguous()
    write()
    total = sum(path.stat().st_size for path in folder.glob("model-*.safetensors"))
    text = json.dumps({"metadata": {"total_size": total}, "weight_map": places}, indent=1)
    with atomic_path(folder / _INDEX) as temporary:
        temporary.write_text(text, encoding="utf-8")
