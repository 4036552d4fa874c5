"""A training step on a GPU that is not there: no waits but those known, no mixed devices, and what
is planted is caught."""

import json
from pathlib import Path

import pytest
import torch

from megalong.config.attention import AttentionConfig
from megalong.dry_run import fake_device
from megalong.dry_run.work import PARTS
from tests.dry_run.run_cases import CASES, PLANTS
from tests.forked import run_on_fake_gpu
from tests.launching import made_once

pytestmark = pytest.mark.skipif(
    fake_device.compiler() is None, reason="the fake GPU needs a C++ compiler"
)


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[str, dict]:
    def make(path: Path) -> None:
        print(run_on_fake_gpu(str(Path(__file__).with_name("run_cases.py")), path).stdout)

    return json.loads(made_once(tmp_path_factory, "dry_runs.json", make).read_text())


@pytest.mark.parametrize("case", [name for name in CASES if CASES[name].plant is None])
def test_a_step_runs_on_the_device_alone(case, results):
    assert results[case]["error"] is None
    assert results[case]["memory"]["optimizer"] > 0
    axes = {"sequence", "tensor", "pipeline", "data"} if "tp2" in case else set()
    assert axes <= results[case]["traffic"].keys()


def test_operators_are_a_gpus_whatever_pytorch_is_built_for(results):
    operators = {*results["one"]["operators"], *results["memory path"]["operators"]}
    assert {"aten._fused_rms_norm", "aten._fused_rms_norm_backward"} <= operators
    assert "aten.silu_backward" in operators and not {"aten.rsqrt", "aten.sigmoid"} & operators


@pytest.mark.skipif(not torch.backends.cuda.is_built(), reason="PyTorch is built without CUDA")
def test_the_operators_that_only_a_gpu_has_whole_are_known():
    """In a build with CUDA all of ATen that could be taken apart, and has a kernel there."""
    kinds = ("CUDA", "CompositeImplicitAutograd")
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    found = {
        name.removeprefix("aten::")
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("aten::") and all(has_kernel(name, kind) for kind in kinds)
    }
    assert found == {*fake_device.WHOLE_ON_A_GPU}


@pytest.mark.parametrize("case", [name for name in CASES if CASES[name].plant is None])
def test_what_is_sent_is_what_the_engine_counts(case, results):
    assert results[case]["traffic"] == (results[case]["counted"] or {})


@pytest.mark.parametrize("stage", [2, 3])
def test_an_optimizer_on_the_host_is_held_and_stepped_there(stage, results):
    """Master weights, gradients and two moments are 16 bytes for each parameter of the rank; the
    step reads them, and writes them, in one operator."""
    result = results[f"dp2, ZeRO {stage}, optimizer on the host"]
    steps = [(kind, n) for kind, name, n in result["update"] if name == "aten._fused_adamw_"]
    [(kind, bytes_)] = steps  # that of norms is too small to be followed
    assert kind == "host"
    of_weights = 2 if stage == 3 else 4  # bytes in bf16 for each parameter of the rank, of two
    assert bytes_ == pytest.approx(32 / of_weights * result["memory"]["weights"], rel=0.02)
    assert bytes_ / 2 <= result["host"] < bytes_
    assert results[f"dp2, ZeRO {stage}"]["host"] < 1000
    assert {"megalong.to_host", "megalong.to_device"} <= {name for _, name, _ in result["update"]}
    if stage == 2:  # of ZeRO 3 the bucket of gradients is with the optimizer
        assert result["memory"]["optimizer"] < bytes_ / 8


def test_muon_keeps_one_moment_of_the_matrices_of_layers(results):
    """Beside master weights, in float32: 8 bytes for each of their parameters, 12 for the others,
    over two tensor ranks and two replicas; norms are whole on each tensor rank."""
    matrices = 2 * 128 * (128 + 2 * 64 + 128 + 3 * 384)
    others = 256 * 128 + 5 * 128
    held = results["Muon, ZeRO 2"]["memory"]["optimizer"]
    assert held == pytest.approx((8 * matrices + 12 * others) / 4, rel=0.01)


def test_a_bucket_as_large_as_the_model_sends_what_a_larger_one_does(results):
    fitting, larger = (results[f"dp2, ZeRO 2{more}"] for more in ("", ", DeepSpeed's bucket"))
    assert fitting["traffic"] == larger["traffic"]
    assert sum(fitting["memory"].values()) < 2**26 < 2**29 < sum(larger["memory"].values())


def test_every_operation_has_its_part(results):
    """The numbers of "one": 2 micro batches, 2 layers, 1024 tokens; a product's gradient is two."""
    flops = {(part, way): count for part, way, count in results["one"]["flops"]}
    tokens, hidden = 2 * 1024, 128
    projections = 2 * 2 * tokens * hidden * (128 + 2 * 64 + 128)
    assert flops["projections", "forward"] == projections
    assert flops["projections", "backward"] == 2 * projections
    assert flops["logits", "forward"] == 2 * tokens * hidden * 256
    assert flops["logits", "backward"] == 2 * flops["logits", "forward"]
    assert flops["attention", "backward"] == 2.5 * flops["attention", "forward"]
    assert flops["mlp", "backward"] == 2 * flops["mlp", "forward"] > 0
    assert flops["mlp", "forward"] % (2 * 2 * 3 * tokens * hidden) == 0
    assert set(results["one"]["parts"]) == set(PARTS)
    assert results["one"]["launches"] == 2 * 2 * 2  # micro batches, layers, kernels


