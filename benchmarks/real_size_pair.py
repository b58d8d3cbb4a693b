"""Real acceptance at real sizes: grows a trained pair without changing its outputs, compresses and times it.

    fastdraft run starter
    python benchmarks/real_size_pair.py --draft runs/starter/export/huggingface --output real-size

Grows the target to about a billion parameters and the draft to the shape published as 50 M, writes
OUTPUT/recipe.yaml and runs it: export to OpenVINO (int4 target, int8 draft), benchmark, report. Acceptance is
then that of the trained pair, latency and memory those of the larger shapes. Needs 12 GB of memory and leaves
3 GB on the disk. What is grown already is taken again.

The mathematics, r = old width / new width:
  width    new channels of the residual stream are always zero: embedding columns, and rows of o_proj and
  down_proj. RMSNorm then sees
           a mean of squares r times as large, so its weights are times sqrt(r) and its eps times r.
  heads    head_dim stays. A query head stays with its key-value head, which is copied where it served more
  queries than the new ratio
           allows. A new head adds nothing: o_proj does not read it, or its values are zero.
  neurons  a new one adds nothing: down_proj does not read it, or its up_proj row is zero.
  layers   new ones, behind the trained ones, have new heads and neurons only.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import shutil
import subprocess
import sys
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig

from fastdraft.target import Target

ROOT = Path(__file__).resolve().parents[1]
STARTER = ROOT / "src/fastdraft/shipped/targets/starter"
HEADS = ("num_attention_heads", "num_key_value_heads")
SIZES = ("hidden_size", "num_hidden_layers", "intermediate_size", *HEADS)
TARGET_SHAPE = (2048, 22, 5632, 32, 8)
DRAFT_SHAPE = (512, 6, 1408, 8, 8)
FAMILIES = ("llama", "mistral", "qwen3")
GROUP = 128  # weights that share a scale in int4: trained entries stay in their groups
TOLERANCE = 1e-4  # of the largest logit; float32 sums of other lengths differ by about 1e-6
RECORD = "growth.json"


@dataclass(frozen=True)
class Axis:
    """Where the trained entries of an axis lie in the larger one."""

    places: Tensor  # in the larger axis [n]
    entries: Tensor  # of the source [n]; some more than once where key-value heads are copied
    dead: Tensor  # bool [size]: new entries held at zero, so that what reads them may hold any values


def head_places(old: PreTrainedConfig, new: PreTrainedConfig) -> tuple[list[int], list[int]]:
    """New place of every query head, and for the first new key-value heads the source's that they copy."""
    group = old.num_attention_heads // old.num_key_value_heads
    new_group = new.num_attention_heads // new.num_key_value_heads
    places: list[int] = []
    copies: list[int] = []
    for kv_head in range(old.num_key_value_heads):
        for start in range(0, group, new_group):
            places += [len(copies) * new_group + i for i in range(min(new_group, group - start))]
            copies.append(kv_head)
    return places, copies


