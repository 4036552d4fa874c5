#!/usr/bin/env bash
# What the two job scripts share; they source it, on the first node of the allocation.
# Reads RUN, the run folder, and takes the flags of pretrain_longnet.py as arguments.
# shellcheck disable=SC2034 # the job scripts use the variables

run=${RUN:-runs/slurm}
flags=("$@")
if ((${#flags[@]} == 0)); then # to try it out: a small model on what `make quickstart` leaves
    flags=(--data-path runs/quickstart/data/python_text_document
        --tokenizer-model runs/quickstart/tokenizer.model
        --num-layers 12 --hidden-size 768 --num-attention-heads 12 --seq-length 8192
        --train-iters 2000)
fi
training=(pretrain_longnet.py "${flags[@]}" --save "$run" --load "$run")
mkdir -p "$run"

# The Python environment of `make`, if there is one. Else: module load, conda activate, or a
# container (a flag of srun, below: with pyxis --container-image and --container-mounts).
if [[ -d .venv ]]; then export PATH=$PWD/.venv/bin:$PATH; fi

# Where the ranks meet: the first node of the allocation, on a port that follows from the job.
mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
master_addr=${nodes[0]}
master_port=$((20000 + SLURM_JOB_ID % 20000))
ranks_per_node=${SLURM_GPUS_ON_NODE:-1}

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
#   export TORCH_NCCL_DUMP_ON_TIMEOUT=1 TORCH_FR_DUMP_TEMP_FILE=$(realpath "$run")/collectives_of_rank_
# Leave TORCH_NCCL_ASYNC_ERROR_HANDLING alone: its default ends a rank whose collective failed.
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}

# The ranks end by themselves on a signal; their launchers get this long to see it.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-170}

# wait_for PROCESS: its exit status; bash's own `wait` returns early when a trap has run.
wait_for() {
    while kill -0 "$1" 2>/dev/null; do wait "$1"; done
    wait "$1" # bash remembers
}

# run_step LAUNCHER...: run it on every node until the end, and requeue the job if the training has
# stopped without being finished. @NODE_RANK@ in the command stands for the number of the node.
run_step() {
    local cancelled=false status
    rm -f "$run/stopped"
    srun --ntasks-per-node=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" --kill-on-bad-exit=1 \
        bash examples/slurm/on_node.sh "$@" &
    local step=$!
    # srun forwards both to its tasks.
    trap 'kill -USR1 "$step"' USR1
    trap 'cancelled=true; kill -TERM "$step"' TERM
    wait_for "$step"
    status=$?
    if [[ ! -e $run/stopped ]]; then
        exit "$status"
    fi
    cat "$run/stopped"
    if $cancelled; then
        # SLURM requeues a job that it preempts, and not one that was cancelled: leave it to SLURM,
        # which kills this script, unless it ended by itself, when the grace time is over.
        sleep "${GRACE_SECONDS:-3600}" &
        wait $!
        exit 1
    fi
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
}
