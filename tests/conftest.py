"""Fixtures: a tiny random target with a real tokenizer, made once for the whole test session, offline."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models: more threads only get in each other's way

import pytest

TEXT = [
    "Once upon a time there was a small fox who lived by the river and liked to count the stars.",
    'def add(first, second):\n    """Return the sum."""\n    return first + second\n',
    "The quick brown fox jumps over the lazy dog, again and again, until the dog looks up.",
    "for index in range(10):\n    print(index, index * index)\n",
    "What is the capital of France? The capital of France is Paris, which lies on the Seine.",
]
CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m['role']=='user' %}<|user|>\n{{ m['content'] }}<|end|>\n{% elif m['role']=='assistant' %}<|assistant|>\n"
    "{{ m['content'] }}<|end|>\n{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
SPECIAL = ["<|endoftext|>", "<|user|>", "<|assistant|>", "<|end|>"]


def write_tokenizer(folder: Path, vocab_size: int = 300, chat: bool = True) -> int:
    """A byte-level BPE tokenizer trained on TEXT, saved as a user would find it; returns its length."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    options = {"special_tokens": SPECIAL, "initial_alphabet": alphabet, "show_progress": False}
    core.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=vocab_size, **options))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        eos_token="<|end|>",
        additional_special_tokens=["<|user|>", "<|assistant|>"],
    )
    if chat:
        tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    return len(tokenizer)


def write_target(
    folder: Path,
    *,
    padded_vocab: int = 320,
    hidden: int = 32,
    layers: int = 2,
    chat: bool = True,
    seed: int = 0,
) -> Path:
    """A random Llama directory whose config's vocabulary is larger than its tokenizer's."""
    import torch
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    write_tokenizer(folder, chat=chat)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=padded_vocab,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=0,
        eos_token_id=3,
        pad_token_id=0,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    with (
        torch.no_grad()
    ):  # a flat random model ties everywhere: sharpen it, so that greedy text is well defined
        model.lm_head.weight.mul_(20)
    model.generation_config = GenerationConfig(bos_token_id=0, eos_token_id=3, pad_token_id=0)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a tiny random Llama target: 320 vocabulary entries of which the tokenizer has 300, context
    256, chat template.
    """
    return write_target(tmp_path_factory.mktemp("tiny-target"))


@pytest.fixture(scope="session")
def tiny_draft(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of another random Llama with the same vocabulary, one layer."""
    return write_target(tmp_path_factory.mktemp("tiny-draft"), layers=1, hidden=16, seed=1)


