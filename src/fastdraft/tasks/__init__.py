"""Evaluation tasks: catalogue.py loads a recipe's task, files.py reads its prompts."""

from fastdraft.tasks.catalogue import Task, describe_task, load_task
from fastdraft.tasks.files import TaskPrompt

__all__ = ["Task", "TaskPrompt", "describe_task", "load_task"]
