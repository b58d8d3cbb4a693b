"""Replay: what speculative decoding would have done, read off text that the target already wrote.

One teacher-forced pass of the draft gives each token's probability to be accepted, min(1, draft_probs[x] / target_probs[x]),
the target's side coming from the log-probs kept with the text; these give the expected counts for every K
(functional/acceptance.py). Shape suffixes: B rows of a batch, T positions, N response positions, D hidden, V vocabulary.
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
from fastdraft.functional.acceptance import Counts, add_counts, batched_expected_counts
from fastdraft.functional.generation import Generation
from fastdraft.functional.sampling import mask_ids, warp
from fastdraft.modeling.heads import OutputHead, output_head
from fastdraft.modeling.vocabulary import Vocabulary

LOGITS_HELD = {"cpu": 2**21, "other": 2**26}
"""Entries of the logits held at once: as many as stay in a CPU's cache (8 MiB of float32), or fill an accelerator's units (256 MiB)."""
BATCH_TOKENS = {"cpu": 2048, "other": 8192}
"""Positions in one pass, for the same reason."""
_COUNTED_TOGETHER = 256


TokenText = SyntheticRow | Generation
"""A prompt and what was written behind it."""


def replay(
    draft: PreTrainedModel,
    rows: Sequence[SyntheticRow],
    num_speculative_tokens: Sequence[int],
    vocabulary: Vocabulary,
    draft_temperature: float | None = None,
    *,
    batch_tokens: int = 0,
    on_batch: Callable[[int], None] | None = None,
) -> list[dict[int, Counts]]:
    """Expected counts of a speculative run over each row, for every K; for greedy rows the very counts of the run.

    A row without a response has empty counts. `draft_temperature` is the draft's own where the target samples (None: the row's;
    0 proposes greedily); `batch_tokens` are positions in one pass, padding included (0 chooses by device); `on_batch` is told the
    number of rows finished since the last call.
    """
    accepts = accept_probabilities(
        draft, rows, vocabulary, draft_temperature, batch_tokens=batch_tokens, on_batch=on_batch
    )
    return counts_of_accepts(accepts, num_speculative_tokens)


def counts_of_accepts(
    accepts: Sequence[NDArray[np.float64]], num_speculative_tokens: Sequence[int]
) -> list[dict[int, Counts]]:
    """For each text a dictionary from K to expected counts, from its accept probabilities."""
    # Neighbours in length share a recursion, so that short texts do not pay for the longest.
    order = sorted(range(len(accepts)), key=lambda i: len(accepts[i]))
    counts: list[dict[int, Counts]] = [{} for _ in accepts]
    for start in range(0, len(accepts), _COUNTED_TOGETHER):
        chosen = order[start : start + _COUNTED_TOGETHER]
        found = batched_expected_counts([accepts[i] for i in chosen], num_speculative_tokens)
        for index, by_k in zip(chosen, found, strict=True):
            counts[index] = by_k
    return counts


def block_efficiency(
    draft: PreTrainedModel,
    rows: Sequence[SyntheticRow],
    num_speculative_tokens: int,
    vocabulary: Vocabulary,
    draft_temperature: float | None = None,
    *,
    batch_tokens: int = 8192,
) -> float:
    """Generated tokens for each target pass over all `rows` together, expected; NaN without rows."""
    k = num_speculative_tokens
    counted = replay(draft, rows, [k], vocabulary, draft_temperature, batch_tokens=batch_tokens)
    return add_counts(counts[k] for counts in counted).block_efficiency


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
    """For each row, each response token's probability to be accepted if the draft proposes at its place; 0 or 1 when greedy."""
    accepts: list[NDArray[np.float64]] = [np.zeros(0) for _ in rows]
    missing = vocabulary.missing_ids
    missing_M = torch.tensor(missing, dtype=torch.long, device=draft.device) if missing else None
    decoder, head = output_head(draft)

    def replay_piece(chosen: Sequence[int]) -> None:
        batch = [rows[i] for i in chosen]
        hidden = response_hidden(decoder, batch, draft.device)
        # What was drawn alike goes through the output head together: a short answer alone would not fill a matrix product.
        for alike in alike_places((row.temperature, row.top_k, row.top_p) for row in batch):
            hidden_ND = torch.cat([hidden[b] for b in alike])
            found = _accept(hidden_ND, head, [batch[b] for b in alike], missing_M, draft_temperature)
            ends = np.cumsum([len(batch[b].response_ids) for b in alike])
            for b, accept in zip(alike, np.split(found, ends[:-1]), strict=True):
                accepts[chosen[b]] = accept
        if on_batch:
            on_batch(len(chosen))

    pass_by_pass(rows, batch_tokens or batch_tokens_of(draft.device), replay_piece)
    return accepts


