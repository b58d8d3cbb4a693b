"""An output head over the token ids that the target writes most: `trim(model, ids)`.

In memory it is one small product. On disk the draft stays a plain Hugging Face directory: a whole head, in
which every other id has the mean of some kept rows (a mean never exceeds the largest: greedy drafting never
proposes it), and the kept ids in `head_ids.json`. Shapes: D hidden, V vocabulary, K kept ids.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from fastdraft.errors import TargetError

# Not *.safetensors: vLLM reads every such file of a directory as weights.
HEAD_IDS = "head_ids.json"
_SHARE = 64  # of so many kept rows one stands for the ids without a row, and at least two


class TrimmedHead(nn.Module):
    """Logits [..., V] of hidden states [..., D]; those of ids without a row are -inf."""

    ids: Tensor
    rows: Tensor

    def __init__(self, weight_KD: Tensor, ids_K: Tensor, vocab_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight_KD)
        rows_V = torch.full((vocab_size,), len(ids_K)).index_copy(0, ids_K, torch.arange(len(ids_K)))
        self.register_buffer("ids", ids_K, persistent=False)
        self.register_buffer("rows", rows_V, persistent=False)  # [V]: the row of each id, K where it has none

    def forward(self, hidden: Tensor) -> Tensor:
        return widen(hidden @ self.weight.T, self.rows)

    def whole_weight(self) -> Tensor:
        """The head [V, D] of a runtime that knows nothing of this."""
        weight_KD = self.weight.detach()
        # Training pushes rows of ids that are hardly ever written to one place, whither the mean of all rows
        # points too: with theirs, sampling gives least to ids that are never meant.
        along_K = weight_KD @ weight_KD.mean(0)
        rarest = along_K.topk(min(len(along_K), max(2, len(along_K) // _SHARE))).indices
        return weight_KD[rarest].mean(0).repeat(len(self.rows), 1).index_copy_(0, self.ids, weight_KD)


def widen(logits: Tensor, rows_V: Tensor) -> Tensor:
    """Logits by row [..., K] -> by id [..., V], -inf where an id has no row."""
    return functional.pad(logits, (0, 1), value=-torch.inf).index_select(-1, rows_V)


@torch.no_grad()
def trim(model: PreTrainedModel, ids_K: Tensor) -> None:
    """Cuts a model's head, or a copy of its tied embedding, to these rising ids (int64, on the CPU)."""
    head = model.get_output_embeddings()
    weight_VD = head.whole_weight() if isinstance(head, TrimmedHead) else head.weight
    trimmed = TrimmedHead(weight_VD[ids_K.to(weight_VD.device)], ids_K, len(weight_VD))
    model.set_output_embeddings(trimmed.to(weight_VD.device))
    model.config.tie_word_embeddings = False


def write_head_ids(folder: Path, head: TrimmedHead) -> None:
    """Keeps the ids beside the weights."""
    (folder / HEAD_IDS).write_text(json.dumps({"ids": head.ids.tolist()}) + "\n", encoding="utf-8")


def read_head_ids(folder: Path, vocab_size: int) -> Tensor | None:
    """The ids of a model's directory, rising, int64 [K]; None where its head is whole."""
    path = folder / HEAD_IDS
    if not path.is_file():
        return None
    try:
        ids = json.loads(path.read_text(encoding="utf-8"))["ids"]
        fits = bool(ids) and all(type(i) is int and 0 <= i < vocab_size for i in ids)
        if not fits or any(first >= second for first, second in itertools.pairwise(ids)):
            raise ValueError(f"ids must rise, from 0 to below {vocab_size}")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        found = f"{path}: {type(error).__name__}: {error}; must hold the `ids` of the head's rows"
        raise TargetError(found, "copy it again from where the draft was made") from None
    return torch.tensor(ids)
