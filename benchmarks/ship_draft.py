"""Puts a draft into the package as the body that `draft: {kind: from, path: "shipped:drafts/NAME"}` begins from.

python benchmarks/ship_draft.py runs/smollm2/continue_pretrain/checkpoint smollm2
"""

import sys
import tempfile
from pathlib import Path
from shutil import copyfile

import torch

from fastdraft.modeling.drafts import load_draft, save_draft
from fastdraft.run_folder import file_sha256
from fastdraft.target import Target

DRAFTS = Path(__file__).parent.parent / "src/fastdraft/shipped/drafts"


def main(source: str, name: str) -> None:
    """Writes the weights in fp16 beside the config and the tokenizer's files; the README is written by hand."""
    folder = DRAFTS / name
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        saved = Path(temporary) / "draft"
        save_draft(load_draft(Path(source), dtype=torch.float16), saved, Target.at(source))
        for path in sorted(saved.iterdir()):
            copyfile(path, folder / path.name)
            print(f"{file_sha256(folder / path.name)}  {path.stat().st_size:>9}  {path.name}")


if __name__ == "__main__":
    main(*sys.argv[1:])
