"""Which layouts a launch may have."""

import math

import pytest

from megalong.dry_run.layouts import possible_layouts
from megalong.utils.errors import UserError

MODEL = {
    "num_layers": 6,
    "hidden_size": 192,
    "num_attention_heads": 12,
    "seq_length": 4096,
    "segment_lengths": (1024, 4096),
    "dilation_rates": (1, 4),
    "data_path": ("unread",),
    "tokenizer_type": "ByteTokenizer",
}
TENSOR, SEQUENCE, PIPELINE, CHUNK, MICRO = (
    "tensor_model_parallel_size",
    "sequence_parallel_size",
    "pipeline_model_parallel_size",
    "num_layers_per_virtual_pipeline_stage",
    "micro_batch_size",
)


def divisions(ranks, per_node=8, **values):
    found = possible_layouts({**MODEL, **values}, ranks, per_node).divisions
    return [tuple(division.settings.values()) for division in found]


def test_every_division_of_the_ranks_is_there_once():
    found = divisions(8, global_batch_size=8)
    assert len(set(found)) == len(found)
    expected = set()
    for tensor in (1, 2, 4):  # 12 heads: 8 does not divide them
        for pipeline in (1, 2):
            for sequence in (1, 2, 4, 8):
                if 8 % (tensor * pipeline * sequence) == 0:
                    replicas = 8 // (tensor * pipeline * sequence)
                    for micro in (1, 2, 4, 8):
                        if 8 % (micro * replicas) == 0:
                            expected.add((tensor, sequence, pipeline, None, micro))
                            if pipeline == 2 and (8 // (micro * replicas)) % 2 == 0:
                                expected.add((tensor, sequence, pipeline, 1, micro))
    assert set(found) == expected


def test_what_is_given_is_not_varied():
    found = possible_layouts(
        {**MODEL, TENSOR: 2, SEQUENCE: 4, "zero_stage": 2, "memory_path": "on"}, 16, 8
    )
    for division in found.divisions:
        assert division.settings[TENSOR] == 2 and division.settings[SEQUENCE] == 4
        for config in division.rungs:
            assert config.parallel.zero_stage == 2 and config.memory.memory_path == "on"
    assert {division.settings[PIPELINE] for division in found.divisions} == {1}
    # ZeRO 2 cannot be beside a pipeline, and the configuration says so.
    assert all("--zero-stage 2 does not work with" in message for message in found.refused)


def test_tensor_ranks_are_those_of_a_node():
    assert max(tensor for tensor, *_ in divisions(64, per_node=4)) == 4
    sizes = {"ffn_hidden_size": 768, "make_vocab_size_divisible_by": 96, "sequence_parallel": False}
    given = divisions(12, per_node=4, **sizes, **{TENSOR: 12})
    assert {tensor for tensor, *_ in given} == {12}


def test_rungs_are_all_memory_settings_with_the_stages_that_can_do_something():
    [division] = possible_layouts(MODEL, 1, 8).divisions
    ways = {
        (c.memory.memory_path, c.parallel.recompute_granularity, c.memory.offload_activations)
        for c in division.rungs
    }
    assert len(ways) == len(division.rungs) == 6
    assert {rung.parallel.zero_stage for rung in division.rungs} == {1}  # nothing to divide by
    for division in possible_layouts(MODEL, 4, 8).divisions:
        stages = {rung.parallel.zero_stage for rung in division.rungs}
        replicas = 4 // (division.settings[TENSOR] * division.settings[PIPELINE])
        divides = division.settings[PIPELINE] == 1 and replicas > 1
        assert stages == ({1, 2, 3} if divides else {1})
    assert not any("--zero-stage" in words for words in possible_layouts(MODEL, 4, 8).refused)


def test_what_auto_would_choose_is_searched():
    [division] = possible_layouts({**MODEL, "memory_path": "auto"}, 1, 8).divisions
    assert {rung.memory.memory_path for rung in division.rungs} == {"off", "on"}


def test_nothing_is_offloaded_on_a_cpu():
    for division in possible_layouts(MODEL, 4, 4, on_gpu=False).divisions:
        assert not any(rung.memory.offload_activations for rung in division.rungs)


def test_a_batch_left_open_is_one_sequence_a_replica():
    for tensor, sequence, pipeline, _, micro in divisions(8):
        assert micro == 1
        [config, *_] = next(
            d.rungs
            for d in possible_layouts(MODEL, 8, 8).divisions
            if d.settings[SEQUENCE] == sequence and d.settings[PIPELINE] == pipeline
            and d.settings[TENSOR] == tensor
        )  # fmt: skip
        assert config.training.global_batch_size == 8 // (tensor * sequence * pipeline)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({TENSOR: 5}, "--num-attention-heads 12 does not divide by --tensor-model-parallel-size 5"),
        ({SEQUENCE: 3}, "cannot be shared by"),
        ({TENSOR: 0}, "--tensor-model-parallel-size 0 must be positive"),
        ({PIPELINE: 4}, "--num-layers 6 does not divide by --pipeline-model-parallel-size 4"),
        ({"zero_stage": 3, PIPELINE: 2}, "--zero-stage 3 does not work with"),
        ({"dilation_rates": (1,)}, "--dilation-rates"),
        ({"global_batch_size": 3, PIPELINE: 1, SEQUENCE: 1, TENSOR: 1}, "--global-batch-size 3"),
    ],
)
def test_where_nothing_can_be_the_configuration_says_why(values, message):
    with pytest.raises(UserError, match=message):
        possible_layouts({**MODEL, **values}, 40 if TENSOR in values else 8, 8)


def test_a_thousand_ranks_are_quickly_listed():
    found = divisions(1024, seq_length=2**30, segment_lengths=(2048, 2**20))
    assert all(math.prod(sizes[:3]) <= 1024 for sizes in found)
    assert (1, 1024, 1, None, 1) in found
