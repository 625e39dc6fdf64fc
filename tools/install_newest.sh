#!/usr/bin/env bash
# Usage: tools/install_newest.sh PYTHON TORCH...
# Makes .venv-newest: coati with the newest of all packages that setup.py allows, whatever requirements.txt pins.
# TORCH... is what pip gets to install torch, which comes first.
set -euo pipefail

python=$1
shift
cd "$(dirname "$0")/.."

venv=.venv-newest
echo "Making $venv (several minutes)"
"$python" -m venv --clear "$venv"
pip=("$venv/bin/python" -m pip --disable-pip-version-check install --quiet --progress-bar off --upgrade)
"${pip[@]}" "$@"
"$venv/bin/python" -c 'from importlib.metadata import version as v; print("torch==" + v("torch"))' >"$venv/torch.txt"
"${pip[@]}" --upgrade-strategy eager --constraint "$venv/torch.txt" --editable ".[dev,llama,eval]" math-verify jsonschema
"${pip[@]}" --no-deps --requirement requirements-colossalai.txt
"$venv/bin/python" -m pip freeze | grep -iE '^(torch|transformers|peft|datasets|tokenizers|colossalai)=='
