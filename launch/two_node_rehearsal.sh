#!/bin/bash
# Rehearses a two-node run on one machine, on the CPU: two torchruns, each believing to be a node.
# Finds mistakes in recipe, paths and launch before they cost a queue's wait.
#
#   launch/two_node_rehearsal.sh configs/RECIPE.yaml [--epochs 1 ...]
#
# NPROC=1       processes per "node"
# PORT=29555    where the two meet
# PYTHON=.venv/bin/python
#
# The batches are those of any other run of the recipe on any number of processes. Exit code: 0 if
# both nodes ended well, else that of the first that did not (torchrun turns any failure into 1).

set -u
[ $# -ge 1 ] || { echo "usage: $0 RECIPE.yaml [flags]" >&2; exit 2; }

cd "$(dirname "$0")/.." || exit 2
NPROC=${NPROC:-1}
PORT=${PORT:-29555}
PYTHON=${PYTHON:-.venv/bin/python}
export CUDA_VISIBLE_DEVICES= # both "nodes" would take the same GPUs
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# gloo takes the address of the host's name, which need not be reachable; loopback always is.
case $(uname) in Darwin) loopback=lo0 ;; *) loopback=lo ;; esac
export GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-$loopback}

start_node() {
    rank=$1
    shift
    exec "$PYTHON" -m torch.distributed.run --nnodes 2 --node-rank "$rank" \
        --nproc-per-node "$NPROC" --master-addr 127.0.0.1 --master-port "$PORT" \
        -m mbv3dist train "$@"
}

start_node 0 "$@" &
node0=$!
start_node 1 "$@" &
node1=$!
trap 'kill -TERM "$node0" "$node1" 2>/dev/null' INT TERM

# If one node fails the other would wait for it: stop it too.
wait -n "$node0" "$node1"
code=$?
[ "$code" = 0 ] || kill -TERM "$node0" "$node1" 2>/dev/null
for node in "$node0" "$node1"; do
    wait "$node"
    last=$?
    [ "$code" != 0 ] || code=$last
done
exit "$code"
