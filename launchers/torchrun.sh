#!/bin/bash
# A run with torchrun, started by hand or by a tool on every node: launchers/torchrun.sh RUN
#
# RUN is a run's folder on storage that every node sees, made by `python -m bigtrain.launch --freeze ...`.
# Set these on every node; nodes x ranks is the number of ranks of RUN/config.yaml.
#   NODES=2 RANKS=8 HEAD=node0 PORT=29500      JOB names the meeting, the same on every node
set -euo pipefail
run=$(realpath "${1:?usage: [NODES=N RANKS=N HEAD=HOST PORT=N JOB=NAME] launchers/torchrun.sh RUN}")
export PYTHONPATH=$run/code${PYTHONPATH:+:$PYTHONPATH} PYTHONSAFEPATH=1  # the code as it was when the run was frozen

exec "${TORCHRUN:-torchrun}" --nnodes="${NODES:-1}" --nproc-per-node="${RANKS:-1}" \
  --rdzv-backend=c10d --rdzv-endpoint="${HEAD:-127.0.0.1}:${PORT:-29500}" --rdzv-id="${JOB:-bigtrain}" \
  --module bigtrain.train "$run"
