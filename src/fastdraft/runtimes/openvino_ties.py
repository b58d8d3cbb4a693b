"""Near-ties: how far apart two next tokens are in the eyes of an exported model.

Decides how a difference between two greedy texts is judged. One pass over several tokens rounds otherwise than one pass
over one, so that a text written with a draft may differ from the target's own where two tokens are nearly equally likely.
The gap between their log-probs behind the common text, by the bare model in float32 and outside any pipeline, tells such a
near-tie from a fault.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fastdraft.errors import FastDraftError
from fastdraft.runtimes.openvino import MODEL_FILE, Precision, check_exported, core, device_properties, short
from fastdraft.runtimes.openvino_signals import keeping_signal_stack

NO_TOKEN = -1
"""Stands for the end of a text that is shorter than the other."""


class TieJudge:
    """An exported model that is asked for next tokens; compiled once.

    Args:
        folder: The exported target.
        device: OpenVINO's name.
        precision: exact (float32, on a CPU) or fast.

    Raises:
        FastDraftError: when the files cannot be loaded. RecipeError: when the device is not there, or cannot be exact.
    """

    def __init__(self, folder: Path, device: str = "CPU", precision: Precision = "exact") -> None:
        properties = device_properties(device, precision)
        check_exported(folder)
        try:
            with keeping_signal_stack():
                model = core().compile_model(folder / MODEL_FILE, device, properties)
        except RuntimeError as error:
            raise FastDraftError(
                folder, short(error), f"OpenVINO must load it on {device}", "export the model again"
            ) from error
        self._inputs = {name for port in model.inputs for name in port.get_names()}
        self._request = model.create_infer_request()

    def logprobs(self, prefix_ids: Sequence[int]) -> np.ndarray[Any, np.dtype[np.float64]]:
        """Log-probs [V] of the token behind a text of at least one token."""
        length = len(prefix_ids)
        values = {"input_ids": prefix_ids, "attention_mask": [1] * length, "position_ids": range(length)}
        inputs = {
            name: np.asarray([row], dtype=np.int64) for name, row in values.items() if name in self._inputs
        }
        if "beam_idx" in self._inputs:
            inputs["beam_idx"] = np.zeros(1, dtype=np.int32)
        self._request.reset_state()  # the KV cache of the text before
        logits = np.asarray(self._request.infer(inputs)["logits"], dtype=np.float64)[0, -1]
        shifted = logits - logits.max()
        return np.asarray(shifted - np.log(np.exp(shifted).sum()))

    def gap(self, prefix_ids: Sequence[int], first: int, second: int) -> float:
        """Distance of the log-probs of two next tokens; infinite where one of them is the end of a shorter text."""
        if NO_TOKEN in (first, second):
            return float("inf")
        logprobs = self.logprobs(prefix_ids)
        return float(abs(logprobs[first] - logprobs[second]))


def first_difference(alone: Sequence[int], with_draft: Sequence[int]) -> tuple[int, int, int] | None:
    """Where two texts part: the place, from 0, and the token of each, `NO_TOKEN` where one has ended; None for equal texts."""
    if list(alone) == list(with_draft):
        return None
    first, second = [*alone, NO_TOKEN], [*with_draft, NO_TOKEN]
    place = next(i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b)
    return place, first[place], second[place]


def explain_differences(
    judge: TieJudge,
    prompts: Sequence[Sequence[int]],
    alone_texts: Sequence[Sequence[int]],
    with_draft_texts: Sequence[Sequence[int]],
) -> list[tuple[int, int, float]]:
    """Every greedy text that differs with a draft, and by how much.

    Args:
        judge: The target.
        prompts: Token ids.
        alone_texts: What the target wrote to each alone.
        with_draft_texts: What it wrote with the draft.

    Returns:
        For each differing text its index, the place of the first difference (from 0) and the gap in log-prob there.
    """
    found = []
    for index, (prompt, alone, with_draft) in enumerate(
        zip(prompts, alone_texts, with_draft_texts, strict=True)
    ):
        difference = first_difference(alone, with_draft)
        if difference:
            place, own, other = difference
            found.append((index, place, judge.gap([*prompt, *alone[:place]], own, other)))
    return found
