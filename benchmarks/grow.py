"""Grows a trained model in width and depth without changing its outputs, so that a small pair can be timed at real sizes.

    python benchmarks/grow.py shipped:targets/starter grown/target --hidden-size 2048 --layers 22 --intermediate-size 5632 \\
        --heads 32 --kv-heads 8 --untied
    python benchmarks/grow.py runs/starter/export/huggingface grown/draft --hidden-size 512 --layers 6 --intermediate-size 1408 \\
        --heads 8 --kv-heads 8 --untied

Acceptance is then that of the trained pair, latency and memory those of a pair of the larger shapes. Options left out keep
the source's value; llama, mistral, qwen2 and qwen3. growing/tensors.py has the mathematics.

Decides the command line and what is said about the result.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parent))  # also when this file is loaded by its path

from growing.model import grow_model, shape_of
from growing.tensors import DTYPES, Storage

from fastdraft.console import Console
from fastdraft.errors import FastDraftError


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"grow: {message.removeprefix('argument ')}; see --help\n")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = _Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "source", metavar="SOURCE", help="directory, hub id or shipped: name of a trained model"
    )
    parser.add_argument("output", metavar="OUTPUT", type=Path, help="directory to write; must not exist")
    parser.add_argument(
        "--hidden-size",
        type=int,
        help="width of the residual stream; multiples of 128 keep int4 groups apart",
    )
    parser.add_argument("--layers", type=int)
    parser.add_argument("--intermediate-size", type=int, help="width of the feed-forward part")
    parser.add_argument("--heads", type=int, help="query heads")
    parser.add_argument("--kv-heads", type=int, help="key-value heads")
    parser.add_argument("--head-dim", type=int, help="must be the source's")
    parser.add_argument("--untied", action="store_true", help="give the head a matrix of its own")
    parser.add_argument("--context-length", type=int, help="positions that the config allows")
    parser.add_argument(
        "--dtype", choices=DTYPES, default="fp16", help="stored precision of the matrices (default fp16)"
    )
    parser.add_argument(
        "--fill",
        choices=("random", "zero"),
        default="random",
        help="what stands where the output cannot see it",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the random values")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    given, console = parse(arguments), Console()
    try:
        _, source = shape_of(given.source)
        asked = {
            "hidden_size": given.hidden_size,
            "num_layers": given.layers,
            "intermediate_size": given.intermediate_size,
            "num_heads": given.heads,
            "num_kv_heads": given.kv_heads,
            "head_dim": given.head_dim,
            "context_length": given.context_length,
        }
        changes = {name: value for name, value in asked.items() if value is not None}
        wanted = replace(source, **changes, tied=source.tied and not given.untied)
        record = grow_model(
            given.source, given.output, wanted, Storage(given.dtype, given.fill, given.seed), console
        )
    except FastDraftError as error:
        print(f"grow: {error}", file=sys.stderr)
        return error.exit_code
    check, megabytes = record["check"], f"{record['bytes'] / 1e6:,.1f} MB"
    print(f"{given.output}: {source.parameters:,} -> {wanted.parameters:,} parameters, {megabytes}")
    print(
        f"logits up to {check['largest_logit']:.1f} differ by {check['max_difference']:.1e}, with the rounding to {given.dtype} by "
        f"{check['max_difference_to_source']:.1e}; greedy tokens equal at {check['greedy_agreement']:.2%} of {check['places']} places"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
