#!/usr/bin/env bash
# Usage: tools/install.sh VENV TORCH...
# Makes the virtual environment VENV if it is missing and installs coati and all it needs into it.
# TORCH... is what pip gets to install torch: it comes first, and nothing after it may replace it.
set -euo pipefail

venv=$1
shift
cd "$(dirname "$0")/.."

source tools/find_python.sh

if ! "$venv/bin/python" -c "import pip" >/dev/null 2>&1; then
    python=$(find_python)
    echo "Making $venv with $("$python" --version)"
    "$python" -m venv --clear "$venv"
fi

pip=("$venv/bin/python" -m pip --disable-pip-version-check install --quiet --progress-bar off)
echo "Installing torch ($*)"
"${pip[@]}" "$@"
"$venv/bin/python" -c 'from importlib.metadata import version as v; print("torch==" + v("torch"))' >"$venv/torch.txt"
echo "Installing the other packages (a few minutes)"
"${pip[@]}" --constraint "$venv/torch.txt" --requirement requirements.txt --editable .
"${pip[@]}" --no-deps --requirement requirements-colossalai.txt
