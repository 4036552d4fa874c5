"""Seconds of a step from hand-made work, with expectations by hand."""

import json
from dataclasses import replace

import pytest

from megalong.config import Config, DataConfig, ModelConfig, ParallelConfig, TrainingConfig
from megalong.config.arguments import config_from_values
from megalong.dry_run.cluster import COLLECTIVES, Cluster, Curve, Device, Link, load_cluster
from megalong.dry_run.cost import (
    Overlap,
    operation_seconds,
    phase_cost,
    pipeline_bubble,
    rough_seconds,
    step_cost,
)
from megalong.dry_run.search import DOUBT
from megalong.dry_run.work import TO_DEVICE, TO_HOST, Collective, Operation, Work
from megalong.model.flops import step_flops
from megalong.utils.errors import UserError


def flat(share):
    return Curve(((1.0, share),))


def device(**given):
    """1,000 FLOP/s in float32, 100 bytes/s; half of it in products, a quarter and a fifth in
    attention."""
    shares = [dict.fromkeys(("float32", "bfloat16"), flat(share)) for share in (0.5, 0.25, 0.2)]
    peaks = {"float32": 1000.0, "bfloat16": 4000.0}
    found = Device("d", 1e9, peaks, 100.0, *shares, flat(0.8), 0.0, 0.0, 0.5)
    return replace(found, **given)


def cluster(**given):
    one = dict.fromkeys(COLLECTIVES, flat(1.0))
    link = Link("a link", 100.0, 0.0, one)
    return Cluster("c", device(**given), 8, link, None, 0.0, 1e9, 10.0, 0.0)


def operation(kind="product", flops=1000, size=0, direction="forward", part="mlp", **given):
    given = {"name": "aten.mm", "dtype": "float32", **given}
    return Operation(part, direction, kind, flops=flops, bytes=size, **given)


def collective(axis, direction="forward", name="all_gather", size=200, ranks=(0, 1)):
    """Of two ranks: 1 second for 200 bytes."""
    return Collective(axis, direction, name, size, ranks)


def work(operations=(), collectives=()):
    """Each once, unless it is given as (what, calls)."""
    done = Work()
    for counter, given in ((done.operations, operations), (done.collectives, collectives)):
        for item in given:
            one, calls = item if isinstance(item, tuple) else (item, 1)
            counter[one] += calls
    return done


def config(ranks=1, layers=2, batch=8, micro=1, parallel=None, **training):
    model = ModelConfig(
        num_layers=layers, hidden_size=64, num_attention_heads=4, ffn_hidden_size=128,
        seq_length=128,
    )  # fmt: skip
    settings = {"global_batch_size": batch, "micro_batch_size": micro, "train_iters": 1}
    training = TrainingConfig(**{**settings, "precision": "fp32", **training})
    data, parallel = (
        DataConfig(data_path=("corpus",), tokenizer_type="ByteTokenizer"),
        ParallelConfig(**(parallel or {})),
    )
    return Config(model=model, parallel=parallel, training=training, data=data).resolve(ranks)


@pytest.mark.parametrize(
    ("of", "expected"),
    [
        (operation(), 2.0),
        (operation(dtype="bfloat16"), 0.5),
        (operation(size=800), 10.0),  # more bytes than the products need time
        (operation("attention", name="megalong.dilated_attention"), 4.0),
        (operation("attention", name="megalong.dilated_attention_backward"), 5.0),
        # Computed again in the backward pass, it is still the forward kernel.
        (operation("attention", name="megalong.dilated_attention", direction="backward"), 4.0),
        (operation("memory", flops=0, size=40), 0.5),
    ],
)
def test_an_operation_takes_the_longer_of_flops_and_bytes(of, expected):
    assert operation_seconds(of, device()) == pytest.approx(expected)


def test_every_kernel_takes_something_beside_its_work():
    seconds = operation_seconds(operation(kernels=3), device(kernel_seconds=0.1))
    assert seconds == pytest.approx(2.3)


def test_attention_of_few_rows_is_slower():
    curve = {"float32": Curve(((10.0, 0.1), (1000.0, 0.5)))}
    few = operation("attention", 1000, 100, name="megalong.dilated_attention")
    found = device(attention_forward=curve, memory_bandwidth=1e9)
    assert operation_seconds(few, found) == pytest.approx(10.0)
    assert operation_seconds(replace(few, flops=10_000), found) == pytest.approx(10 / 0.3)


def test_a_dtype_that_the_device_has_no_peak_for():
    with pytest.raises(UserError, match=r"has no peak_flops\.float16"):
        operation_seconds(operation(dtype="float16"), device())


