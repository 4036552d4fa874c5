"""megalong: pretraining of LongNet models on DeepSpeed and Megatron-core.

The rooms, in the order in which they build on each other: `attention` (tensors in, tensors out),
`parallel` (ranks and groups), `model`, `data` and `training`. `megalong.config` is the whole
configuration.
"""

__version__ = "0.1.0"
