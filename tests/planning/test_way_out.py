"""What would make a model fit that fits nowhere."""

from megalong.config.arguments import config_from_values
from megalong.config.memory import USABLE
from megalong.model.memory_path import needs
from megalong.planning.cluster import load_cluster
from megalong.planning.way_out import ways_out

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


def test_where_nothing_helps_nothing_is_said():
    values = {**VALUES, "hidden_size": 2**21, "num_attention_heads": 2**10, "num_layers": 1}
    assert ways_out({**values, "seq_length": 1000}, 32_000, load_cluster("h100"), 1) == []
