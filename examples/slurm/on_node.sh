#!/usr/bin/env bash
# One node's part of a job: on_node.sh LAUNCHER... runs the launcher, and passes a signal on to the
# ranks below it, which then save a checkpoint and end.
#
# Not to the launcher: neither torchrun nor deepspeed knows SIGUSR1, and would die of it. It is
# ignored here, and thereby in all processes below, until the training program asks for it; so
# SLURM may deliver it to this script alone or to every process of the step.

trap '' USR1
"${@//@NODE_RANK@/$SLURM_NODEID}" &
launcher=$!

descendants() {
    local child
    for child in $(pgrep -P "$1"); do
        echo "$child"
        descendants "$child"
    done
}

tell_ranks() {
    local ranks
    mapfile -t ranks < <(descendants "$launcher")
    kill -USR1 "${ranks[@]}" 2>/dev/null
}
trap tell_ranks USR1 TERM

# bash's wait returns early when a trap has run, and remembers the status of what has ended.
while kill -0 "$launcher" 2>/dev/null; do wait "$launcher"; done
wait "$launcher"
