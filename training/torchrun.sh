#!/usr/bin/env bash
# One training on several machines without a scheduler. Run the same line on each, in any order, within ten minutes:
#
#     training/torchrun.sh HOST NODES RECIPE --out /shared/run [--set field=value ...]
#
# HOST is one of the machines (all must reach its port 29400), NODES how many there are: "2", or "1:4" for a training
# that goes on with fewer when some are lost. /shared is a disk of them all.
set -euo pipefail
host=$1 nodes=$2
shift 2
exec torchrun \
    --nnodes="$nodes" \
    --nproc-per-node="${PROCESSES:-gpu}" \
    --rdzv-backend=c10d \
    --rdzv-endpoint="$host:${PORT:-29400}" \
    --rdzv-id="${RUN_ID:-occflow}" \
    --max-restarts="${RESTARTS:-3}" \
    -m occflow_core train "$@"
