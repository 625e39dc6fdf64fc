#!/usr/bin/env bash
# Usage: tools/install_docs.sh VENV
# Makes the virtual environment VENV with what builds the documentation. coati itself is not installed: the reference is
# read from the sources.
set -euo pipefail

venv=$1
cd "$(dirname "$0")/.."
source tools/find_python.sh

python=$(find_python)
echo "Making $venv with $("$python" --version)"
"$python" -m venv --clear "$venv"
"$venv/bin/python" -m pip --disable-pip-version-check install --quiet --progress-bar off --requirement requirements-docs.txt
