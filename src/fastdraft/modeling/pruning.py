"""First weights from a trained model: a few of its layers, each fitted to do the work of those cut behind it.

Which layers: of all paths from the first to the last, the one with the least to bridge: the sum over its gaps
of the squared angular distance between the residual stream before and behind the gap. arXiv 2403.17887 cuts
one block by this distance; a sum of squares weighs several gaps against each other.

A cut alone leaves less than nothing: SmolLM2 of 135M with 4 of its 30 layers has 11 to 26 nats a token, an
even guess 10.8. So the last matrix of each kept layer is fitted by least squares to what the source has in
front of the layer kept next, on the states that the cut model itself gives (arXiv 2505.02819 does so for one
gap): 6.4 nats. Shapes: R rows, T tokens, D hidden, I feed-forward, N tokens of all rows.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from fastdraft.modeling.drafts import build_draft
from fastdraft.modeling.heads import output_head

_ROWS = 8  # in the model at once
_COMPARED = 2048  # tokens
_HELD_OUT = 8  # one row in so many chooses the strength of a fit
_RIDGES = (0.01, 0.03, 0.1, 0.3, 1.0)  # times the mean square of the features
_PREFIX = "model.layers."


@torch.no_grad()
def prune(
    source: PreTrainedModel, config: PreTrainedConfig, layers: int | Sequence[int], ids_RT: Tensor
) -> tuple[PreTrainedModel, list[int], list[float]]:
    """A draft in fp32 on the CPU, of the source's width and rows, with so many or just these of its layers.

    Returns the draft, the layers kept, and for each of the source's the cosine similarity of the residual
    stream before and behind it. With all layers kept the weights are the source's.
    """
    states = residual_states(source, ids_RT)
    kept = choose_layers(states, layers) if isinstance(layers, int) else list(layers)
    before, behind = _unit(states[:-1]), _unit(states[1:])
    similarities = [float((a * b).sum(-1).mean()) for a, b in zip(before, behind, strict=True)]
    draft = build_draft(config, 0)
    draft.load_state_dict(_kept_weights(source.state_dict(), kept))
    refit(draft.to(source.device), kept, states)
    return draft.cpu(), kept, similarities


@torch.no_grad()
def residual_states(model: PreTrainedModel, ids_RT: Tensor) -> list[Tensor]:
    """The residual stream before every layer and behind the last: layers + 1 of [R, T, D], in bf16."""
    layers = model.get_decoder().layers
    states: list[list[Tensor]] = [[] for _ in range(len(layers) + 1)]

    def keep(place: int, state: Any) -> None:
        states[place].append((state[0] if isinstance(state, tuple) else state).bfloat16())

    with contextlib.ExitStack() as hooks:
        for place, layer in enumerate(layers):
            hook = layer.register_forward_pre_hook(lambda _, inputs, place=place: keep(place, inputs))
            hooks.callback(hook.remove)
        hooks.callback(layers[-1].register_forward_hook(lambda _, __, found: keep(-1, found)).remove)
        for part in torch.split(ids_RT.to(model.device), _ROWS):
            model.get_decoder()(input_ids=part, use_cache=False)
    return [torch.cat(parts) for parts in states]


def choose_layers(states: Sequence[Tensor], count: int) -> list[int]:
    """The `count` layers, first and last among them, whose gaps bridge the least."""
    units, last = _unit(states), len(states) - 2
    paths: dict[int, tuple[float, list[int]]] = {0: (0.0, [0])}
    angles = {
        (start, end): float((units[start] * units[end]).sum(-1).clamp(-1, 1).arccos().square().mean())
        for start in range(1, len(units))
        for end in range(start, len(units))
    }
    for _ in range(count - 1):
        longer: dict[int, tuple[float, list[int]]] = {}
        for layer, (cost, path) in paths.items():
            for following in range(layer + 1, last + 1):
                found = (cost + angles[layer + 1, following], [*path, following])
                longer[following] = min(longer.get(following, found), found)
        paths = longer
    return paths[last][1]


def _unit(states: Sequence[Tensor]) -> list[Tensor]:
    """The directions of the first tokens: [N, D] each."""
    return [nn.functional.normalize(each.flatten(0, 1)[:_COMPARED].float(), dim=-1) for each in states]


def _kept_weights(weights: dict[str, Tensor], kept: Sequence[int]) -> dict[str, Tensor]:
    """The named weights with only these layers, numbered anew."""
    found = {name: weight for name, weight in weights.items() if not name.startswith(_PREFIX)}
    for place, layer in enumerate(kept):
        start = f"{_PREFIX}{layer}."
        own = {name.removeprefix(start): weight for name, weight in weights.items() if name.startswith(start)}
        found |= {f"{_PREFIX}{place}.{rest}": weight for rest, weight in own.items()}
    return found


@torch.no_grad()
def refit(draft: PreTrainedModel, kept: Sequence[int], states: Sequence[Tensor]) -> None:
    """Fits the last matrix of every layer at or behind a gap to the source's states, front to back."""
    decoder: Any = draft.get_decoder()
    state, ends = states[0].float(), [*kept[1:], len(states) - 1]
    for place, (layer, end) in enumerate(zip(list(decoder.layers), ends, strict=True)):
        features: list[Tensor] = []
        hook = layer.mlp.down_proj.register_forward_pre_hook(lambda _, inputs: features.append(inputs[0]))  # noqa: B023
        with _alone(decoder, layer):
            parts = [decoder(inputs_embeds=part, use_cache=False)[0] for part in torch.split(state, _ROWS)]
        hook.remove()
        state, inputs_RTI = torch.cat(parts), torch.cat(features)
        if end != place + 1 or kept[place] != place:
            wanted = states[end].float()
            # A layer begins by scaling each token to one length: all count alike.
            weights = wanted.square().mean(-1, keepdim=True).rsqrt()
            change_ID = _ridge(inputs_RTI * weights, (wanted - state) * weights)
            layer.mlp.down_proj.weight += change_ID.T
            state = state + inputs_RTI @ change_ID


