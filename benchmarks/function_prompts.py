"""Headers and docstrings of the standard library's functions, as prompts for `synthesize`.

    python benchmarks/function_prompts.py functions.jsonl functions_chat.jsonl

The first file is to be continued as it stands (`chat: false`), the second asks for the body in words. Functions of
the modules from which rewrite_task.py takes its task are left out.
"""

from __future__ import annotations

import ast
import json
import random
import sys
import sysconfig
import textwrap
from pathlib import Path

import rewrite_task

ASKED = (
    "Complete this Python function:\n\n```python\n{}\n```",
    "Write the body of this function.\n\n{}",
    "Implement the following function in Python:\n\n```python\n{}\n```",
    "Finish the code below and explain it.\n\n```python\n{}\n```",
)
SKIPPED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "lib2to3", "turtledemo"}
SHORTEST, LONGEST = 60, 700  # characters


def headers() -> list[str]:
    """Each once, in an order that the seed 0 gives."""
    root, found = Path(sysconfig.get_paths()["stdlib"]), dict[str, None]()
    for path in sorted(root.rglob("*.py")):
        if SKIPPED & set(path.relative_to(root).parts) or path.stem in rewrite_task.MODULES:
            continue
        try:
            source = path.read_text(encoding="utf-8")
            tree = ast.parse(source)
        except (SyntaxError, ValueError):
            continue
        lines = source.splitlines()
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and ast.get_docstring(node) and len(node.body) > 1:
                text = textwrap.dedent("\n".join(lines[node.lineno - 1 : node.body[0].end_lineno]))
                if SHORTEST < len(text) < LONGEST:
                    found.setdefault(text)
    texts = list(found)
    random.Random(0).shuffle(texts)
    return texts


def main(plain: str, chat: str) -> None:
    texts = headers()
    with open(plain, "w", encoding="utf-8") as file:
        file.writelines(json.dumps({"prompt": text + "\n"}) + "\n" for text in texts)
    with open(chat, "w", encoding="utf-8") as file:
        asked = (ASKED[i % len(ASKED)].format(text) for i, text in enumerate(texts))
        file.writelines(json.dumps({"prompt": text}) + "\n" for text in asked)
    print(f"{len(texts)} functions")


if __name__ == "__main__":
    main(*sys.argv[1:])
