"""Real acceptance at real sizes: grows a trained pair, compresses it as it would be deployed, and times it on this device.

    fastdraft run starter
    python benchmarks/real_size_pair.py --draft runs/starter/export/huggingface --output real-size

Grows the target to about a billion parameters and the draft to the shape published as 50 M (27.7 M at the starter's vocabulary of
8192); growing/tensors.py says how outputs stay the same. Writes OUTPUT/recipe.yaml and runs it: export to OpenVINO (int4 target,
int8 draft), benchmark, report. Needs 8 GB of memory and leaves 3 GB on the disk. The same command goes on where it was interrupted.

Decides that a grown model is made once and is taken again only when its record says the same source and shape; that both get a
head of their own, as large models have; that the draft is stored in float32, so that int8 rounds the very weights that were
trained; and that everything after growing is an ordinary recipe.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parent))  # also when this file is loaded by its path

from growing.model import RECORD, grow_model, record_of, shape_of
from growing.tensors import DTYPES, Storage

from fastdraft.console import Console
from fastdraft.errors import FastDraftError
from fastdraft.run_folder import read_json, write_atomic

TARGET_SHAPE = (2048, 22, 5632, 32, 8)
DRAFT_SHAPE = (512, 6, 1408, 8, 8)
_SIZES = ("hidden_size", "num_layers", "intermediate_size", "num_heads", "num_kv_heads")
_METAVAR = ("HIDDEN", "LAYERS", "INTERMEDIATE", "HEADS", "KV_HEADS")
_STEPS = ("grow", "export", "run")


def grown(model: str, folder: Path, sizes: Sequence[int], storage: Storage, console: Console) -> Path:
    """The larger model, made or found.

    Raises:
        FastDraftError: when the folder holds another one. FastDraftError: whatever growing raises.
    """
    changes: dict[str, Any] = dict(zip(_SIZES, sizes, strict=True))
    wanted = replace(shape_of(model)[1], **changes, tied=False)
    if not folder.exists():
        record = grow_model(model, folder, wanted, storage, console)
        change, size = record["check"]["max_difference"], record["bytes"] / 1e6
        console.say(
            f"{folder}: {wanted.parameters:,} parameters, {size:,.1f} MB, logits changed by {change:.1e}"
        )
        return folder
    found = read_json(folder / RECORD)
    expected = json.loads(json.dumps(record_of(model, wanted, storage)))
    changed = [key for key, value in expected.items() if found.get(key) != value]
    if changed:
        remedy = "delete the folder or name another --output"
        raise FastDraftError(
            folder, f"another {', '.join(changed)}", "holds a model grown from something else", remedy
        )
    console.say(f"{folder}: already grown")
    return folder


def recipe(arguments: argparse.Namespace, target: Path, draft: Path) -> dict[str, Any]:
    """What runs on the grown pair."""
    tasks = [
        {"kind": kind, "max_new_tokens": arguments.max_new_tokens}
        for kind in ("code", "text", "instructions")
    ]
    return {
        "run": {"name": "run", "folder": str(arguments.output.resolve()), "threads": arguments.threads},
        "target": {"model": str(target.resolve())},
        "design": {"draft": {"kind": "from", "path": str(draft.resolve())}},
        "export": {
            "formats": ["huggingface", "openvino"],
            "openvino": {"target": arguments.weights[0], "draft": arguments.weights[1]},
        },
        "benchmark": {
            "weights": [{"target": arguments.weights[0], "draft": arguments.weights[1]}],
            "tasks": tasks,
            "prompts": arguments.prompts,
            "num_speculative_tokens": arguments.num_speculative_tokens,
            "repeats": arguments.repeats,
        },
        "report": {},
    }


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--target",
        default="shipped:targets/starter",
        help="the trained target (default: the shipped starter)",
    )
    parser.add_argument("--draft", required=True, help="the draft trained for it: a Hugging Face directory")
    parser.add_argument(
        "--output", type=Path, required=True, help="folder of the grown models, the recipe and its run"
    )
    parser.add_argument(
        "--target-shape",
        type=int,
        nargs=5,
        default=TARGET_SHAPE,
        metavar=_METAVAR,
        help="default 1.03 B parameters",
    )
    parser.add_argument(
        "--draft-shape",
        type=int,
        nargs=5,
        default=DRAFT_SHAPE,
        metavar=_METAVAR,
        help="default: published as 50 M",
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, default="fp16", help="in which the grown target is stored (default fp16)"
    )
    parser.add_argument(
        "--weights",
        nargs=2,
        default=["int4", "int8"],
        metavar=("TARGET", "DRAFT"),
        help="deployed precisions",
    )
    parser.add_argument("--prompts", type=int, default=8, help="of each task (default 8)")
    parser.add_argument("--max-new-tokens", type=int, default=96, help="of each answer (default 96)")
    parser.add_argument(
        "--num-speculative-tokens", type=int, nargs="+", default=[1, 2, 3, 4, 5, 6], metavar="K"
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--threads", type=int, default=0, help="CPU threads of torch; 0 leaves its own choice"
    )
    parser.add_argument(
        "--until",
        choices=_STEPS,
        default="run",
        help="stop after growing, or after the export (default: run everything)",
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    given, console = parse(arguments), Console()
    try:
        target = grown(
            given.target, given.output / "target", given.target_shape, Storage(given.dtype), console
        )
        draft = grown(given.draft, given.output / "draft", given.draft_shape, Storage("fp32"), console)
        path = given.output / "recipe.yaml"
        write_atomic(path, yaml.safe_dump(recipe(given, target, draft), sort_keys=False))
    except FastDraftError as error:
        print(f"real_size_pair: {error}", file=sys.stderr)
        return error.exit_code
    verbs = {"grow": [], "export": ["design", "export"], "run": ["run"]}[given.until]
    for verb in verbs:  # in processes of their own: memory used for growing is given back
        code = subprocess.call([sys.executable, "-m", "fastdraft", verb, str(path)])
        if code:
            return code
    return 0


if __name__ == "__main__":
    sys.exit(main())
