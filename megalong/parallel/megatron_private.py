"""What Megatron-core does not document and we need all the same: its names stand here and nowhere
else. `NAMES` says of each what for; a test looks for all of them in the installed Megatron-core."""

from __future__ import annotations

from collections.abc import Callable

NAMES = {
    "megatron.core.tensor_parallel.random": {
        "_get_cuda_rng_state": "how recomputation and dropout read the random state",
        "_set_cuda_rng_state": "and set it; both ask for a GPU",
    },
}


def replace_random_states(get_state: Callable, set_state: Callable) -> None:
    """Have Megatron-core read and set the random states of its device with these functions."""
    import megatron.core.tensor_parallel.random as megatron_random

    megatron_random._get_cuda_rng_state = get_state
    megatron_random._set_cuda_rng_state = set_state
