"""Published acceptance rates of FastDraft drafts, to stand beside one's own.

Decides nothing. Source: FastDraft, arXiv 2411.11055 (Findings of ACL 2025), acceptance rate at K = 3, temperature 0.6.
The task sets differ from those of a user's run unless the same files are used, so these rows show the size of the effect,
not a score to match.
"""

from __future__ import annotations

PAPER_TASKS = {"summarization": "CNN-DM", "text": "TinyStories", "instructions": "Dolly", "code": "HumanEval"}
"""Our task -> the set on which the paper measured it."""

PAPER_ROWS: dict[str, dict[str, dict[str, float]]] = {
    "Phi-3-mini 50M": {
        "pretrain": {"summarization": 0.311, "text": 0.277, "instructions": 0.245, "code": 0.229},
        "continue_pretrain": {"summarization": 0.304, "text": 0.287, "instructions": 0.226, "code": 0.561},
        "align": {"summarization": 0.369, "text": 0.306, "instructions": 0.370, "code": 0.562},
    },
    "Llama-3.1-8B 150M": {
        "pretrain": {"summarization": 0.280, "text": 0.227, "instructions": 0.247, "code": 0.248},
        "continue_pretrain": {"summarization": 0.280, "text": 0.235, "instructions": 0.273, "code": 0.606},
        "align": {"summarization": 0.307, "text": 0.266, "instructions": 0.334, "code": 0.649},
    },
}
"""Pair -> checkpoint -> task -> acceptance rate."""
