"""The rules by which OpenVINO GenAI takes a draft for a target, checked before either is loaded.

Decides what is compared: OpenVINO itself looks at the length of one encoded sentence and at the ids of BOS, EOS and
padding, and only after both models were loaded; a difference in vocabulary size or a draft with a shorter context
crashes or clips later. Works on Hugging Face directories and on exported ones alike, and needs no OpenVINO.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from fastdraft.errors import TargetError
from fastdraft.modeling.families import text_config
from fastdraft.target import Target

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SENTENCE = "Could you please tell me something about OpenVINO.GenAI?"
"""What OpenVINO GenAI encodes with both tokenizers."""
_REMEDY = "use a draft that was made for this target's tokenizer"


def check_pair(target: str | Path, draft: str | Path) -> None:
    """Refuses a draft that OpenVINO could not run for this target.

    Args:
        target: Directory or hub id of the target, Hugging Face or exported.
        draft: Directory of the draft, Hugging Face or exported.

    Raises:
        TargetError: naming the first rule that fails and both values.
        TargetError: when a config or tokenizer cannot be read.
    """
    of_target, of_draft = Target.at(target), Target.at(draft)
    sizes = [int(text_config(model.config).vocab_size) for model in (of_target, of_draft)]
    _compare("vocab_size, padding included, must be equal", *sizes, draft)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        _compare(
            f"{name} must be equal",
            getattr(of_target.tokenizer, name),
            getattr(of_draft.tokenizer, name),
            draft,
        )
    rule = f"both tokenizers must encode '{SENTENCE}' alike"
    _compare(rule, _encode(of_target.tokenizer), _encode(of_draft.tokenizer), draft)
    context = {"target": of_target.context_length, "draft": of_draft.context_length}
    if context["draft"] < context["target"]:
        found = f"draft {context['draft']}, target {context['target']}"
        remedy = (
            "make the draft with the target's context length: its memory is read only as far as the text goes"
        )
        raise TargetError(draft, found, "the draft's context must not be shorter than the target's", remedy)


def _encode(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return [int(token) for token in tokenizer(SENTENCE).input_ids]


def _compare(rule: str, target: object, draft: object, where: str | Path) -> None:
    if target != draft:
        raise TargetError(where, f"draft {draft}, target {target}", rule, _REMEDY)