def alike_places(keys: Iterable[Hashable]) -> list[list[int]]:
    """Places of equal keys together, in order."""
    places: dict[Hashable, list[int]] = {}
    for place, key in enumerate(keys):
        places.setdefault(key, []).append(place)
    return list(places.values())


def pass_by_pass(rows: Sequence[TokenText], batch_tokens: int, work: Callable[[Sequence[int]], None]) -> None:
    """Calls `work` with the numbers of rows of near-equal length, fewer at a time where memory runs out."""
    halving = Halving("a pass over text")
    for chosen in length_batches(rows, batch_tokens):
        halving(chosen, work)


def batch_tokens_of(device: torch.device) -> int:
    """How many positions go through a model at once on this device."""
    return BATCH_TOKENS.get(device.type, BATCH_TOKENS["other"])


def length_batches(rows: Sequence[TokenText], batch_tokens: int) -> Iterator[list[int]]:
    """Indices in batches of near-equal length whose padded size stays within `batch_tokens` (a longer row goes alone)."""
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
    starts = [len(row.prompt_ids) - 1 for row in rows]
    return [
        hidden_BTD[b, start : start + len(row.response_ids)]
        for b, (start, row) in enumerate(zip(starts, rows, strict=True))
    ]


def _accept(
    hidden_ND: Tensor,
    head: OutputHead,
    rows: Sequence[SyntheticRow],
    missing_M: Tensor | None,
    draft_temperature: float | None,
) -> NDArray[np.float64]:
    """Accept probabilities of all response tokens of rows that were drawn alike, one row behind the other."""
    first = rows[0]
    own = draft_temperature is None or first.temperature == 0
    temperature = first.temperature if own else draft_temperature
    tokens = [token for row in rows for token in row.response_ids]
    tokens_N = torch.tensor(tokens, dtype=torch.long, device=hidden_ND.device)
    parts = []
    for held in held_slices(tokens_N, head.vocab_size):
        logits_NV = mask_ids(head.logits(hidden_ND[held]), missing_M)
        if temperature == 0:
            parts.append(logits_NV.argmax(-1) == tokens_N[held])
        else:
            warped_NV = warp(logits_NV, temperature, first.top_k, first.top_p)
            parts.append(chosen_logprobs(warped_NV, tokens_N[held]))
    if not parts:
        return np.zeros(0)
    found_N = torch.cat(parts).cpu().double()  # on the CPU, because not every accelerator has float64
    if temperature == 0:
        return found_N.numpy()
    target_N = torch.tensor([value for row in rows for value in row.logprobs], dtype=torch.float32).double()
    return (found_N - target_N).clamp(max=0.0).exp().numpy()


def held_slices(positions_N: Tensor, vocab_size: int) -> Iterator[slice]:
    """Positions (any tensor whose first axis they are) in pieces whose logits `LOGITS_HELD` allows on its device."""
    step = max(1, LOGITS_HELD.get(positions_N.device.type, LOGITS_HELD["other"]) // vocab_size)
    return (slice(start, start + step) for start in range(0, len(positions_N), step))


def chosen_logprobs(logits_NV: Tensor, tokens_N: Tensor) -> Tensor:
    """Log-prob of each row's token; -inf where the logits say so."""
    return logits_NV.gather(-1, tokens_N[:, None]).squeeze(-1) - logits_NV.logsumexp(-1)
