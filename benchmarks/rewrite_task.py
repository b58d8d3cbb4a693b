"""A task as users of a code model have it: 24 functions of Python's own library to be rewritten.

    python benchmarks/rewrite_task.py rewrite.jsonl

In a recipe: `evaluate.tasks: [{kind: file, path: rewrite.jsonl, chat: true}]`. Of each module the first function
that fits is taken from the Python that runs this, whose licence (PSF-2.0) its code has. A draft that is to be
judged by it must not be trained on these modules: add them to `exclude` of `python:stdlib`.
"""

from __future__ import annotations

import ast
import json
import sys
import sysconfig
from pathlib import Path

MODULES = (
    *("bdb", "calendar", "colorsys", "compileall", "copy", "difflib", "fnmatch", "genericpath", "getpass"),
    *("gettext", "glob", "heapq", "inspect", "linecache", "locale", "mimetypes", "pkgutil", "posixpath"),
    *("pprint", "quopri", "shlex", "shutil", "statistics", "textwrap", "timeit", "tokenize", "trace"),
)
ASKED = "Rewrite this Python function with type hints and a docstring:\n\n```python\n{}\n```"
COUNT, LINES = 24, range(8, 31)


def prompts() -> list[dict[str, str]]:
    """`id` and `prompt` of every function."""
    found = []
    for module in MODULES:
        text = (Path(sysconfig.get_path("stdlib")) / f"{module}.py").read_text(encoding="utf-8")
        if function := next(filter(_fits, ast.parse(text).body), None):
            code = ast.get_source_segment(text, function) or ""
            found.append({"id": f"{module}.{function.name}", "prompt": ASKED.format(code)})  # type: ignore[attr-defined]
    return found[:COUNT]


def _fits(node: ast.stmt) -> bool:
    """A function with arguments and without annotations, of a length that people ask about."""
    if not isinstance(node, ast.FunctionDef) or node.decorator_list or node.returns:
        return False
    plain = not any(argument.annotation for argument in node.args.args)
    return plain and bool(node.args.args) and (node.end_lineno or 0) - node.lineno + 1 in LINES


if __name__ == "__main__":
    rows = (json.dumps(prompt, ensure_ascii=False) + "\n" for prompt in prompts())
    Path(sys.argv[1]).write_text("".join(rows), encoding="utf-8")
