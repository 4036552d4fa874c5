"""What would make a model fit that fits nowhere."""

from megalong.config.arguments import config_from_values
from megalong.config.memory import USABLE
from megalong.dry_run.cluster import load_cluster
from megalong.dry_run.layouts import ways_out
from megalong.model.memory_path import needs

VALUES = {
    "num_layers": 32,
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "seq_length": 2**20,
    "data_path": ("unread",),
    "tokenizer_type": "ByteTokenizer",
}


def test_more_gpus_are_the_least_that_do():
    cluster = load_cluster("h100")
    [(words, config, ranks)] = ways_out(VALUES, 32_000, cluster, 1)  # weights fit on no single one
    assert words == f"{ranks} GPUs" and ranks > 1
    parallel = config.parallel
    replicas = ranks // (
        parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size
    )
    assert needs(config, 32_000, replicas).device <= USABLE * cluster.device.memory
    found = ways_out({**VALUES, "seq_length": 2**19}, 32_000, cluster, ranks // 2)
    assert all(more >= ranks // 2 for _, _, more in found)


def test_a_shorter_sequence_is_the_longest_that_does():
    values = {**VALUES, "num_layers": 4, "hidden_size": 1024, "memory_path": "off"}
    values |= {"recompute_granularity": "full", "tensor_model_parallel_size": 1}
    found = ways_out(values, 32_000, load_cluster("h100"), 1)
    lengths = [config.model.seq_length for words, config, _ in found if "--seq-length" in words]
    assert len(lengths) == 1
    usable = USABLE * load_cluster("h100").device.memory

    def smallest(length):
        config = config_from_values({**values, "seq_length": length}).resolve(1)
        return needs(config, 32_000).device

    assert smallest(lengths[0]) <= usable < smallest(2 * lengths[0])


# What fits on 8 GPUs of 80 GB with ZeRO 3, and not with ZeRO 1: 23 GB of weights and gradients.
LARGE = {**VALUES, "num_layers": 16, "seq_length": 2**14, "tensor_model_parallel_size": 1}
LARGE |= {"pipeline_model_parallel_size": 1, "hidden_size": 8192, "num_attention_heads": 64}


def without(values, ranks=8):
    found = ways_out(values, 32_000, load_cluster("h100"), ranks)
    return {
        words: config for words, config, n in found if words.startswith("without") and n == ranks
    }


def test_given_settings_that_are_in_the_way_are_named():
    """Each of those that is enough by itself; those that do no harm are not."""
    found = without({**LARGE, "zero_stage": 1, "micro_batch_size": 1})
    assert set(found) == {
        "without --zero-stage 1",
        "without --tensor-model-parallel-size 1",
        "without --pipeline-model-parallel-size 1",
    }
    assert found["without --zero-stage 1"].parallel.zero_stage > 1
    assert found["without --tensor-model-parallel-size 1"].parallel.tensor_model_parallel_size > 1


def test_settings_that_are_in_the_way_together_are_named_together():
    values = {**LARGE, "seq_length": 2**20, "sequence_parallel_size": 8, "zero_stage": 1}
    values |= {"memory_path": "off", "recompute_granularity": None}
    [(words, config)] = without(values).items()
    assert words.startswith("without ") and "--zero-stage 1" in words and "off" in words
    assert config.memory.memory_path == "on" and config.parallel.zero_stage > 1


def test_what_is_switched_off_is_named_as_it_was_given():
    values = {**VALUES, "num_layers": 4, "hidden_size": 1024, "seq_length": 2**21}
    values |= {"tiled_attention": False, "recompute_granularity": "full"}
    assert set(without(values, 1)) == {"without --no-tiled-attention"}


def test_where_nothing_helps_nothing_is_said():
    values = {**VALUES, "hidden_size": 2**21, "num_attention_heads": 2**10, "num_layers": 1}
    assert ways_out({**values, "seq_length": 1000}, 32_000, load_cluster("h100"), 1) == []