@pytest.fixture(scope="session")
def near_draft(tiny_target: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny target with a little noise: a draft whose proposals are sometimes accepted."""
    import torch

    from fastdraft.modeling.drafts import save_draft
    from fastdraft.target import Target

    model = Target.at(tiny_target).model("cpu")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.add_(0.15 * weight.std() * torch.randn(weight.shape, generator=generator))
    folder = tmp_path_factory.mktemp("near") / "draft"
    save_draft(model, folder, Target.at(tiny_target))
    return folder


def _export(source: Path, folder: Path, pair: Path | None = None) -> Path:
    from fastdraft.runtimes.openvino_export import export_openvino
    from fastdraft.target import Target

    export_openvino(Target.at(source), folder, "fp32", pair=pair)
    return folder


@pytest.fixture(scope="session")
def exported_target(tiny_target: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny target as OpenVINO runs it, fp32."""
    return _export(tiny_target, tmp_path_factory.mktemp("openvino") / "target")


@pytest.fixture(scope="session")
def exported_draft(near_draft: Path, exported_target: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The near draft as OpenVINO runs it with that target, fp32."""
    return _export(near_draft, tmp_path_factory.mktemp("openvino") / "draft", exported_target)


@pytest.fixture
def small_corpus(tmp_path: Path) -> Path:
    """A JSONL corpus of 400 short documents, some of them equal."""
    path = tmp_path / "corpus.jsonl"
    lines = [json.dumps({"text": f"{TEXT[i % len(TEXT)]} Number {i % 350}. " * 3}) for i in range(400)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


RECIPE = """
run: {name: tiny, folder: FOLDER/runs, threads: 1, device: cpu, precision: fp32}
target: {model: TARGET}
design:
  draft: {kind: shape, hidden_size: 64, num_layers: 1, intermediate_size: 64, num_heads: 2, num_kv_heads: 1, tied: true}
prepare:
  row_length: 64
  validation: 0.1
  corpora:
  - {name: text, kind: jsonl, path: FOLDER/text.jsonl, tokens: 20k}
  - {name: code, kind: source_code, path: FOLDER/code, tokens: 8k}
pretrain: {tokens: 8k, mixture: {text: 1}, TRAINING}
continue_pretrain: {tokens: 8k, mixture: {code: 2, text: 1}, TRAINING}
synthesize:
  tokens: 4k
  temperatures: [0, 0.6, 1.0]
  max_new_tokens: 24
  batch_rows: 16
  engine: {kind: huggingface}  # needs no converting: seconds on one core, and the same everywhere
  prompts:
  - {kind: jsonl, name: instructions, path: FOLDER/prompts.jsonl, share: 2}
  - {kind: magpie, name: magpie, share: 1}
  - {kind: corpus, name: code, corpus: code, share: 1, prompt_tokens: [8, 24]}
align: {tokens: 6k, TRAINING}
evaluate:
  tasks: [{kind: file, name: own, path: FOLDER/tasks.jsonl, chat: true, max_new_tokens: 16}]
  temperatures: [0, 0.6]
  num_speculative_tokens: [1, 2, 3]
  exact: {num_speculative_tokens: [3], prompts: 3}
export: {num_speculative_tokens: 3}
report: {}
"""
TRAINING = """batch_tokens: 512, checkpoint_every: 5, validate_every: 10, optimizer: {kind: muon, learning_rate: 0.003}"""


def _write_rows(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_recipe(folder: Path, target: Path, **changes: object) -> Path:
    """A recipe through every stage for a tiny target: seconds on one core. `changes` replaces whole
    sections.
    """
    import yaml

    _write_rows(folder / "text.jsonl", [{"text": f"{TEXT[i % 5]} Number {i}. " * 4} for i in range(300)])
    _write_rows(folder / "prompts.jsonl", [{"prompt": f"What is {i} plus {i * 7 % 13}?"} for i in range(80)])
    tasks = [{"id": f"t{i}", "prompt": f"Tell me about number {i} and the fox."} for i in range(6)]
    _write_rows(folder / "tasks.jsonl", tasks)
    (folder / "code").mkdir(exist_ok=True)
    for i in range(60):
        text = f"def function_{i}(value):\n    return value + {i}\n" * 8
        (folder / "code" / f"module_{i}.py").write_text(text, encoding="utf-8")
    text = RECIPE.replace("FOLDER", str(folder)).replace("TARGET", str(target)).replace("TRAINING", TRAINING)
    recipe = {**yaml.safe_load(text), **changes}
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    return path


@pytest.fixture
def tiny_recipe(tmp_path: Path, tiny_target: Path) -> Path:
    """A recipe file through every stage for the tiny target."""
    return write_recipe(tmp_path, tiny_target)


@pytest.fixture(scope="session")
def short_run(tmp_path_factory: pytest.TempPathFactory, tiny_target: Path) -> Path:
    """The recipe of a finished run: few steps, few units, several checkpoints of each kind. Its folder is not
    to be changed.
    """
    import yaml

    from fastdraft import pipeline
    from fastdraft.recipe.recipe import load_recipe

    path = write_recipe(tmp_path_factory.mktemp("short-run"), tiny_target)
    value = yaml.safe_load(path.read_text(encoding="utf-8"))
    short = {"tokens": "1536", "batch_tokens": 256, "checkpoint_every": 2, "validate_every": 3}
    for stage in ("pretrain", "align"):
        value[stage].update(short)
    del value["continue_pretrain"], value["report"]
    value["prepare"]["corpora"][0]["tokens"] = "6k"
    tokens = {"tokens": 250, "max_new_tokens": 12}
    value["synthesize"].update({**tokens, "batch_rows": 8, "temperatures": [0, 1.0]})
    exact = {"num_speculative_tokens": [2], "prompts": 2}
    value["evaluate"].update({"temperatures": [0.6], "num_speculative_tokens": [2], "exact": exact})
    path.write_text(yaml.safe_dump(value), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        _watch_forbidden(patch)
        pipeline.run(load_recipe(str(path)))
    return path


FORBIDDEN: list[str] = []
"""Connections opened and pickles read while `short_run` was made."""


def _watch_forbidden(patch: pytest.MonkeyPatch) -> None:
    import pickle
    import socket

    import torch

    for owner, name in (
        (socket.socket, "connect"),
        (socket, "getaddrinfo"),
        (pickle, "load"),
        (pickle, "loads"),
        (torch, "load"),
    ):

        def watched(
            *arguments: object,
            real: object = getattr(owner, name),
            told: str = f"{owner.__name__}.{name}",
            **named: object,
        ) -> object:
            FORBIDDEN.append(told)
            return real(*arguments, **named)  # type: ignore[operator]

        patch.setattr(owner, name, watched)


@pytest.fixture(scope="module")
def near(tiny_target: Path) -> Any:
    """A draft that often agrees: the target with some noise in its head."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_target, dtype=torch.float32).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        model.lm_head.weight.add_(torch.randn_like(model.lm_head.weight) * 0.25 * model.lm_head.weight.std())
    return model
