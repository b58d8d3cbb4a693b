"""Tiny GGUF models: a Llama with random weights in float32 and a byte-level vocabulary of 260 tokens."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from gguf import GGUFWriter, TokenType

SIZE, HIDDEN, LAYERS, HEADS, MIDDLE, CONTEXT = 260, 32, 2, 2, 64, 512
BOS, EOS = 256, 257


def byte_letters() -> list[str]:
    """How GPT-2's byte-level vocabularies write every byte: printable ones as they are."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in plain else chr(next(others)) for byte in range(256)]


def write_gguf(path: Path, seed: int = 0, *, noise: float = 0.0, size: int = SIZE, eos: int = EOS) -> Path:
    """A model by its seed; `noise` moves every weight, so that a draft agrees with its target now and then."""
    random, moved = np.random.default_rng(seed), np.random.default_rng(99)
    writer = GGUFWriter(path, "llama")
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(MIDDLE)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    special = ["<s>", "</s>", "ab", *(f"<extra{number}>" for number in range(size - 259))]
    writer.add_token_list([*byte_letters(), *special])
    writer.add_token_types(
        [TokenType.NORMAL if len(text) < 3 else TokenType.CONTROL for text in [*byte_letters(), *special]]
    )
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(BOS)
    writer.add_eos_token_id(eos)
    writer.add_add_bos_token(False)
    shapes = {"token_embd.weight": (size, HIDDEN), "output.weight": (size, HIDDEN)}
    for layer in range(LAYERS):
        shapes |= {f"blk.{layer}.attn_{name}.weight": (HIDDEN, HIDDEN) for name in ("q", "k", "v", "output")}
        shapes |= {f"blk.{layer}.ffn_{name}.weight": (MIDDLE, HIDDEN) for name in ("gate", "up")}
        shapes |= {f"blk.{layer}.ffn_down.weight": (HIDDEN, MIDDLE)}
    for name, shape in shapes.items():
        weights = random.standard_normal(shape) * (1.0 if shape[0] == size else 0.3)
        writer.add_tensor(name, (weights + noise * moved.standard_normal(shape)).astype(np.float32))
    norms = [f"blk.{layer}.{name}_norm.weight" for layer in range(LAYERS) for name in ("attn", "ffn")]
    for name in [*norms, "output_norm.weight"]:
        writer.add_tensor(name, np.ones(HIDDEN, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
