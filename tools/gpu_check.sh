#!/usr/bin/env bash
# Everything that only a GPU can show, in the order of what it tells: tools/gpu_check.sh [--device cpu] [--wheels DIR] ...
# Writes benchmarks/results/gpu-DEVICE.json and prints a table; `--help` lists the parts. A part that fails does not stop
# the others; the exit status says whether all passed.
#
# --wheels DIR installs what tools/gpu_wheels.sh has put there, on a machine that reaches no registry.
set -euo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
if [ "${1:-}" = --wheels ]; then
    "$python" -m pip install --quiet --no-index --no-deps --no-compile "$2"/*.whl
    shift 2
fi
export PYTHONPATH="$PWD:$PWD/applications" HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
exec "$python" tools/gpu_check.py "$@"
