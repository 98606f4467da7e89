#!/usr/bin/env bash
# Trains on several nodes under SLURM and goes on after the time limit, until the run is complete.
#
#   sbatch launch/slurm.sh RECIPE.yaml --mixed_precision bf16 [FLAGS...]
#   sbatch --nodes 4 --export=ALL,RUN=runs/other launch/slurm.sh RECIPE.yaml
#
# Submit it from the root of the repository, on a file system that all nodes share, with the
# environment active. Adjust to the cluster: partition, account, GPUs, CPUs per GPU, time.
#
# Two minutes before the time limit SLURM signals this script, which passes it to every node
# (launch/node.sh): a checkpoint is written, and the job queues again under the same id.
#SBATCH --job-name=mbv3dist
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=04:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.log
set -uo pipefail

if [[ $# -eq 0 ]]; then
    echo "usage: sbatch launch/slurm.sh RECIPE.yaml [FLAGS...]" >&2
    exit 2
fi
name=${1##*/}
export RUN=${RUN:-runs/${name%.yaml}}

# All nodes meet at the first one. Jobs that share that node get different ports.
mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
endpoint=${hosts[0]}:$((20000 + SLURM_JOB_ID % 10000))

# One torchrun per node, which starts a process per GPU. A node that fails ends the others.
srun --kill-on-bad-exit=1 bash launch/node.sh \
    --nnodes "$SLURM_NNODES" --nproc-per-node "$SLURM_GPUS_ON_NODE" \
    --rdzv-backend c10d --rdzv-id "$SLURM_JOB_ID" --rdzv-endpoint "$endpoint" \
    -m mbv3dist train "$@" &
srun=$!

# srun passes SIGUSR1 on to the task of every node. A trapped signal ends `wait` early.
asked=0 again=0
trap 'asked=1 again=1; kill -USR1 "$srun"' USR1
while :; do
    code=0
    wait "$srun" || code=$?
    ((again)) || break
    again=0
done

# 75: stopped with a checkpoint. `asked` alone is enough, since srun may end other nodes' tasks
# (--kill-on-bad-exit) as soon as the first has said 75.
if ((asked || code == 75)) && [[ ! -d $RUN/last ]]; then
    echo "job $SLURM_JOB_ID: stopped before the end of $RUN, queueing again"
    exec scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
