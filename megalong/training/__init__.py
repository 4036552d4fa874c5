"""Training: the DeepSpeed engine under Megatron-core's schedule, the loop, checkpoints, metrics."""
