"""Replay: what speculative decoding would have done, read off text that the target already wrote.

One teacher-forced pass of the draft gives each token's probability to be accepted, min(1, draft_probs[x] /
target_probs[x]); the target's side was kept with the text. Shape suffixes: B rows of a batch, T positions, N
response positions, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from fastdraft.data.rows import SyntheticRow
from fastdraft.errors import Halving
from fastdraft.functional.acceptance import Counts, batched_expected_counts, neighbours
from fastdraft.functional.generation import Generation, Sampling
from fastdraft.functional.sampling import mask_ids, warp
from fastdraft.modeling.heads import OutputHead, output_head
from fastdraft.modeling.vocabulary import Vocabulary

# Entries of the logits held at once: as many as stay in a CPU's cache (8 MiB of float32), or fill an
# accelerator's units (256 MiB); and positions in one pass, for the same reason.
LOGITS_HELD = {"cpu": 2**21, "other": 2**26}
BATCH_TOKENS = {"cpu": 2048, "other": 8192}
_COUNTED_TOGETHER = 256

TokenText = SyntheticRow | Generation  # a prompt and what was written behind it


def replay(
    draft: PreTrainedModel,
    rows: Sequence[SyntheticRow],
    num_speculative_tokens: Sequence[int],
    vocabulary: Vocabulary,
    draft_temperature: float | None = None,
    *,
    batch_tokens: int = 0,
) -> list[dict[int, Counts]]:
    """Expected counts of a speculative run over each row, for every K; for greedy rows the run's own counts.

    A row without a response has empty counts. `draft_temperature` is the draft's own where the target samples
    (None: the row's; 0 proposes greedily); `batch_tokens` are positions in one pass, padding included (0
    chooses by device).
    """
    accepts = accept_probabilities(draft, rows, vocabulary, draft_temperature, batch_tokens=batch_tokens)
    return counts_of_accepts(accepts, num_speculative_tokens)


def counts_of_accepts(
    accepts: Sequence[NDArray[np.float64]], num_speculative_tokens: Sequence[int]
) -> list[dict[int, Counts]]:
    """For each text a dictionary from K to expected counts, from its accept probabilities."""
    counts: list[dict[int, Counts]] = [{} for _ in accepts]
    for chosen in neighbours([len(accept) for accept in accepts], _COUNTED_TOGETHER):
        found = batched_expected_counts([accepts[i] for i in chosen], num_speculative_tokens)
        for index, by_k in zip(chosen, found, strict=True):
            counts[index] = by_k
    return counts


@torch.inference_mode()
def accept_probabilities(
    draft: PreTrainedModel,
    rows: Sequence[SyntheticRow],
    vocabulary: Vocabulary,
    draft_temperature: float | None = None,
    *,
    batch_tokens: int = 0,
    on_batch: Callable[[int], None] | None = None,
) -> list[NDArray[np.float64]]:
    """For each row, the chance of each response token to be accepted if drafted; 0 or 1 when greedy.

    `on_batch` is told the number of rows finished since the last call.
    """
    accepts: list[NDArray[np.float64]] = [np.zeros(0) for _ in rows]
    missing = vocabulary.missing_ids
    missing_M = torch.tensor(missing, dtype=torch.long, device=draft.device) if missing else None
    decoder, head = output_head(draft)

    def replay_piece(chosen: Sequence[int]) -> None:
        batch = [rows[i] for i in chosen]
        hidden = response_hidden(decoder, batch, draft.device)
        # What was drawn alike goes through the output head together: a short answer alone would not fill a
        # matrix product.
        for alike in alike_places(Sampling(row.temperature, row.top_k, row.top_p) for row in batch):
            group, first = [batch[b] for b in alike], batch[alike[0]]
            own = draft_temperature is None or first.temperature == 0
            sampling = Sampling(
                first.temperature if own else draft_temperature or 0.0, first.top_k, first.top_p
            )
            tokens = [token for row in group for token in row.response_ids]
            found_N = token_logprobs(head, torch.cat([hidden[b] for b in alike]), tokens, sampling, missing_M)
            found_N = found_N.cpu().double()  # on the CPU, because not every accelerator has float64
            if sampling.temperature > 0:
                kept = [value for row in group for value in row.logprobs]
                found_N = (found_N - torch.tensor(kept, dtype=torch.float32).double()).clamp(max=0.0)
            ends = np.cumsum([len(row.response_ids) for row in group])
            for b, accept in zip(alike, np.split(found_N.exp().numpy(), ends[:-1]), strict=True):
                accepts[chosen[b]] = accept
        if on_batch:
            on_batch(len(chosen))

    pass_by_pass(rows, draft.device, replay_piece, batch_tokens)
    return accepts


def alike_places(keys: Iterable[Hashable]) -> list[list[int]]:
    """Places of equal keys together, in order."""
    places: dict[Hashable, list[int]] = {}
    for place, key in enumerate(keys):
        places.setdefault(key, []).append(place)
    return list(places.values())


def pass_by_pass(
    rows: Sequence[TokenText],
    device: torch.device,
    work: Callable[[Sequence[int]], None],
    batch_tokens: int = 0,
) -> None:
    """Calls `work` with the numbers of rows of near-equal length, fewer at a time where memory runs out."""
    halving, chosen = Halving("a pass over text"), BATCH_TOKENS.get(device.type, BATCH_TOKENS["other"])
    for batch in length_batches(rows, batch_tokens or chosen):
        halving(batch, work)


def length_batches(rows: Sequence[TokenText], batch_tokens: int) -> Iterator[list[int]]:
    """Indices in batches of near-equal length, padded within `batch_tokens` (a longer row goes alone)."""
    lengths, batch = [len(row.prompt_ids) + len(row.response_ids) for row in rows], list[int]()
    for index in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if batch and (len(batch) + 1) * lengths[index] > batch_tokens:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def response_hidden(
    decoder: torch.nn.Module, rows: Sequence[TokenText], device: torch.device
) -> list[Tensor]:
    """For each row the hidden states from which its response tokens are predicted, [len(response), D]."""
    texts = [(*row.prompt_ids, *row.response_ids[:-1]) for row in rows]
    ids_BT = np.zeros((len(rows), max(map(len, texts), default=0)), dtype=np.int64)
    for line, text in zip(ids_BT, texts, strict=True):
        line[: len(text)] = text
    # Padding stands on the right, where a causal model does not look: no attention mask is needed.
    hidden_BTD = decoder(input_ids=torch.from_numpy(ids_BT).to(device), use_cache=False).last_hidden_state
    spans = ((len(row.prompt_ids) - 1, len(row.response_ids)) for row in rows)
    return [
        hidden_TD[start : start + count] for hidden_TD, (start, count) in zip(hidden_BTD, spans, strict=True)
    ]


def token_logprobs(
    head: OutputHead,
    hidden_ND: Tensor,
    tokens: Sequence[int],
    sampling: Sampling,
    missing_M: Tensor | None = None,
) -> Tensor:
    """Log-prob of each token under the sampling distribution, [N]; greedy: 0 for the likeliest, else -inf."""
    tokens_N = torch.tensor(tokens, dtype=torch.long, device=hidden_ND.device)
    parts = [torch.zeros(0, device=hidden_ND.device)]
    for held in held_slices(tokens_N, head.vocab_size):
        logits_NV = mask_ids(head.logits(hidden_ND[held]), missing_M)
        if sampling.temperature == 0:
            parts.append(torch.where(logits_NV.argmax(-1) == tokens_N[held], 0.0, -torch.inf))
        else:
            warped_NV = warp(logits_NV, sampling.temperature, sampling.top_k, sampling.top_p)
            chosen_N = warped_NV.gather(-1, tokens_N[held][:, None]).squeeze(-1)
            parts.append(chosen_N - warped_NV.logsumexp(-1))
    return torch.cat(parts)


def held_slices(positions_N: Tensor, vocab_size: int) -> Iterator[slice]:
    """Positions (the first axis of any tensor) in pieces whose logits `LOGITS_HELD` allows on its device."""
    step = max(1, LOGITS_HELD.get(positions_N.device.type, LOGITS_HELD["other"]) // vocab_size)
    return (slice(start, start + step) for start in range(0, len(positions_N), step))
