"""--memory-path auto takes the first rung that fits, and says what it takes and costs."""

import dataclasses

import pytest

from megalong.config.arguments import config_from_values
from megalong.model.memory_path import Room, choose_memory_path, needs
from megalong.utils.errors import UserError

GIB = 2**30
VOCABULARY = 32000


def config(seq_length, ranks=1, **changes):
    values = {
        "num_layers": 12,
        "hidden_size": 768,
        "num_attention_heads": 12,
        "ffn_hidden_size": 2048,
        "seq_length": seq_length,
        "micro_batch_size": 1,
        "global_batch_size": 1,
        "precision": "bf16",
        "data_path": "unread",
        "tokenizer_type": "ByteTokenizer",
    }
    return config_from_values(values | changes).resolve(ranks)


def settle(config, device=80, host=400, on_gpu=True, replicas=1):
    return choose_memory_path(config, VOCABULARY, Room(device * GIB, host * GIB, on_gpu, replicas))


@pytest.mark.parametrize(
    "tokens, host, on, offload, recompute",
    [
        (2**15, 400, "off", False, None),
        (2**20, 400, "on", False, None),
        (3 * 2**19, 400, "on", False, "full"),
        (2**22, 400, "on", True, None),
        (2**22, 120, "on", True, "full"),
    ],
)
def test_the_first_rung_that_fits(tokens, host, on, offload, recompute):
    settled, words = settle(config(tokens), host=host)
    memory = settled.memory
    assert (memory.memory_path, memory.offload_activations) == (on, offload)
    assert settled.parallel.recompute_granularity == recompute
    assert memory.linear_cross_entropy == memory.tiled_mlp == (on == "on")
    assert "of 80.0 GiB a rank" in words and words.startswith("memory path: ")
    assert ("on the host" in words) == offload
    assert ("more FLOPs than without" in words) == (on == "on")
    assert ("full recomputation" in words) == (recompute == "full")


def test_what_is_given_stays():
    given = config(2**22, tiled_mlp=False, recompute_granularity="full")
    settled, _ = settle(given)
    assert settled.memory.tiled_mlp is False and settled.memory.tiled_attention is True
    assert settled.parallel == given.parallel
    forced, words = settle(config(2**12, memory_path="on"))
    assert forced.memory.offload_activations and "loss without logits" in words
    plain, words = settle(config(2**24, memory_path="off"))
    assert not plain.memory.tiled_attention and words.startswith("memory path: off")


def test_a_cpu_has_nowhere_to_move_to():
    for given in ({}, {"memory_path": "on"}, {"offload_activations": True}):
        settled, words = settle(config(2**22, **given), on_gpu=False)
        assert settled.memory.tiled_attention and not settled.memory.offload_activations
        assert "on the host" not in words


def test_no_room_on_the_host_for_what_was_asked_is_one_line():
    for given in ({"memory_path": "on"}, {"offload_activations": True}):
        with pytest.raises(UserError) as error:
            settle(config(2**22, **given), host=50)
        assert "--offload-activations" in str(error.value)


def test_auto_does_without_the_host_where_that_has_no_room():
    settled, words = settle(config(2**22), host=20)
    assert not settled.memory.offload_activations
    assert settled.parallel.recompute_granularity == "full" and "may not fit" in words


@pytest.mark.parametrize("stage", [1, 3])
def test_what_zero_divides_is_not_counted_whole(stage):
    """7B parameters over 64 ranks leave room for a short sequence as it is."""
    seven = {"num_layers": 32, "hidden_size": 4096, "num_attention_heads": 32}
    seven |= {"ffn_hidden_size": 11008, "zero_stage": stage, "global_batch_size": 64}
    settled, _ = settle(config(2048, 64, **seven), replicas=64)
    assert settled.memory.memory_path == "off"


def test_tensor_and_sequence_ranks_share_what_is_needed():
    whole = needs(settled_on(config(2**20)), VOCABULARY)
    sequence = needs(settled_on(config(2**20, 4, sequence_parallel_size=4)), VOCABULARY)
    tensor = needs(settled_on(config(2**20, 4, tensor_model_parallel_size=4)), VOCABULARY)
    assert sequence.host == pytest.approx(whole.host / 4)
    assert tensor.host == pytest.approx(whole.host / 4)
    assert max(tensor.device, sequence.device) < whole.device / 2


@pytest.mark.parametrize("sub_layer_norm", [False, True])
def test_a_cpu_takes_more_for_rms_norm(sub_layer_norm):
    """GPUs have a kernel for it that keeps no more than its input, as all have for LayerNorm."""
    for normalization in ("RMSNorm", "LayerNorm"):
        given = {"normalization": normalization, "sub_layer_norm": sub_layer_norm}
        settled = config(2**16, memory_path="off", **given)
        on_gpu, on_cpu = (needs(settled, VOCABULARY, on_gpu=x).device for x in (True, False))
        assert on_cpu == on_gpu if normalization == "LayerNorm" else on_cpu > 1.1 * on_gpu


def settled_on(given):
    memory = given.memory.with_pieces(True, given.model, given.parallel)
    return dataclasses.replace(given, memory=memory)


def test_what_an_optimizer_keeps_is_counted():
    """4 bytes for a moment: Adam's two of each parameter, SGD's one, Muon's one of the matrices of
    layers; divided over the ranks that hold the same weights."""

    def needed(optimizer):
        given = config(2**15, 4, optimizer=optimizer, memory_path="off", global_batch_size=4)
        return needs(given, VOCABULARY, replicas=4).device

    matrices = 12 * (4 * 768**2 + 3 * 768 * 2048)
    vectors = 12 * 2 * 768 + 768
    assert needed("adam") - needed("muon") == pytest.approx(4 * matrices / 4)
    everything = matrices + vectors + 32000 * 768
    assert needed("adam") - needed("sgd") == pytest.approx(4 * everything / 4, rel=0.01)