def test_the_parts_of_a_step_add_up():
    done = work(
        [
            (operation(), 3),
            operation(part="logits", direction="backward"),
            operation("memory", 0, 80, direction="update", part="optimizer", name="aten.add"),
        ],
        [collective("tensor"), collective("data", "update", "all_reduce")],
    )
    cost = step_cost([done], cluster(), config(2), 100, 2)
    assert cost.compute == {"mlp": 6.0, "logits": 2.0}
    assert cost.communication == {"tensor": 1.0, "data": 2.0}
    assert (cost.update, cost.bubble, cost.offload, cost.launches) == (1.0, 0, 0, 0)
    assert cost.total == pytest.approx(6 + 2 + 1 + 2 + 1)
    assert cost.tokens_per_second == pytest.approx(8 * 128 / 12)
    flops = sum(step_flops(config(2), 100).values())
    assert cost.mfu == pytest.approx(flops / 12 / (2 * 1000))


def test_the_sequence_axis_hides_behind_the_shards_own_attention():
    local = operation("attention", 100, name="megalong.dilated_attention", part="attention")
    remote = operation("attention", 1000, name="megalong.attend_rows", part="attention")
    done = work([local, remote, operation()], [collective("sequence")])
    cost = phase_cost(done, ["forward"], cluster(), Overlap())
    # 0.4 of its 1 second run beside the local attention, and half of that is hidden.
    assert cost.hidden == {"sequence": pytest.approx(0.2)}
    assert cost.communication == {"sequence": pytest.approx(0.8)}
    assert cost.total == pytest.approx(0.4 + 4 + 2 + 0.8)


def test_the_ring_hides_behind_all_attention_and_no_other_direction():
    attention = operation("attention", 1000, name="megalong.attend_rows", part="attention")
    done = work([attention, operation(direction="backward")], [collective("sequence")])
    cost = phase_cost(done, ["forward", "backward"], cluster(overlap=1.0), Overlap())
    assert (cost.communication, cost.hidden) == ({}, {"sequence": 1.0})
    late = work([attention], [collective("sequence", "backward", "all_to_all")])
    cost = phase_cost(late, ["forward", "backward"], cluster(overlap=1.0), Overlap())
    assert cost.communication == {"sequence": 1.0}


def test_no_second_of_computation_hides_two_others():
    attention = operation("attention", 250, name="megalong.dilated_attention", part="attention")
    done = work([attention], [collective("sequence"), collective("data")])
    overlap = Overlap(data_forward=True)
    cost = phase_cost(done, ["forward"], cluster(overlap=1.0), overlap)
    assert (cost.communication, cost.hidden) == ({"data": 1.0}, {"sequence": 1.0})


@pytest.mark.parametrize(
    ("parallel", "ranks", "expected"),
    [
        ({"zero_stage": 1}, 2, Overlap()),
        ({"zero_stage": 2}, 2, Overlap()),
        ({"zero_stage": 3}, 2, Overlap(data_forward=True, data_backward=True)),
        (
            {"pipeline_model_parallel_size": 2, "num_layers_per_virtual_pipeline_stage": 1},
            2,
            Overlap(pipeline=True),
        ),
    ],
)
def test_what_overlaps_is_what_the_run_sets(parallel, ranks, expected):
    assert Overlap.of(config(ranks, layers=4, parallel=parallel), ranks) == expected


def test_overlap_comm_of_a_deepspeed_file(tmp_path):
    path = tmp_path / "deepspeed.json"
    path.write_text(json.dumps({"zero_optimization": {"overlap_comm": True}}))
    found = Overlap.of(config(2, parallel={"zero_stage": 2}, deepspeed_config=str(path)), 2)
    assert found == Overlap(data_backward=True)


def test_a_stage_receives_while_it_sends():
    calls = [
        (collective("pipeline", direction, name, 100), 4)
        for direction in ("forward", "backward")
        for name in ("send", "receive")
    ]
    cost = phase_cost(work([], calls), ["forward", "backward"], cluster(), Overlap())
    assert cost.communication == {"pipeline": pytest.approx(8.0)}


def test_what_the_host_cannot_launch_in_time():
    done = work([(operation("memory", 0, 8, name="aten.add"), 100)], [(collective("tensor"), 2)])
    cost = phase_cost(done, ["forward"], cluster(launch_seconds=0.5), Overlap())
    assert cost.compute == {"mlp": pytest.approx(10.0)}
    assert cost.launches == pytest.approx(102 * 0.5 - 12)
    assert cost.total == pytest.approx(51)


def test_copies_to_the_host_hide_behind_everything():
    copies = [
        operation("memory", 0, 30, name=TO_HOST, kernels=0),
        operation("memory", 0, 15, name=TO_DEVICE, kernels=0, direction="backward"),
    ]
    done = work([operation(), operation(direction="backward"), *copies], [])
    cost = phase_cost(done, ["forward", "backward"], cluster(), Overlap())
    assert cost.compute == {"mlp": 4.0}
    assert cost.offload == pytest.approx(1.0)  # of 3 and 1.5 seconds, beside 2 and 2


