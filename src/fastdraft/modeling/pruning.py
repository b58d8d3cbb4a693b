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
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from fastdraft.modeling.drafts import build_draft
from fastdraft.modeling.heads import output_head
from fastdraft.modeling.narrowing import is_cut, main_directions, narrow_layers, rotate

_ROWS = 8  # in the model at once
_COMPARED = 2048  # tokens
_HELD_OUT = 8  # one row in so many chooses the strength of a fit
_RIDGES = (0.03, 0.1, 0.3, 1.0)  # times the mean square of the features
_PREFIX = "model.layers."


@torch.no_grad()
def prune(
    source: PreTrainedModel, config: PreTrainedConfig, layers: int | Sequence[int], ids_RT: Tensor
) -> tuple[PreTrainedModel, list[int], list[float]]:
    """A draft in fp32 on the CPU with so many or just these of the source's layers, as wide as `config`.

    Returns the draft, the layers kept, and for each of the source's the cosine similarity of the residual
    stream before and behind it. With all layers and the whole width kept the weights are the source's.
    """
    states = residual_states(source, ids_RT)
    kept = choose_layers(states, layers) if isinstance(layers, int) else list(layers)
    before, behind = _unit(states[:-1]), _unit(states[1:])
    similarities = [float((a * b).sum(-1).mean()) for a, b in zip(before, behind, strict=True)]
    weights = _kept_weights(source.state_dict(), kept)
    if narrower := is_cut(source.config, config):
        weights = {name: weight.float() for name, weight in weights.items()}
        narrow_layers(weights, source.config, config, [_contributions(source, i, states[i]) for i in kept])
        if config.hidden_size != source.config.hidden_size:
            basis_DW = main_directions(states, config.hidden_size)
            rotate(weights, len(kept), basis_DW)
            states = [(state.float() @ basis_DW).bfloat16() for state in states]
    draft = build_draft(config, 0)
    draft.load_state_dict(weights)
    refit(draft.to(source.device), kept, states, everywhere=narrower)
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


def _contributions(model: PreTrainedModel, layer: int, state: Tensor) -> dict[str, Tensor]:
    """For each input of the two matrices that write into the stream: the mean square of what it adds."""
    decoder, found = cast(Any, model.get_decoder()), dict[str, Tensor]()
    block = decoder.layers[layer]
    writers = {"o_proj": block.self_attn.o_proj, "down_proj": block.mlp.down_proj}
    _, inputs = _run_alone(decoder, block, state[: _COMPARED // state.shape[1]].to(model.dtype), writers)
    for name, writer in writers.items():
        strength = writer.weight.float().square().sum(0)
        found[name] = inputs[name].float().flatten(0, 1).square().mean(0) * strength
    return found


@torch.no_grad()
def refit(
    draft: PreTrainedModel, kept: Sequence[int], states: Sequence[Tensor], *, everywhere: bool = False
) -> None:
    """Fits the last matrix of each layer at or behind a gap, or of all, to the source's states in turn."""
    decoder: Any = draft.get_decoder()
    state, ends = states[0].float(), [*kept[1:], len(states) - 1]
    for place, (layer, end) in enumerate(zip(list(decoder.layers), ends, strict=True)):
        down = layer.mlp.down_proj
        state, inputs = _run_alone(decoder, layer, state, {"down": down})
        if everywhere or end != place + 1 or kept[place] != place:
            wanted = states[end].float()
            # A layer begins by scaling each token to one length: all count alike.
            lengths = wanted.square().mean(-1, keepdim=True)
            weights = lengths.clamp_min(1e-6 * lengths.mean()).rsqrt()  # an unused token's may be zero
            change_ID = _ridge(inputs["down"] * weights, (wanted - state) * weights)
            down.weight += change_ID.T
            state = state + inputs["down"] @ change_ID


def _run_alone(
    decoder: Any, layer: nn.Module, state_RTD: Tensor, watched: Mapping[str, nn.Module]
) -> tuple[Tensor, dict[str, Tensor]]:
    """What this one layer makes of the states, and the inputs of the modules inside it that are watched."""
    inputs: dict[str, list[Tensor]] = {name: [] for name in watched}
    with contextlib.ExitStack() as stack:
        for name, module in watched.items():
            hook = module.register_forward_pre_hook(lambda _, given, name=name: inputs[name].append(given[0]))
            stack.callback(hook.remove)
        stack.enter_context(_alone(decoder, layer))
        parts = [decoder(inputs_embeds=part, use_cache=False)[0] for part in torch.split(state_RTD, _ROWS)]
    return torch.cat(parts), {name: torch.cat(found) for name, found in inputs.items()}


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
    gram_II, product_ID = (x_NI.T @ x_NI).cpu(), (x_NI.T @ y_ND).cpu()  # not every device solves
    best_ID, least = torch.zeros_like(product_ID), float(unseen_ND.square().sum())
    for ridge in _RIDGES:
        strength = (ridge * gram_II.diagonal().mean()).clamp_min(1e-20)
        added = torch.diag_embed(strength.expand(len(gram_II)))
        change_ID = torch.cholesky_solve(product_ID, torch.linalg.cholesky(gram_II + added))
        error = float((unseen_ND - unseen_NI @ change_ID.to(unseen_NI.device)).square().sum())
        if error < least:
            best_ID, least = change_ID, error
    return best_ID.to(x_NI.device)


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
