"""Fixtures: a tiny random target with a real tokenizer, made once for the whole test session, offline."""

from __future__ import annotations

import json
import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest

TEXT = [
    "Once upon a time there was a small fox who lived by the river and liked to count the stars.",
    "def add(first, second):\n    \"\"\"Return the sum.\"\"\"\n    return first + second\n",
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
    core.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<|endoftext|>", pad_token="<|endoftext|>", eos_token="<|end|>", additional_special_tokens=["<|user|>", "<|assistant|>"]
    )
    if chat:
        tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    return len(tokenizer)


def write_target(folder: Path, *, padded_vocab: int = 320, hidden: int = 32, layers: int = 2, chat: bool = True, seed: int = 0) -> Path:
    """A random Llama directory whose config's vocabulary is larger than its tokenizer's."""
    import torch
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    write_tokenizer(folder, chat=chat)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=padded_vocab, hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, bos_token_id=0, eos_token_id=3, pad_token_id=0, tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    with torch.no_grad():  # a flat random model ties everywhere: sharpen it so that greedy text is well defined
        model.lm_head.weight.mul_(20)
    model.generation_config = GenerationConfig(bos_token_id=0, eos_token_id=3, pad_token_id=0)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a tiny random Llama target: 320 vocabulary entries of which the tokenizer has 300, context 256, chat template."""
    return write_target(tmp_path_factory.mktemp("tiny-target"))


@pytest.fixture(scope="session")
def tiny_draft(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of another random Llama with the same vocabulary, one layer."""
    return write_target(tmp_path_factory.mktemp("tiny-draft"), layers=1, hidden=16, seed=1)


@pytest.fixture
def small_corpus(tmp_path: Path) -> Path:
    """A JSONL corpus of 400 short documents, some of them equal."""
    path = tmp_path / "corpus.jsonl"
    lines = [json.dumps({"text": f"{TEXT[i % len(TEXT)]} Number {i % 350}. " * 3}) for i in range(400)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path
