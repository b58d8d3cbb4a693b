"""Token ids of GGUF files: ours beside llama.cpp's own, text by text.

    python benchmarks/gguf_token_ids.py MODEL.gguf [MORE.gguf] [--output ids.json]

Texts: Python code, prose, white space, digits, other scripts, emoji, decomposed accents, special tokens of the
file inside text. llama.cpp's are those of its server's /tokenize, special tokens parsed. Needs `llamacpp`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from fastdraft.runtimes.llama_cpp_process import ServerSettings
from fastdraft.runtimes.llama_cpp_server import LlamaServer
from fastdraft.target import Target

SCRIPTS = [
    "数学は楽しい。",
    "Привет, мир!",
    "مرحبا بالعالم",
    "नमस्ते दुनिया",
    "안녕하세요 세계",
    "γειά σου Κόσμε",
    "ไทยแลนด์",
    "עברית",
]
ODD = [
    "",
    " ",
    "\n",
    "\t\t",
    "  a",
    "a  ",
    " \n \n x",
    "\r\n\r\n",
    "a\u00a0b",
    "e\u0301 n\u0303 A\u030a",
    "ﬁ ½ ² Ⅷ",
    "\u200b\u200d",
    "'s 'LL I'D",
]
EMOJI = ["😀", "👩‍👩‍👧‍👦 family", "🇫🇷🇩🇪", "x😀y", "👍🏽!!"]
DIGITS = ["1", "12", "123", "1234567890", "3.14159e-10", "0x1F_FF", "1,000,000", "٣٤٥", "v2.0.1-rc3"]


def texts(target: Target, count: int) -> list[str]:
    """At least `count`, the same for every file but for its special tokens."""
    found = [*SCRIPTS, *ODD, *EMOJI, *DIGITS]
    special = [str(token) for token in target.tokenizer.all_special_tokens][:12]
    found += [f"x{token}y {token} z{token}" for token in special]
    found += [f"{a} {b}" for a, b in itertools.pairwise([*SCRIPTS, *EMOJI, *DIGITS])]
    return [*found, *itertools.islice(code(), max(0, count - len(found)))]


def code() -> Iterator[str]:
    """Pieces of Python's own library, of growing length."""
    for number, path in enumerate(sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))):
        text = path.read_text(encoding="utf-8", errors="ignore")
        start = len(text) // 3
        yield text[start : start + 20 + 7 * number]


def compare(path: str, count: int) -> dict[str, Any]:
    """How many texts differ, and the first of them."""
    target = Target.at(path)
    chosen = texts(target, count)
    different = []
    with LlamaServer(ServerSettings(str(target.gguf_file), room=64, threads=1)) as server:
        for text in chosen:
            asked = {"content": text, "parse_special": True, "add_special": False}
            theirs = server.ask("/tokenize", asked)["tokens"]
            ours = target.tokenizer(text, add_special_tokens=False).input_ids
            if ours != theirs:
                different.append({"text": text[:80], "ours": ours[:24], "llama.cpp": theirs[:24]})
    return {
        "file": Path(path).name,
        "texts": len(chosen),
        "different": len(different),
        "first": different[:5],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="+", metavar="MODEL.gguf")
    parser.add_argument("--texts", type=int, default=240)
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    found = [compare(path, given.texts) for path in given.files]
    print(json.dumps(found, indent=1, ensure_ascii=False))
    if given.output:
        given.output.write_text(json.dumps(found, indent=1, ensure_ascii=False), encoding="utf-8")


if __name__ == "__main__":
    main()
