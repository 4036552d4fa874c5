"""Messages of the libraries below us that a megalong user can do nothing about."""

import logging
import os
import warnings

_WARNINGS = (
    r".*(Apex is|Transformer Engine and Apex are) not installed",
    r".*full scope is deprecated",
    r".*torch.distributed.*is deprecated",
    r".*torch.distributed is disabled, unavailable or uninitialized",
)
# Of Transformers, by logger: a class that reads any model's configuration has no type of its own,
# and texts are cut to their length after they were tokenized.
_TRANSFORMERS = {
    "transformers.configuration_utils": "to instantiate a model of type ``",
    "transformers.tokenization_utils_base": "Token indices sequence length is longer",
}
_WITHOUT_GPU = (r".*CUDA_DEVICE_MAX_CONNECTIONS",)  # a setting that Megatron-core wants for GPUs


def filter_library_logs() -> None:
    """Silence them in this process. Called before megatron.core and deepspeed are imported."""
    from megalong.device import use_gpu

    for message in _WARNINGS if use_gpu() else _WARNINGS + _WITHOUT_GPU:
        warnings.filterwarnings("ignore", message=message)
    deepspeed = logging.getLogger("DeepSpeed")
    deepspeed.setLevel(logging.WARNING)
    # Its word for all optimizers but Adam and its own; ours are tested with every ZeRO stage.
    deepspeed.addFilter(lambda record: "untested optimizer" not in record.getMessage())
    for name, words in _TRANSFORMERS.items():
        logging.getLogger(name).addFilter(
            lambda record, words=words: words not in record.getMessage()
        )
    if not use_gpu():
        # Names the device that DeepSpeed would find, and warn about, by itself.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
