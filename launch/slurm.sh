#!/usr/bin/env bash
# sbatch launch/slurm.sh launch.brittleness --config=configs/brittleness/llama2_13b_chat.py --out=$SCRATCH/llama2_13b
# An example: one process a GPU, in an environment where `pip install ".[gpu]"` was run. JAX finds the processes.
#SBATCH --job-name=jaxsafe
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=8
#SBATCH --time=08:00:00
#SBATCH --requeue
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:?}"
. "${VENV:-.venv}/bin/activate"
# A task that dies ends the job; requeued or submitted again, it goes on from what is finished.
srun --kill-on-bad-exit=1 python -m "$@" --distributed