def find_axes(old: PreTrainedConfig, new: PreTrainedConfig, trained: bool) -> dict[str, Axis]:
    """Every axis of a matrix.

    Every other block of 128 new neurons and every other new key-value head is dead, so that no matrix of a
    new layer is all zeros: equal matrices would be stored as one, which would flatter the latency.
    """
    queries, copies = head_places(old, new) if trained else ([], [])
    group, width = new.num_attention_heads // new.num_key_value_heads, old.head_dim
    inner, kv_heads = torch.arange(new.intermediate_size), torch.arange(new.num_key_value_heads)
    dead_inner = (inner >= (old.intermediate_size if trained else 0)) & (inner // GROUP % 2 == 0)
    dead_kv = (kv_heads >= len(copies)) & (kv_heads % 2 == 0)

    def first(size: int, new_size: int, dead: Tensor | None = None) -> Axis:
        places = torch.arange(size if trained else 0)
        return Axis(places, places, torch.zeros(new_size, dtype=torch.bool) if dead is None else dead)

    def heads(where: Sequence[int], of: Sequence[int], dead: Tensor) -> Axis:
        spread = [
            (torch.tensor(list(x), dtype=torch.long)[:, None] * width + torch.arange(width)).flatten()
            for x in (where, of)
        ]
        return Axis(*spread, dead.repeat_interleave(width))

    return {
        "vocab": first(old.vocab_size, new.vocab_size),
        "hidden": first(old.hidden_size, new.hidden_size),
        "inner": first(old.intermediate_size, new.intermediate_size, dead_inner),
        "query": heads(queries, range(len(queries)), dead_kv.repeat_interleave(group)),
        "kv": heads(range(len(copies)), copies, dead_kv),
    }


AXES = {
    "embed_tokens": ("vocab", "hidden"), "lm_head": ("vocab", "hidden"),
    "q_proj": ("query", "hidden"), "k_proj": ("kv", "hidden"), "v_proj": ("kv", "hidden"), "o_proj": ("hidden", "query"),
    "gate_proj": ("inner", "hidden"), "up_proj": ("inner", "hidden"), "down_proj": ("hidden", "inner"),
}  # fmt: skip


def grow_tensor(
    name: str, source: Tensor, axes: dict[str, Axis], norm_scale: float, dtype: torch.dtype
) -> Tensor:
    """The larger tensor: trained values in their places, else zeros or random values that no output sees."""
    module = name.split(".")[-2]
    if module in ("input_layernorm", "post_attention_layernorm", "norm"):
        grown = torch.full((len(axes["hidden"].dead),), float(source.mean()) * norm_scale)
        grown[axes["hidden"].places] = source[axes["hidden"].entries] * norm_scale
        return grown  # float32: sqrt(r) is seldom a half-precision number
    if module not in AXES:  # norms inside a head: heads are not changed
        return source.clone()
    rows, columns = (axes[axis] for axis in AXES[module])
    placed = source[rows.entries][:, columns.entries]
    grown = torch.zeros(len(rows.dead), len(columns.dead), dtype=dtype)
    # To the residual stream: zero beside the trained values.
    writes = module in ("embed_tokens", "o_proj", "down_proj")
    if not writes or columns.dead.any():
        # Random values of the matrix's own scale, inside the range of the trained values of the same row (of
        # its
        # last group), so that the scales of int8 rows and int4 groups stay.
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        low, high = torch.full((len(grown), 1), -math.inf), torch.full((len(grown), 1), math.inf)
        if placed.numel():
            shared = placed[:, -(placed.shape[1] % GROUP) :]
            low[rows.places], high[rows.places] = shared.amin(1, keepdim=True), shared.amax(1, keepdim=True)
        values = torch.empty(grown.shape).normal_(0.0, float(source.std(correction=0)), generator=generator)
        grown.copy_(values.clamp_(low, high))
        if writes:
            grown[:, ~columns.dead] = 0
        if module in ("v_proj", "up_proj"):  # what makes dead entries
            grown[rows.dead] = 0
    grown[rows.places[:, None], columns.places] = placed.to(dtype)
    return grown


def grown_config(old: PreTrainedConfig, sizes: Sequence[int], dtype: torch.dtype) -> PreTrainedConfig:
    """The source's config in the larger shape; ends the program in one line for a shape that cannot be."""
    new = copy.deepcopy(old)
    for name, size in zip(SIZES, sizes, strict=True):
        if size < (least := getattr(old, name)):
            sys.exit(f"real_size_pair: {name} {size}: must not be smaller than the source's {least}")
        setattr(new, name, size)
    if old.model_type not in FAMILIES or getattr(old, "attention_bias", False):
        sys.exit(f"real_size_pair: {old.model_type}: must be {', '.join(FAMILIES)}, without biases")
    heads, kv_heads = new.num_attention_heads, new.num_key_value_heads
    if heads % kv_heads or len(head_places(old, new)[1]) > kv_heads:
        sys.exit(f"real_size_pair: {kv_heads} key-value heads do not fit {heads} heads: give more")
    new.tie_word_embeddings, new.dtype = False, dtype
    new.rms_norm_eps = old.rms_norm_eps * old.hidden_size / new.hidden_size
    if getattr(old, "layer_types", None):
        more = ["full_attention"] * (new.num_hidden_layers - old.num_hidden_layers)
        new.layer_types = [*old.layer_types, *more]
    return new


@torch.inference_mode()
def grow(source: Path, folder: Path, sizes: Sequence[int], dtype: torch.dtype) -> None:
    """Writes the larger model once its logits are found equal; takes one that stands if it is the same."""
    record, path = {"source": source.name, "sizes": list(sizes), "dtype": str(dtype)}, folder / RECORD
    if path.is_file():
        if json.loads(path.read_text()) != record:
            sys.exit(f"real_size_pair: {folder}: grown from something else; name another --output")
        print(f"{folder}: already grown", file=sys.stderr)
        return
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    old, weights = model.config, {name: tensor.float() for name, tensor in model.state_dict().items()}
    old.head_dim = getattr(old, "head_dim", None) or old.hidden_size // old.num_attention_heads
    new, tensors = grown_config(old, sizes, dtype), {}
    axes = {trained: find_axes(old, new, trained) for trained in (True, False)}
    scale = math.sqrt(old.hidden_size / new.hidden_size)
    with torch.device("meta"):
        larger = AutoModelForCausalLM.from_config(new).eval()
    for name in larger.state_dict():
        parts = name.split(".")
        trained = "layers" not in parts or int(parts[2]) < old.num_hidden_layers
        like = name if trained else ".".join([*parts[:2], str(old.num_hidden_layers - 1), *parts[3:]])
        tensors[name] = grow_tensor(name, weights[like], axes[trained], scale, dtype)
    larger.load_state_dict(tensors, assign=True)
    larger.generation_config = model.generation_config
    unfinished = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    larger.save_pretrained(unfinished)
    Target.at(source).copy_tokenizer(unfinished)
    del larger, tensors
    difference, largest = compare(model, unfinished, dtype)
    if not difference <= TOLERANCE * max(1.0, largest):
        shutil.rmtree(unfinished)
        sys.exit(
            f"real_size_pair: logits differ by {difference:.2g} of {largest:.2g}: a fault of this script"
        )
    (unfinished / RECORD).write_text(json.dumps(record))
    unfinished.rename(folder)
    print(f"{folder}: logits up to {largest:.1f} changed by {difference:.1e}", file=sys.stderr)


def compare(model: Any, folder: Path, dtype: torch.dtype) -> tuple[float, float]:
    """Largest difference of float32 logits, and largest logit; the source's matrices rounded as the
    others.
    """
    tokens = torch.randint(model.config.vocab_size, (4, 48), generator=torch.Generator().manual_seed(0))
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.copy_(parameter.to(dtype))
    logits = model(input_ids=tokens).logits
    larger = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return float((larger(input_ids=tokens).logits - logits).abs().max()), float(logits.abs().max())


def recipe(given: argparse.Namespace) -> dict[str, Any]:
    """What runs on the grown pair: an ordinary recipe."""
    output, weights = given.output.resolve(), dict(zip(("target", "draft"), given.weights, strict=True))
    answers = {"max_new_tokens": given.max_new_tokens}
    tasks = [{"kind": kind, **answers} for kind in ("code", "text", "instructions")]
    benchmark = {"weights": [weights], "tasks": tasks, "prompts": given.prompts}
    return {
        "run": {"name": "run", "folder": str(output), "threads": given.threads},
        "target": {"model": str(output / "target")},
        "design": {"draft": {"kind": "from", "path": str(output / "draft")}},
        "export": {"formats": ["huggingface", "openvino"], "openvino": dict(weights)},
        "benchmark": {**benchmark, "num_speculative_tokens": given.num_speculative_tokens},
        "report": {},
    }


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    names = ("HIDDEN", "LAYERS", "FFN", "HEADS", "KV_HEADS")
    shape: dict[str, Any] = {"type": int, "nargs": 5, "metavar": names}
    weights: dict[str, Any] = {"nargs": 2, "default": ["int4", "int8"], "metavar": ("TARGET", "DRAFT")}
    add = parser.add_argument
    add("--target", type=Path, default=STARTER, help="the trained target (default: the shipped starter)")
    add("--draft", type=Path, required=True, help="the draft trained for it: a Hugging Face directory")
    add("--output", type=Path, required=True, help="folder of the grown models, the recipe and its run")
    add("--target-shape", default=TARGET_SHAPE, help="default 1.03 B parameters", **shape)
    add("--draft-shape", default=DRAFT_SHAPE, help="default: published as 50 M", **shape)
    add("--weights", help="deployed precisions", **weights)
    add("--prompts", type=int, default=8, help="of each task (default 8)")
    add("--max-new-tokens", type=int, default=96, help="of each answer (default 96)")
    add("--num-speculative-tokens", type=int, nargs="+", default=[1, 2, 3, 4, 5, 6], metavar="K")
    add("--threads", type=int, default=0, help="CPU threads of torch; 0 leaves its own choice")
    add("--until", choices=("grow", "export", "run"), default="run", help="stop behind this")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    given = parse(arguments)
    given.output.mkdir(parents=True, exist_ok=True)
    grow(given.target, given.output / "target", given.target_shape, torch.float16)
    # float32, so that int8 rounds the very weights that were trained: fp16 moved 0.4 % of greedy tokens.
    grow(given.draft, given.output / "draft", given.draft_shape, torch.float32)
    path = given.output / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe(given), sort_keys=False), encoding="utf-8")
    for verb in {"grow": [], "export": ["design", "export"], "run": ["run"]}[given.until]:
        if code := subprocess.call([sys.executable, "-m", "fastdraft", verb, str(path)]):
            return code
    return 0


if __name__ == "__main__":
    sys.exit(main())
