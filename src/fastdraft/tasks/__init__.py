"""Evaluation tasks by name or from files; see catalogue.py for what ships."""

from fastdraft.tasks.catalogue import (
    FileTask,
    ShippedTask,
    Task,
    TaskConfig,
    describe_task,
    load_task,
    refuse_equal_names,
)
from fastdraft.tasks.files import TaskPrompt

__all__ = [
    "FileTask",
    "ShippedTask",
    "Task",
    "TaskConfig",
    "TaskPrompt",
    "describe_task",
    "load_task",
    "refuse_equal_names",
]
