#!/usr/bin/env bash
# One training on several machines under SLURM, begun again and gone on with when the job is preempted or a node fails:
#
#     sbatch --nodes=2 --gpus-per-node=8 training/slurm.sh RECIPE --out /shared/run [--set field=value ...]
#
# Submit it from the checkout whose .venv `make setup` made (or have `torchrun` on PATH); /shared is a disk of all nodes.
#SBATCH --job-name=occflow
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail
PATH="$SLURM_SUBMIT_DIR/.venv/bin:$PATH"
HOST=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export RUN_ID=$SLURM_JOB_ID
# each node's one task is torchrun, which starts a process for each of its GPUs
exec srun --kill-on-bad-exit=1 bash "$SLURM_SUBMIT_DIR/training/torchrun.sh" "$HOST" "$SLURM_JOB_NUM_NODES" "$@"
