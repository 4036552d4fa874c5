"""--memory-path auto takes the first rung that fits, and says what it takes and costs."""

from types import SimpleNamespace

import pytest
import torch

from megalong.config.arguments import config_from_values
from megalong.errors import UserError
from megalong.model import memory_path
from megalong.model.memory_path import needs, settle_memory_path

GIB = 2**30
VOCABULARY = 32000
GPU = SimpleNamespace(device=torch.device("cuda"))


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


def settle(monkeypatch, config, device=80, host=400, mesh=GPU):
    monkeypatch.setattr(memory_path, "_memory", lambda _: (device * GIB, host * GIB))
    return settle_memory_path(config, VOCABULARY, mesh)


@pytest.mark.parametrize(
    "tokens, host, on, offload, recompute",
    [
        (2**15, 400, "off", False, None),
        (2**20, 400, "on", False, None),
        (3 * 2**19, 400, "on", False, "full"),
        (2**21, 400, "on", True, None),
        (2**22, 400, "on", True, None),
        (2**22, 120, "on", True, "full"),
    ],
)
def test_the_first_rung_that_fits(monkeypatch, tokens, host, on, offload, recompute):
    settled, words = settle(monkeypatch, config(tokens), host=host)
    memory = settled.memory
    assert (memory.memory_path, memory.offload_activations) == (on, offload)
    assert settled.parallel.recompute_granularity == recompute
    assert memory.linear_cross_entropy == memory.tiled_mlp == (on == "on")
    assert "of 80.0 GiB a rank" in words and words.startswith("memory path: ")
    assert ("on the host" in words) == offload
    assert ("more FLOPs than without" in words) == (on == "on")
    assert ("full recomputation" in words) == (recompute == "full")


def test_what_is_given_stays(monkeypatch):
    given = config(2**22, tiled_mlp=False, recompute_granularity="full")
    settled, _ = settle(monkeypatch, given)
    assert settled.memory.tiled_mlp is False and settled.memory.tiled_attention is True
    assert settled.parallel == given.parallel
    forced, words = settle(monkeypatch, config(2**12, memory_path="on"))
    assert forced.memory.offload_activations and "loss without logits" in words
    plain, words = settle(monkeypatch, config(2**24, memory_path="off"))
    assert not plain.memory.tiled_attention and words.startswith("memory path: off")


def test_a_cpu_has_nowhere_to_move_to(monkeypatch):
    cpu = SimpleNamespace(device=torch.device("cpu"))
    for path in ("auto", "on"):
        settled, _ = settle(monkeypatch, config(2**22, memory_path=path), mesh=cpu)
        assert settled.memory.tiled_attention and not settled.memory.offload_activations


def test_no_room_on_the_host_is_one_line(monkeypatch):
    with pytest.raises(UserError) as error:
        settle(monkeypatch, config(2**22, memory_path="on"), host=50)
    message = str(error.value)
    assert message.startswith("--offload-activations keeps 14") and "50.0 GiB left" in message
    assert "set --recompute-granularity full" in message and "\n" not in message


def test_tensor_and_sequence_ranks_share_what_is_needed():
    whole = needs(settled_on(config(2**20)), VOCABULARY)
    sequence = needs(settled_on(config(2**20, 4, sequence_parallel_size=4)), VOCABULARY)
    tensor = needs(settled_on(config(2**20, 4, tensor_model_parallel_size=4)), VOCABULARY)
    assert sequence.host == pytest.approx(whole.host / 4)
    assert tensor.host == pytest.approx(whole.host / 4)
    assert tensor.device < sequence.device < whole.device / 3


def settled_on(given):
    import dataclasses

    memory = given.memory.with_pieces(True, given.model, given.parallel)
    return dataclasses.replace(given, memory=memory)