@contextlib.contextmanager
def _alone(decoder: Any, layer: nn.Module) -> Iterator[None]:
    """The decoder as this one layer, without its last norm."""
    layers, norm = decoder.layers, decoder.norm
    decoder.layers, decoder.norm = nn.ModuleList([layer]), nn.Identity()
    try:
        yield
    finally:
        decoder.layers, decoder.norm = layers, norm


def _ridge(features_RTI: Tensor, wanted_RTD: Tensor) -> Tensor:
    """The matrix [I, D] that best gives `wanted` from `features`, as strong as serves rows that it has not
    seen.
    """
    held = torch.arange(len(features_RTI), device=features_RTI.device) % _HELD_OUT == _HELD_OUT - 1
    (x_NI, unseen_NI), (y_ND, unseen_ND) = (
        (each[~held].flatten(0, 1), each[held].flatten(0, 1)) for each in (features_RTI, wanted_RTD)
    )
    gram_II, product_ID, best = x_NI.T @ x_NI, x_NI.T @ y_ND, (unseen_ND.square().sum(), 0 * x_NI.T @ y_ND)
    scale = gram_II.diagonal().mean()
    for ridge in _RIDGES:
        added = torch.diag_embed((ridge * scale).expand(len(gram_II)))
        change_ID = torch.linalg.solve(gram_II + added, product_ID)
        error = (unseen_ND - unseen_NI @ change_ID).square().sum()
        best = min(best, (error, change_ID), key=lambda pair: float(pair[0]))
    return best[1]


@torch.no_grad()
def fit_vocabulary(model: PreTrainedModel, size: int) -> None:
    """Cuts padding rows off the vocabulary's matrices, or adds some: mean rows, with a mean logit."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = head.weight is embedding.weight
    for module in (embedding,) if tied else (embedding, head):
        rows = module.weight
        more = rows.mean(0, keepdim=True).expand(max(0, size - len(rows)), -1)
        module.weight = nn.Parameter(torch.cat([rows[:size], more]))
    if tied:
        head.weight = embedding.weight
    embedding.num_embeddings, head.out_features, model.config.vocab_size = size, size, size


@torch.no_grad()
def mean_loss(model: PreTrainedModel, rows_RT: Tensor) -> float:
    """Nats per token of the rows' second to last tokens."""
    decoder, head = output_head(model)
    total, rows_RT = 0.0, rows_RT.to(model.device)
    for part in torch.split(rows_RT, _ROWS):
        hidden = decoder(input_ids=part[:, :-1], use_cache=False)[0]
        for state, labels in zip(hidden, part[:, 1:], strict=True):
            total += float(nn.functional.cross_entropy(head.logits(state), labels, reduction="sum"))
    return total / rows_RT[:, 1:].numel()
