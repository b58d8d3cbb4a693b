"""Is sampled text the target's own, whatever proposes, through both readers? 20,000 samples of each setting.

    python benchmarks/losslessness.py --threads 1 --json losslessness.json

A toy of 6 ids, exported to OpenVINO in float32, with another as its draft, writes three tokens behind one
prompt, sample n from seed n; the 216 texts are held against the target's own probabilities of them (chi-squared,
tests/lossless.py). Asked: p > 0.01 over the number of settings, 30 % of the proposals accepted. Two wrong rules
(recovery drawn from the target's own probabilities; every proposal accepted) must fail with p < 1e-6 at 2,000.
"""

from __future__ import annotations

import sys
import tempfile
import time
from itertools import product
from pathlib import Path

# Also when this file is loaded by its path.
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import pytest
from machine import Report, options, table

from fastdraft.decoding.cache import ReadableModel
from fastdraft.decoding.proposers import ProposerKind
from fastdraft.decoding.reader import Readable
from fastdraft.functional.generation import Sampling
from fastdraft.modeling.drafts import set_threads
from fastdraft.runtimes.openvino_export import convert
from fastdraft.runtimes.openvino_reader import OpenVINOModel
from fastdraft.target import Target
from lossless import TOY_PROMPT, TOY_SIZE, WRONG_RULES, write_toy, written

KINDS: tuple[ProposerKind, ...] = ("draft", "lookup", "lookup_draft")
SAMPLINGS = [Sampling(0.7, top_k=4), Sampling(1.0, top_p=0.9)]
READERS = ("openvino", "transformers")
Pair = tuple[Readable, Readable]


def pairs(folder: Path, threads: int) -> dict[str, Pair]:
    """The same two models through each reader."""
    found: dict[str, list[Readable]] = {reader: [] for reader in READERS}
    for seed in (0, 1):
        source, exported = folder / f"source-{seed}", folder / f"exported-{seed}"
        write_toy(source, seed)
        exported.mkdir()
        convert(Target.at(source), exported, "fp32")
        found["openvino"].append(OpenVINOModel(exported, "exact", threads))
        found["transformers"].append(ReadableModel(Target.at(source).model("cpu")))
    return {reader: (each[0], each[1]) for reader, each in found.items()}


def main() -> None:
    parser = options(__doc__, "losslessness", device=False)
    parser.add_argument("--samples", type=int, default=20_000)
    parser.add_argument("--readers", nargs="+", choices=READERS, default=list(READERS))
    given = parser.parse_args()
    if given.dry_run:
        given.samples = 200
    set_threads(given.threads)
    report = Report(given.output, "losslessness", "cpu", given)
    settings, failed = list(product(given.readers, KINDS, SAMPLINGS)), 0
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        models = pairs(Path(folder), given.threads)
        for rule, (reader, kind, sampling) in product((None, *WRONG_RULES), settings):
            if rule and sampling != SAMPLINGS[0]:
                continue
            samples = min(given.samples, 2_000) if rule else given.samples
            start, asked = time.monotonic(), (models[reader], sampling, kind, samples, 1)
            with pytest.MonkeyPatch.context() as patch:
                if rule:
                    rule(patch)
                found = written(*asked, prompt=TOY_PROMPT, size=TOY_SIZE)
            good = found.p_value > 0.01 / len(settings) and found.accepted_share >= 0.3
            held = found.p_value < 1e-6 if rule else good
            failed += not held
            one = {"reader": reader, "proposer": kind, "sampling": vars(sampling), "samples": samples}
            one |= {"rule": rule.__name__ if rule else "ours", "p_value": found.p_value, "held": held}
            report.add(one | {"accepted_share": found.accepted_share, "seconds": time.monotonic() - start})
            print(report.results[-1], flush=True)
    columns = ["reader", "proposer", "sampling", "rule", "p_value", "accepted_share", "held"]
    print(table(columns, [[str(one[name]) for name in columns] for one in report.results]))
    report.finish(failed=failed)
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
