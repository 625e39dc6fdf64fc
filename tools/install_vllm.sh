#!/usr/bin/env bash
# Usage: tools/install_vllm.sh PYTHON TORCH...
# Makes .venv-vllm (4 GB): coati, Colossal-AI and vLLM for a CPU, for --rollout_engine vllm, tests/rollout/test_vllm.py and
# benchmarks/generation.py. TORCH... is what pip gets to install torch: the version that vLLM was built with.
set -euo pipefail

python=$1
shift
cd "$(dirname "$0")/.."

venv=.venv-vllm
[ -e "$venv/.ready" ] && exit
echo "Making $venv (several minutes)"
"$python" -m venv --clear "$venv"
pip=("$venv/bin/python" -m pip --disable-pip-version-check)
install=("${pip[@]}" install --quiet --progress-bar off)
"${install[@]}" "$@"
"$venv/bin/python" -c 'from importlib.metadata import version as v; print("torch==" + v("torch"))' >"$venv/torch.txt"
grep -v '^numpy' requirements.txt >"$venv/requirements.txt" # vLLM's mistral_common wants an older one
"${install[@]}" --constraint "$venv/torch.txt" --requirement "$venv/requirements.txt" --editable ".[vllm]"
"${install[@]}" --no-deps --requirement requirements-colossalai.txt
# vLLM asks for these, built for another torch; transformers would import them and fail
"${pip[@]}" uninstall --quiet --yes torchvision torchaudio torchcodec
"$venv/bin/python" -c "import colossalai, peft, vllm"
touch "$venv/.ready"
