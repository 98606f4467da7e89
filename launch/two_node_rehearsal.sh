#!/usr/bin/env bash
# Plays two nodes on this machine, on CPUs with gloo: rendezvous, ranks, shared folder, exit codes.
#
#   bash launch/two_node_rehearsal.sh [--nproc-per-node N] RECIPE.yaml [FLAGS...]
#
# Try a launch with it before the cluster does. TORCHRUN_FLAGS="--max-restarts 1" adds flags of
# torchrun. Exit code: 0 if both nodes ended with 0, else the first other one.
set -uo pipefail

processes=1
if [[ ${1-} == --nproc-per-node ]]; then
    processes=${2:?"--nproc-per-node: a number is missing"}
    shift 2
fi
if [[ $# -eq 0 || $1 == -* ]]; then
    echo "usage: bash launch/two_node_rehearsal.sh [--nproc-per-node N] RECIPE.yaml [FLAGS...]" >&2
    exit 2
fi

# Nothing but the loopback interface, and no GPU: both nodes would take the same one.
export CUDA_VISIBLE_DEVICES='' GLOO_SOCKET_IFNAME=lo OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 # as in launch/node.sh
port=$(python3 -c 'import socket; print(socket.create_server(("127.0.0.1", 0)).getsockname()[1])')

nodes=()
# torchrun passes SIGTERM on to its workers, which write a checkpoint.
trap 'kill -TERM "${nodes[@]}" 2>/dev/null; wait' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

for node in 0 1; do
    # shellcheck disable=SC2086  # TORCHRUN_FLAGS holds several words
    torchrun --nnodes 2 --nproc-per-node "$processes" --rdzv-id rehearsal --rdzv-backend c10d \
        --rdzv-endpoint "127.0.0.1:$port" --local-addr 127.0.0.1 ${TORCHRUN_FLAGS-} \
        -m mbv3dist train "$@" &
    nodes+=($!)
done

# A node that fails before they have met would leave the other waiting for ten minutes.
wait -n "${nodes[@]}" || kill -TERM "${nodes[@]}" 2>/dev/null

code=0
for node in 0 1; do
    node_code=0
    wait "${nodes[node]}" || node_code=$?
    echo "node $node: exit code $node_code"
    ((code)) || code=$node_code
done
nodes=() # both have ended: nothing to clean up
exit "$code"
