"""The models that training steps are measured on: three for a CPU, the two published drafts for a GPU, one for a dry run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Shape:
    """A draft, its rows, and the tokens of one optimiser step."""

    family: str
    vocab: int
    hidden: int
    layers: int
    heads: int
    ffn: int
    tied: bool
    length: int
    batch: int

    def flops_per_token(self, model: nn.Module) -> float:
        """Useful operations of forward and backward: 6 for every weight of a matrix product, and causal attention."""
        matrices = sum(module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear))
        return 6.0 * matrices + 6.0 * self.layers * self.hidden * self.length


SHAPES = {
    "tiny": Shape("llama", 512, 32, 2, 2, 64, True, 64, 256),
    "1.5m": Shape("llama", 8192, 128, 2, 2, 384, True, 512, 16_384),
    "7m": Shape("llama", 16_384, 256, 4, 4, 704, True, 512, 16_384),
    "27m": Shape("llama", 8192, 512, 6, 8, 1408, False, 512, 8_192),
    "phi-3-mini-50m": Shape("phi3", 32_064, 512, 6, 8, 1408, False, 2048, 262_144),
    "llama-3.1-8b-150m": Shape("llama", 128_256, 512, 6, 8, 1792, False, 2048, 524_288),
}


def build_model(shape: Shape, seed: int = 0) -> Any:
    """A model of that shape with seeded first weights, fp32, in training mode."""
    import transformers

    configs = {"llama": transformers.LlamaConfig, "phi3": transformers.Phi3Config}
    config = configs[shape.family](
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.ffn,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        max_position_embeddings=4096,
        tie_word_embeddings=shape.tied,
        pad_token_id=0,
        use_cache=False,
    )
    torch.manual_seed(seed)
    return transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation="sdpa", dtype=torch.float32
    ).train()


def tokens(shape: Shape, rows: int, step: int = 0, *, learnable: bool = False) -> torch.Tensor:
    """Rows [rows, length + 1] of a step: random ids, or a random walk over 256 ids that a model learns quickly."""
    generator = torch.Generator().manual_seed(1000 + step)
    if not learnable:
        return torch.randint(0, shape.vocab, (rows, shape.length + 1), generator=generator)
    follows = torch.randint(0, 256, (256, 4), generator=torch.Generator().manual_seed(7))
    walk, choices = (
        [torch.randint(0, 256, (rows,), generator=generator)],
        torch.randint(0, 4, (rows, shape.length), generator=generator),
    )
    for place in range(shape.length):
        walk.append(follows[walk[-1], choices[:, place]])
    return torch.stack(walk, dim=1)
