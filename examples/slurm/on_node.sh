#!/usr/bin/env bash
# One node's part of a job: on_node.sh LAUNCHER... runs the launcher, and tells the ranks below it
# when they are to stop: they then save a checkpoint and end. @NODE_RANK@ in the command stands for
# the number of the node, @RANKS@ for its ranks: RANKS_PER_NODE, or one a GPU of the step.
# With DRY_RUN set it says what would start here; without a command, what there is to start on.
#
# The file STOP_REQUEST asks to stop. SIGUSR1 and SIGTERM to this script make it, so that it does not
# matter how early they come, nor how SLURM delivers them: to this script alone, or to all of a step.

trap 'touch "$STOP_REQUEST"' USR1 TERM

ranks=${RANKS_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}
if ((ranks == 0)); then ranks=1; fi
threads=$((SLURM_CPUS_ON_NODE / ranks))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}
command=("${@//@NODE_RANK@/$SLURM_NODEID}")
command=("${command[@]//@RANKS@/$ranks}")

if (($# == 0)); then # number, name, and the numbers of as many GPUs (or CPU ranks)
    devices=${CUDA_VISIBLE_DEVICES:-$(seq --separator=, 0 $((ranks - 1)))}
    echo "$SLURM_NODEID $SLURMD_NODENAME $(cut --delimiter=, --fields=1-"$ranks" <<<"$devices")"
    exit
fi
if [[ -n ${DRY_RUN:-} ]]; then
    echo "node $SLURM_NODEID, $SLURMD_NODENAME: $ranks ranks, $SLURM_CPUS_ON_NODE CPUs," \
        "OMP_NUM_THREADS=$OMP_NUM_THREADS, GPUs ${CUDA_VISIBLE_DEVICES:-none}"
    if ((SLURM_NODEID == 0)); then echo "   ${IN_CONTAINER:-} ${command[*]}"; fi
    exit
fi

# The launchers are to see neither signal: SIGUSR1 would kill them, and on SIGTERM they kill their
# ranks half a minute later. SIGUSR1 is ignored below here until a rank asks for it. SIGTERM, for
# which launchers have handlers, is blocked, also for the ranks: they are told from here.
block='import os, signal, sys
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
try:
    os.execvp(sys.argv[1], sys.argv[1:])
except OSError as error:
    sys.exit(f"error: {sys.argv[1]}: {error.strerror}: activate its environment in common.sh")'
trap '' USR1 TERM
# shellcheck disable=SC2086 # several words, or none
${IN_CONTAINER:-} python3 -c "$block" "${command[@]}" &
launcher=$!
trap 'touch "$STOP_REQUEST"' USR1 TERM

# listening PROCESS: the ranks below it that have a handler for SIGUSR1 (number 10) by now.
listening() {
    local process caught
    for process in $(children "$1"); do
        caught=$(sed -n 's/^SigCgt:[^0-9a-f]*//p' "/proc/$process/status" 2>/dev/null)
        if ((0x${caught:-0} >> 9 & 1)) && grep -qsz ^LOCAL_RANK= "/proc/$process/environ"; then
            echo "$process" # and not what it has started
        else
            listening "$process"
        fi
    done
}
children() { cat "/proc/$1"/task/*/children 2>/dev/null; }

# Each rank once, since a second signal makes it end at once; and until the last of them listens.
declare -A told
while kill -0 "$launcher" 2>/dev/null; do
    if [[ -e $STOP_REQUEST ]]; then
        for rank in $(listening "$launcher"); do
            if [[ -z ${told[$rank]:-} ]]; then kill -USR1 "$rank" && told[$rank]=yes; fi
        done
    fi
    sleep 1 &
    wait -n # for the launcher, a second, or a signal
done
wait "$launcher" # bash remembers its status
