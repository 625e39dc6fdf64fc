#!/usr/bin/env bash
# Installs SLURM and munge from Debian's or Ubuntu's packages, if they are missing, for `make test-slurm`.
set -euo pipefail

if command -v slurmctld && command -v slurmd && command -v munged && command -v srun; then
    exit
fi >/dev/null
if ! command -v apt-get >/dev/null || [ "$(id -u)" != 0 ]; then
    echo "error: the SLURM tests need slurmctld, slurmd and munged: run this as root where there is apt-get," \
        "or install SLURM and munge yourself." >&2
    exit 1
fi
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
apt-get install -qq --yes --no-install-recommends slurm-wlm munge >/dev/null