def test_an_update_on_the_host_waits_for_the_copies():
    """240 bytes, of which 8 ranks share 480 a second; 20 and 30 bytes over a link of 10."""
    update = {"direction": "update", "part": "optimizer", "kernels": 0}
    done = work(
        [
            operation("host", 0, 240, name="aten._fused_adamw_", **update),
            operation("memory", 0, 20, name=TO_HOST, **update),
            operation("memory", 0, 30, name=TO_DEVICE, **update),
        ]
    )
    cost = phase_cost(done, ["update"], replace(cluster(), host_memory_bandwidth=480.0), Overlap())
    assert cost.compute == {"optimizer": pytest.approx(240 / (480 / 8))}
    assert cost.offload == pytest.approx(5.0)
    with pytest.raises(UserError, match=r"has no host.memory_bandwidth, which an optimizer"):
        phase_cost(done, ["update"], cluster(), Overlap())


def simulated(forward, backward, micro_batches):
    """Seconds of 1F1B (Narayanan et al., section 2.2), event by event: each stage does its own
    list of passes in order, and each pass waits for its neighbour's."""
    stages = len(forward)
    plans = []
    for stage in range(stages):
        warm = min(stages - 1 - stage, micro_batches)
        plan = [("f", i) for i in range(warm)]
        for i in range(micro_batches - warm):
            plan += [("f", warm + i), ("b", i)]
        plans.append(plan + [("b", i) for i in range(micro_batches - warm, micro_batches)])
    ends, free, places = {}, [0.0] * stages, [0] * stages
    while any(place < len(plan) for place, plan in zip(places, plans, strict=True)):
        for stage, plan in enumerate(plans):
            if places[stage] == len(plan):
                continue
            kind, i = plan[places[stage]]
            before = (kind, i, stage - 1) if kind == "f" else (kind, i, stage + 1)
            if kind == "b" and stage == stages - 1:
                before = ("f", i, stage)
            if 0 <= before[2] < stages and before not in ends:
                continue
            start = max(free[stage], ends.get(before, 0.0))
            free[stage] = start + (forward if kind == "f" else backward)[stage]
            ends[kind, i, stage] = free[stage]
            places[stage] += 1
    return max(free)


@pytest.mark.parametrize("micro_batches", [1, 2, 4, 16])
@pytest.mark.parametrize("stages", [1, 2, 4])
def test_the_bubble_is_that_of_1f1b(stages, micro_batches):
    total = [3.0 * micro_batches] * stages
    predicted = max(total) + pipeline_bubble(total, micro_batches)
    assert predicted == pytest.approx(simulated([1.0] * stages, [2.0] * stages, micro_batches))


def test_a_pipeline():
    stages = [
        work([(operation(), 8), operation("memory", 0, 80, direction="update", part="optimizer")]),
        work([(operation(), 4), operation("memory", 0, 160, direction="update", part="optimizer")]),
    ]
    run = config(2, parallel={"pipeline_model_parallel_size": 2})
    cost = step_cost(stages, cluster(), run, 100, 2)
    assert (cost.compute, cost.bubble, cost.update) == ({"mlp": 16.0}, 1.0, 2.0)
    assert cost.total == pytest.approx(19.0)
    with pytest.raises(ValueError, match="work of 1 pipeline stages"):
        step_cost(stages[:1], cluster(), run, 100, 2)


# Of the 1.3B model and a sequence of 2^20 tokens on 8 H100: tensor, sequence and pipeline degrees,
# and seconds of a step by dry runs.
PLANNED = {
    (1, 8, 1): 3.005,
    (2, 4, 1): 3.562,
    (4, 2, 1): 4.295,
    (1, 4, 2): 5.912,
    (8, 1, 1): 6.755,
    (2, 2, 2): 7.078,
}


def test_closed_formulas_order_layouts_as_dry_runs_do():
    values = {
        "num_layers": 24, "hidden_size": 2048, "num_attention_heads": 32, "seq_length": 2**20,
        "segment_lengths": (2048, 16384, 131072, 1048576), "dilation_rates": (1, 8, 64, 512),
        "global_batch_size": 1, "micro_batch_size": 1, "memory_path": "on", "precision": "bf16",
        "offload_activations": False, "data_path": ("c",), "tokenizer_type": "ByteTokenizer",
    }  # fmt: skip
    keys = ("tensor_model_parallel_size", "sequence_parallel_size", "pipeline_model_parallel_size")
    rough = {}
    for degrees in PLANNED:
        layout = config_from_values({**values, **dict(zip(keys, degrees, strict=True))})
        rough[degrees] = rough_seconds(layout.resolve(8), 32_000, load_cluster("h100"), 8)
    for one, seconds in PLANNED.items():
        for other, more in PLANNED.items():
            assert seconds > more or rough[one] <= DOUBT * rough[other]
        assert 0.5 * seconds < rough[one] < seconds