def test_pieces_that_are_one_node_have_their_parts(results):
    """The memory path computes the same, and more of it again."""
    plain, tiled = (
        {(part, way): count for part, way, count in results[case]["flops"]}
        for case in ("one", "memory path")
    )
    assert plain.keys() == tiled.keys()
    assert all(tiled[key] >= plain[key] for key in plain)
    assert tiled["attention", "backward"] == plain["attention", "backward"]
    assert tiled["mlp", "forward"] == plain["mlp", "forward"]


@pytest.mark.parametrize("case", [name for name in CASES if CASES[name].plant is None])
def test_what_is_multiplied_has_the_dtype_of_the_training(case, results):
    """Whatever it is added up in: sums over tiles are float32."""
    dtypes = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
    precision = CASES[case].flags.get("precision", "bf16")
    assert results[case]["dtypes"] == [dtypes[precision]]


def test_every_wait_that_is_allowed_happens(results):
    happened = {where for result in results.values() for where in result.get("waits", ())}
    assert happened == set(results["allowed"])


CAUGHT = {
    "item": "HostSync: the host reads a value",
    "branch": "HostSync: the host reads a value",
    "cpu_tensor": "at least two devices, cuda:0 and cpu",
    "item_in_backward": "HostSync: the host reads a value",
    "blocking_copy": "HostSync: a copy to the device of (128,) is not non_blocking",
    "synchronize": "HostSync: the host waits for torch.cuda.synchronize",
    "collective_on_cpu": "WrongDevice: c10d.allreduce_.default gets a tensor of the CPU",
}


@pytest.mark.parametrize("plant", PLANTS)
def test_what_is_planted_is_caught(plant, results):
    error = results[f"planted {plant}"]["error"]
    assert CAUGHT[plant] in error
    if error.startswith("HostSync"):  # it says where
        assert f"plant_{plant}" in error or "<lambda>" in error
        assert "run_cases.py:" in error


def test_what_is_planted_is_caught_in_a_pipeline(results):
    assert "HostSync: the host reads a value" in results["planted item in a pipeline"]["error"]


@pytest.mark.parametrize(
    "plain, other",
    [
        ("sp4", "sp4, memory path"),
        ("sp4", "sp4, memory path, documents apart"),
        ("tp2 sp2 pp2, rank 3", "tp2 sp2 pp2, rank 3, memory path"),
        ("tp2 sp2 pp2, rank 4", "tp2 sp2 pp2, rank 4, memory path, recomputed"),
    ],
)
def test_the_memory_path_sends_the_same_bytes_over_the_sequence_axis(plain, other, results):
    """Recomputing or not: what has come from other ranks is kept. Documents apart or not."""

    def sent(case):
        counts = results[case]["traffic"]["sequence"]
        return {collective: count["bytes"] for collective, count in counts.items()}

    assert sent(other) == sent(plain)


@pytest.mark.parametrize("heads", [12, 3])
@pytest.mark.parametrize("ranks", [4, 8])
def test_a_shards_attention_takes_hardly_more_memory_than_a_whole_sequence_as_long(
    ranks, heads, results
):
    """Sums, rows of other ranks and index tensors go with the rows that cross borders."""
    peaks = results["attention"]
    alone, shard = peaks[f"{heads} heads, 1 ranks"], peaks[f"{heads} heads, {ranks} ranks"]
    for name in ("forward", "backward"):
        assert alone[name] < shard[name] < 1.02 * alone[name]


def test_a_shard_that_no_segment_begins_with_adds_less_than_a_second_output_of_each(results):
    """Then some of its attention is apart, and a third of its rows are summed up in float32."""
    alone, shard = (results["attention"][f"uneven, {ranks} ranks"] for ranks in (1, 4))
    assert shard["forward"] < 1.7 * alone["forward"]
    assert shard["backward"] < 1.8 * alone["backward"]


@pytest.mark.parametrize("ranks", [1, 4])
@pytest.mark.parametrize("kind", ["dense", "local", "sparse"])
def test_what_a_kind_is_said_to_hold_besides_its_results(kind, ranks, results):
    """Within 8% of what it does: beside dense attention of one rank."""
    peaks = results["attention"]
    more = peaks[f"{kind}, {ranks} ranks"]["backward"] - peaks["dense, 1 ranks"]["backward"]
    [pattern] = AttentionConfig(attention=kind).resolve(2**16).patterns.values()
    rows = more / (4 * 12 * 64)  # float32, heads, head_dim
    assert pattern.partial_rows(ranks) == pytest.approx(rows, rel=0.08, abs=0.1)


@pytest.mark.parametrize("kind", ["dense", "local"])
def test_what_other_ranks_send_takes_as_much_memory_however_many_they_are(kind, results):
    """A ring holds two shards of keys at a time, and a window the neighbours' rows."""
    two, four, eight = (results["attention"][f"{kind}, {ranks} ranks"] for ranks in (2, 4, 8))
    assert four == eight
    for name in ("forward", "backward"):
        assert four[name] <= 1.1 * two[name]
