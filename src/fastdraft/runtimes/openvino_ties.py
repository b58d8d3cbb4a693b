"""How far apart two next tokens are under an exported model: the bare model in float32, outside any pipeline.

functional/same_text.py has the rule that this answers: when two greedy texts count as the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fastdraft.runtimes.openvino import MODEL_FILE, check_exported, core, device_properties, openvino_errors


class TieJudge:
    """An exported model that is asked for next tokens; compiled once, in float32 and so on the CPU."""

    def __init__(self, folder: Path) -> None:
        device = "CPU"
        properties = device_properties(device, "exact")
        check_exported(folder)
        with openvino_errors(folder, f"OpenVINO could not load it on {device}", "export the model again"):
            model = core().compile_model(folder / MODEL_FILE, device, properties)
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
        logits_V = np.asarray(self._request.infer(inputs)["logits"], dtype=np.float64)[0, -1]
        shifted_V = logits_V - logits_V.max()
        return np.asarray(shifted_V - np.log(np.exp(shifted_V).sum()))

    def gap(self, prefix_ids: Sequence[int], first: int, second: int) -> float:
        """Distance of the log-probs of two next tokens."""
        logprobs_V = self.logprobs(prefix_ids)
        return float(abs(logprobs_V[first] - logprobs_V[second]))
