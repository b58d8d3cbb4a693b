"""The target's distributions over text that it already wrote: one teacher-forced pass, kept beside the text.

Decides that a distribution is taken at temperature 1 with nothing removed or masked, in the target's own precision, whatever
the text was drawn with and by; that a unit whose logits stand is left alone; and that only a few rows of logits exist at a time.

Shape suffixes: N response positions, V vocabulary, K kept tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from fastdraft.data.rows import read_rows
from fastdraft.data.sparse_logits import SparseLogits, logits_path, write_sparse_logits
from fastdraft.decoding.replay import TokenText, batch_tokens_of, held_slices, pass_by_pass, response_hidden
from fastdraft.errors import RecipeError, TargetError
from fastdraft.functional.distillation import top_k_buckets
from fastdraft.functional.generation import Engine
from fastdraft.modeling.drafts import pick_device
from fastdraft.modeling.heads import OutputHead, output_head
from fastdraft.stages.context import StageContext


@torch.inference_mode()
def sparse_logits(
    model: PreTrainedModel, rows: Sequence[TokenText], k: int, *, batch_tokens: int = 0
) -> list[SparseLogits]:
    """The k most likely tokens at every response position of each row, and the mass of all others.

    Args:
        model: The target, in evaluation mode.
        rows: Texts with a prompt, in any order.
        k: Below the size of the vocabulary.
        batch_tokens: Positions in one pass, padding included; 0 chooses by device.

    Returns:
        One for each row, in the order given.
    """
    found: list[SparseLogits | None] = [None] * len(rows)
    decoder, head = output_head(model)

    def keep_piece(chosen: Sequence[int]) -> None:
        hidden = response_hidden(decoder, [rows[i] for i in chosen], model.device)
        kept, ends = (
            _kept(torch.cat(hidden), head, k),
            np.cumsum([len(hidden_ND) for hidden_ND in hidden])[:-1],
        )
        for index, ids, logprobs in zip(
            chosen, np.split(kept.ids, ends), np.split(kept.logprobs, ends), strict=True
        ):
            found[index] = SparseLogits(ids, logprobs)

    pass_by_pass(rows, batch_tokens or batch_tokens_of(model.device), keep_piece)
    return [logits for logits in found if logits is not None]


def _kept(hidden_ND: Tensor, head: OutputHead, k: int) -> SparseLogits:
    parts = [
        top_k_buckets(head.logits(hidden_ND[held]), k) for held in held_slices(hidden_ND, head.vocab_size)
    ]
    if not parts:
        return SparseLogits(np.zeros((0, k), dtype=np.int32), np.zeros((0, k + 1), dtype=np.float32))
    ids_NK = torch.cat([part.ids for part in parts]).to(torch.int32)
    return SparseLogits(ids_NK.cpu().numpy(), torch.cat([part.logprobs for part in parts]).cpu().numpy())


@dataclass(frozen=True)
class LogitWriter:
    """Writes the logits of a unit of rows into the file beside it.

    Raises:
        RecipeError: when `k` leaves no token for the tail.
    """

    model: PreTrainedModel
    k: int

    def __post_init__(self) -> None:
        vocab_size = self.vocab_size
        if self.k >= vocab_size:
            rule = f"must be below the {vocab_size} ids of the target's vocabulary"
            raise RecipeError("synthesize.logits.k", str(self.k), rule, "lower it; 64 is usual")

    @property
    def vocab_size(self) -> int:
        """Padding ids included: the target gives them a probability too."""
        return output_head(self.model)[1].vocab_size

    def write(self, unit: Path) -> None:
        """Scores the rows of a finished unit, unless its logits stand already.

        Raises:
            TargetError: when the target's numbers are not finite.
            FastDraftError: when the disk is full or the folder cannot be written.
        """
        path = logits_path(unit)
        if path.exists():
            return
        rows = read_rows(unit)
        found = sparse_logits(self.model, rows, self.k)
        empty = SparseLogits(
            np.zeros((0, self.k), dtype=np.int32), np.zeros((0, self.k + 1), dtype=np.float32)
        )
        logits = SparseLogits(
            *(
                np.concatenate([getattr(part, name) for part in (empty, *found)])
                for name in ("ids", "logprobs")
            )
        )
        if not np.isfinite(logits.logprobs).all():
            found_there = f"logits that are not finite in the scoring pass of {unit.name}"
            raise TargetError(
                "target.model",
                found_there,
                "the target must compute finite numbers",
                "set target.dtype to bf16 or fp32",
            )
        write_sparse_logits(path, logits, self.vocab_size)


def open_logit_writer(k: int, engine: Engine, context: StageContext) -> LogitWriter:
    """A writer over the model that the engine has loaded; where it runs elsewhere, over the target loaded beside it.

    Raises:
        RecipeError: when `k` leaves no token for the tail. TargetError: when the target cannot be loaded.
    """
    model = getattr(engine, "model", None)
    if not isinstance(model, PreTrainedModel):
        model = context.target.model(pick_device(context.settings.device))
    return LogitWriter(model, k)
