#!/usr/bin/env bash
# What the two job scripts share; they source it, on the first node of the allocation.
# Reads the variables of README.md, and takes the flags of pretrain_longnet.py as arguments.
# shellcheck disable=SC2034 # the job scripts use the variables

repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
run=${RUN:-runs/slurm}
flags=()
for flag in "$@"; do
    if [[ $flag == --dry-run ]]; then export DRY_RUN=1; else flags+=("$flag"); fi
done
if ((${#flags[@]} == 0)); then # to try it out: a small model on what `make quickstart` leaves
    flags=(--data-path "$repository/runs/quickstart/data/python_text_document"
        --tokenizer-model "$repository/runs/quickstart/tokenizer.model"
        --num-layers 12 --hidden-size 768 --num-attention-heads 12 --seq-length 8192
        --train-iters 2000)
fi
training=("$repository/pretrain_longnet.py" "${flags[@]}" --save "$run" --load "$run")

if [[ -z ${SLURM_JOB_ID:-} ]]; then # not a job
    if [[ -z ${DRY_RUN:-} ]]; then
        echo "error: a job script: sbatch $0 ..., or bash $0 --dry-run" >&2
        exit 2
    fi
    if ! timeout 20 sinfo >/dev/null 2>&1; then # where there is no SLURM it looks for three minutes
        echo "error: --dry-run outside of a job needs a machine that can submit to SLURM" >&2
        exit 2
    fi
    sbatch --test-only "$0" || exit
    echo "sbatch [OPTIONS] $0 --dry-run ... says what would start there, and starts nothing."
    exit
fi
mkdir -p "$run" || exit

# One launcher a node, with all that the job has there, whatever it says of tasks: srun reads these.
unset SLURM_CPUS_PER_TASK SLURM_GPUS_PER_TASK SLURM_TRES_PER_TASK
on_each_node=(srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES"
    --ntasks-per-node=1 --kill-on-bad-exit=1)
on_node=$repository/examples/slurm/on_node.sh

# The Python environment: a container, or that of `make`, if there is one. Else add here: module
# load, conda activate. CONTAINER_MOUNTS: where data and runs are, SOURCE:TARGET[,SOURCE:TARGET...].
mounts=$repository:$repository,$PWD:$PWD${CONTAINER_MOUNTS:+,$CONTAINER_MOUNTS}
in_container=()
case ${CONTAINER:-} in
    '') if [[ -d $repository/.venv ]]; then export PATH=$repository/.venv/bin:$PATH; fi ;;
    *.sif) # apptainer
        export IN_CONTAINER="apptainer exec --nv --bind $mounts --pwd $PWD $CONTAINER"
        ;;
    *) # enroot, by pyxis
        in_container=(--container-image="$CONTAINER" --container-mounts="$mounts"
            --container-workdir="$PWD")
        ;;
esac

# Where the ranks meet: the first node of the allocation, on a port that follows from the job, below
# those that systems give to whoever asks.
mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
master_addr=${nodes[0]}
master_port=$((10000 + SLURM_JOB_ID % 20000))

# NCCL finds its way on most clusters. What to set where it does not, or is slow:
# Interfaces for the first contact of the ranks (NCCL, gloo), where the host name resolves to one
# that the nodes cannot reach each other by; a ^ excludes. `ip -brief address` lists them.
#   export NCCL_SOCKET_IFNAME=^lo,docker GLOO_SOCKET_IFNAME=eth0
# InfiniBand or RoCE adapters to use, where some are for storage only; `ibv_devices` lists them.
#   export NCCL_IB_HCA=mlx5_0,mlx5_1
# RoCE only: the entry of the address table that is routable, usually 3.
#   export NCCL_IB_GID_INDEX=3
# Whether a ring may enter a node by one adapter and leave by another: 0 for rail-optimised
# networks, where that costs an extra hop, 1 where all adapters hang on one switch.
#   export NCCL_CROSS_NIC=0
# Which of these took effect: look for "NET/IB" (good) or "NET/Socket" (slow) in the output.
#   export NCCL_DEBUG=INFO NCCL_DEBUG_SUBSYS=INIT,NET
# PyTorch's record of each rank's last collectives, to be written when one times out (after
# --distributed-timeout-minutes): it shows which rank hung where.
#   export TORCH_NCCL_DUMP_ON_TIMEOUT=1
#   export TORCH_FR_DUMP_TEMP_FILE=$(realpath "$run")/collectives_of_rank_
# Leave TORCH_NCCL_ASYNC_ERROR_HANDLING alone: its default ends a rank whose collective failed.
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}

# A signal to this script is passed on to the ranks: by srun, and by a file for the nodes whose part
# has not started yet.
export STOP_REQUEST=$run/.stop_request_$SLURM_JOB_ID
step=
asked=
ask_to_stop() {
    asked=yes
    touch "$STOP_REQUEST"
    # Not TERM, on which srun kills its step.
    if [[ -n $step ]]; then kill -USR1 "$step" 2>/dev/null; fi
}
rm -f "$STOP_REQUEST"
trap ask_to_stop USR1 TERM
if [[ -n ${early:-} ]]; then ask_to_stop; fi

# job_is STATE: whether `scontrol show job` has this now.
job_is() { [[ $(scontrol show job "$SLURM_JOB_ID") == *"$1"* ]]; }

# run_step LAUNCHER...: run it on every node until the end, and see to it that the job starts again,
# exactly once, if the training has stopped without being finished.
run_step() {
    local command status preempted=true
    command=("${on_each_node[@]}" "${in_container[@]}" bash "$on_node" "$@")
    if [[ -n ${DRY_RUN:-} ]]; then
        echo "${command[*]:0:${#command[@]}-$#} ..."
        exec "${command[@]}"
    fi
    rm -f "$run/stopped"
    "${command[@]}" &
    step=$!
    # bash's wait returns early when a trap has run, and remembers the status of what has ended.
    while kill -0 "$step" 2>/dev/null; do wait "$step"; done
    wait "$step"
    status=$?
    trap '' USR1 TERM
    # A node's part that was not yet as far as its trap (a slow file system, a container, a long
    # BASH_ENV) has died of SIGUSR1, and srun may have ended those of other nodes by SIGTERM.
    if ((status == 128 + 10)) || { ((status == 128 + 15)) && [[ -n $asked ]]; }; then
        echo "stopped while the nodes' parts were starting" >"$run/stopped"
    fi
    rm -f "$STOP_REQUEST"

    # SLURM requeues a job that it has preempted however it ends, and once more if we do it too.
    if ! job_is PreemptTime=2; then preempted=false; fi # a date, from the year 2000 on
    if [[ ! -e $run/stopped ]]; then
        if $preempted && ((status == 0)); then scontrol update JobId="$SLURM_JOB_ID" Requeue=0; fi
        exit "$status"
    fi
    cat "$run/stopped"
    if $preempted; then
        echo "preempted: SLURM starts this job again, where PreemptMode is REQUEUE"
    elif ! job_is "Restarts=${SLURM_RESTART_COUNT:-0} "; then # by the user, or as a node failed
        echo "requeued already: SLURM starts this job again, in two minutes at the earliest"
    elif { job_is JobState=RUNNING || job_is Reason=TimeLimit; } &&
        scontrol requeue "$SLURM_JOB_ID"; then
        echo "requeued: SLURM starts this job again, in two minutes at the earliest"
    else
        echo "not requeued: submit it again to go on"
    fi
    exit 0
}
