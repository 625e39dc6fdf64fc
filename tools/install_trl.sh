#!/usr/bin/env bash
# Usage: tools/install_trl.sh PYTHON TORCH...
# Makes .venv-trl (1.12, the last TRL with value heads and PPO), .venv-trl-0.11 (the last with transformers 4 habits) and
# .venv-trl-1.16 (today's): benchmarks/ measures beside the first and the last, and with the first two
# tests/models/compat/test_trl.py exchanges checkpoints. TORCH... is what pip gets to install torch.
set -euo pipefail

python=$1
shift
cd "$(dirname "$0")/.."

make_venv() {
    local venv=$1
    shift
    [ -e "$venv/.ready" ] && return
    echo "Making $venv"
    "$python" -m venv --clear "$venv"
    local pip=("$venv/bin/python" -m pip --disable-pip-version-check install --quiet --progress-bar off)
    "${pip[@]}" "${torch[@]}"
    "${pip[@]}" "$@"
    "$venv/bin/python" -c "import trl, peft"
    touch "$venv/.ready"
}

torch=("$@")
make_venv .venv-trl trl==1.12.0 transformers==5.17.0 peft==0.21.2
make_venv .venv-trl-1.16 trl==1.16.0 transformers==5.17.0 peft==0.21.2
make_venv .venv-trl-0.11 trl==0.11.4 transformers==4.46.3 peft==0.13.2 "accelerate<1.2" "numpy<2.3"
