#!/bin/bash
# Several nodes under SLURM: one torchrun per node, one process per GPU.
#
#   sbatch launch/slurm.sh configs/RECIPE.yaml [--optim.lr 0.1 ...]
#
# Ten minutes before the time limit SLURM sends SIGUSR1 to this script, which hands it to all ranks.
# They agree on a step, write a checkpoint and end; the job goes back into the queue and goes on from
# there (`--resume auto`). After a node failure SLURM requeues it too, from the last checkpoint.
#
# Exit codes: 0 finished, or stopped and requeued; else the job failed. torchrun turns every failure
# of a rank into 1: the line `mbv3dist: error: ...` above says which one it was.
#
#SBATCH --job-name=mbv3dist
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@600
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.out

set -u
[ $# -ge 1 ] || { echo "usage: sbatch launch/slurm.sh RECIPE.yaml [flags]" >&2; exit 2; }

PYTHON=${PYTHON:-.venv/bin/python}
GPUS_PER_NODE=${GPUS_PER_NODE:-${SLURM_GPUS_ON_NODE:-8}}
HEAD_NODE=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
PORT=$((20000 + SLURM_JOB_ID % 20000)) # its own for each job: two may share a node
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-2} # the decoding threads (data.num_threads) come on top

asked=0
hand_on() {
    asked=1
    echo "the time limit is near: asking all ranks for a checkpoint"
    scancel --signal=USR1 "$SLURM_JOB_ID" # reaches every process of the job's steps, not this script
}
trap hand_on USR1

# torchrun dies of SIGUSR1 and takes its ranks along. Ignored here, it stays ignored in torchrun;
# the ranks set a handler of their own.
srun --kill-on-bad-exit=1 bash -c 'trap "" USR1; exec "$@"' torchrun \
    "$PYTHON" -m torch.distributed.run \
    --nnodes="$SLURM_JOB_NUM_NODES" --nproc-per-node="$GPUS_PER_NODE" \
    --rdzv-backend=c10d --rdzv-id="$SLURM_JOB_ID" --rdzv-endpoint="$HEAD_NODE:$PORT" \
    -m mbv3dist train "$@" --resume auto &
step=$!

# A trapped signal ends `wait` early, with a code above 128: wait until the step itself has ended.
wait "$step"
code=$?
while kill -0 "$step" 2>/dev/null; do
    wait "$step"
    code=$?
done

if [ "$asked" = 1 ] && [ "$code" = 0 ]; then
    echo "requeueing job $SLURM_JOB_ID"
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
