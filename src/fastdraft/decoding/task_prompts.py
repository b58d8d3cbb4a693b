"""An evaluation task's prompts as token ids.

Decides that a prompt is evaluated only where it and a whole answer fit the context, that those left out are told, and that
conversations stay words until the target has written its earlier turns (decoding/turn_prompts.py).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastdraft.console import Console
from fastdraft.data.chat import prompt_ids
from fastdraft.decoding.workbench import EncodedTask
from fastdraft.errors import DataError
from fastdraft.recipe.evaluation import TaskConfig
from fastdraft.tasks import load_task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def encode_task(
    task: TaskConfig, console: Console, tokenizer: PreTrainedTokenizerBase, context_length: int
) -> EncodedTask:
    """A task's prompts that fit the context; those left out are told.

    Args:
        task: The recipe's.
        console: Hears of prompts left out.
        tokenizer: The target's.
        context_length: Tokens that the target and every draft can read.

    Raises:
        DataError: when the task's file is missing or damaged, or none of its prompts fits.
    """
    loaded = load_task(task)
    talks = [(prompt.id, prompt.conversation) for prompt in loaded.prompts if prompt.conversation]
    texts = [prompt for prompt in loaded.prompts if not prompt.conversation]
    encoded = [(prompt.id, prompt_ids(tokenizer, prompt.text, loaded.chat)) for prompt in texts]
    room = context_length - task.max_new_tokens
    fitting = [(name, ids) for name, ids in encoded if 0 < len(ids) <= room]
    skipped = len(encoded) - len(fitting)
    if not fitting and not talks:
        found = f"none of {len(encoded)} prompts has 1 to {room} tokens"
        rule = f"prompt and {task.max_new_tokens} new tokens must fit the context of {context_length}"
        raise DataError(f"task '{task.name}'", found, rule, "shorten the prompts or lower max_new_tokens")
    if skipped:
        limit = f"the context of {context_length} less {task.max_new_tokens} new tokens"
        console.warn(
            f"{task.name}: {skipped} of {len(encoded)} prompts skipped: empty or longer than {limit}"
        )
    return EncodedTask(
        task.name,
        [name for name, _ in fitting],
        [ids for _, ids in fitting],
        task.max_new_tokens,
        skipped,
        talks,
    )
