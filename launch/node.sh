#!/usr/bin/env bash
# Trains on this node as one of several; SLURM and Kubernetes start it once per node.
#
#   RUN=runs/NAME bash launch/node.sh TORCHRUN_FLAGS... -m mbv3dist train RECIPE.yaml [FLAGS...]
#
# RUN, on a file system that all nodes share, becomes --out and --name; --resume auto is added.
#
# SIGUSR1 or SIGTERM to this script asks the whole run, on all nodes, for a checkpoint. The workers
# are told by SIGUSR1 and torchrun is left alone: told itself, it would kill workers that take more
# than 30 s, and fail.
#
# Exit code: 0 the run is complete; 75 (EX_TEMPFAIL) a checkpoint was asked for on some node and
# written, start again on all nodes; else torchrun's, and its output says why.
set -uo pipefail

if [[ ${RUN-} != */* || $# -eq 0 ]]; then
    echo "usage: RUN=runs/NAME bash launch/node.sh TORCHRUN_FLAGS... -m mbv3dist train RECIPE" >&2
    exit 2
fi

# Restarted workers (--max-restarts) need a store of their own: in the shared one they find the
# addresses of the processes before them, and fail or hang (seen with torch 2.15; pytorch#135712).
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

asked=0
trap 'asked=1' TERM USR1

# An ignored signal stays ignored across exec: SIGUSR1 cannot harm torchrun, nor a worker that is
# still importing. The training loop installs its own handler.
(
    trap '' USR1
    exec torchrun "$@" --out "${RUN%/*}" --name "${RUN##*/}" --resume auto
) &
torchrun=$!

children() { # process ids of the children of $1; without pgrep, which slim images lack
    cat /proc/[0-9]*/status 2>/dev/null |
        awk -v parent="$1" '$1 == "Pid:" { pid = $2 } $1 == "PPid:" && $2 == parent { print pid }'
}

code=0
wait "$torchrun" || code=$?
# A trapped signal ends `wait` early. The request is repeated, in case a worker was not ready.
while ((asked)) && kill -0 "$torchrun" 2>/dev/null; do
    for worker in $(children "$torchrun"); do
        kill -USR1 "$worker" 2>/dev/null
    done
    sleep 2
done
if ((asked)); then
    code=0
    wait "$torchrun" || code=$?
fi

# last/ appears when all steps are done, before any rank leaves. A node that got no signal itself
# must not take the end of a stopped run for success.
if ((code == 0)) && [[ ! -d $RUN/last ]]; then
    exit 75
fi
exit "$code"
