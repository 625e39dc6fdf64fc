#!/usr/bin/env bash
# Usage: tools/gpu_wheels.sh DIR [PYTHON-VERSION]
# Fills DIR with the wheels that coati needs beside torch, transformers and peft, for a Linux GPU machine (x86-64) that
# reaches no registry: some 15 MB. `tools/gpu_check.sh --wheels DIR` installs them there.
set -euo pipefail

folder=$1
version=${2:-3.12}
cd "$(dirname "$0")/.."
mkdir -p "$folder"
python=$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)

platforms=(manylinux_2_34_x86_64 manylinux_2_28_x86_64 manylinux_2_27_x86_64 manylinux_2_24_x86_64
    manylinux_2_17_x86_64 manylinux2014_x86_64 manylinux1_x86_64)
download=("$python" -m pip --disable-pip-version-check download --quiet --no-deps --only-binary=:all: --implementation cp
    --python-version "$version" "${platforms[@]/#/--platform=}" --dest "$folder")
for package in galore_torch==1.0 datasets==5.2.0 dill multiprocess fabric==3.2.3 invoke paramiko decorator deprecated \
    bcrypt pynacl cryptography cffi pycparser math-verify==0.9.0 latex2sympy2_extended antlr4-python3-runtime==4.13.2 \
    jsonschema==4.26.0 prometheus-client==0.26.0 rpds-py referencing jsonschema-specifications bitsandbytes==0.50.2; do
    "${download[@]}" "$package"
done
"$python" -m pip --disable-pip-version-check wheel --quiet --no-deps --no-build-isolation --wheel-dir "$folder" colossalai==0.5.0
# its libraries for other CUDA versions and other makers' devices are 100 MB
zip --quiet --delete "$folder"/bitsandbytes*.whl '*cuda11*' '*cuda12*' '*cuda132*' '*rocm*' '*xpu*'
du -sh "$folder"
