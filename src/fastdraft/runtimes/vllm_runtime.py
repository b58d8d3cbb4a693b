"""vLLM as the `Runtime` of a benchmark, and its rules for a target and a draft."""

from __future__ import annotations

from fastdraft.errors import TargetError
from fastdraft.modeling.architecture import Architecture


def check_shapes(target: Architecture, draft: Architecture, where: str) -> None:
    """Refuses a draft that vLLM would not run, or not always, beside this target; families may differ."""
    fix = "use a draft that was made for this target"
    if draft.vocab_size != target.vocab_size:
        found = f"{where}: draft {draft.vocab_size}, target {target.vocab_size}"
        raise TargetError(f"{found}; vocab_size, padding included, must be equal in vLLM", fix)
    if draft.context_length < target.context_length:
        # Once a text of a batch is longer, vLLM drafts for none of the batch, without a word.
        found = f"{where}: context of the draft {draft.context_length}, of the target {target.context_length}"
        raise TargetError(f"{found}; the draft's must not be shorter in vLLM", fix)
    for role, shape in (("target", target), ("draft", draft)):
        if shape.head_dim % 8:
            rule = "vLLM's attention wants a multiple of 8; its CPU backend 32, 64, 80, 96, 112, 128, ..."
            raise TargetError(
                f"{where}: heads of {shape.head_dim} in the {role}; {rule}", "choose other heads"
            )
