"""What is told of a run that goes on otherwise than it was."""

import copy
import dataclasses

import pytest

from megalong.checkpoint.content import Progress, texts_of
from megalong.config.arguments import parse_arguments
from megalong.config.flags import flag_name
from megalong.config.recipe import parse_run
from megalong.config.stages import WHAT
from megalong.training.learning_rate import learning_rate
from megalong.training.resuming import (
    moves_the_loss,
    open_checkpoint,
    other_ways,
    starting_point,
    with_schedule_of,
)
from megalong.utils.errors import UserError
from tests.hf.models import random_checkpoint
from tests.launching import small_run_flags

GIVEN = {"train_iters": 10, "lr": 1.0, "lr_warmup_iters": 0, "memory_path": "off"}


def resolved(**changes):
    return parse_arguments(small_run_flags("data", **GIVEN | changes)).resolve(1)


@pytest.fixture
def checkpoint(tmp_path):
    """Of the last iteration."""
    for name, text in texts_of(Progress(iteration=10), resolved()).items():
        (tmp_path / name).write_bytes(text)
    return tmp_path


def test_nothing_is_told_where_nothing_changed(checkpoint):
    assert other_ways(checkpoint, resolved()) == []
    assert other_ways(checkpoint, resolved(micro_batch_size=4, zero_stage=2)) == []


def test_another_optimizer_is_asked_for_its_own_settings(checkpoint):
    config = resolved(adam_beta2=0.9, sgd_momentum=0.5, muon_momentum=0.5)
    for optimizer, flags in (
        ("adam", ["--adam-beta2"]),
        ("sgd", ["--sgd-momentum"]),
        ("muon", ["--adam-beta2", "--muon-momentum"]),  # AdamW is what it has for vectors
    ):
        training = dataclasses.replace(config.training, optimizer=optimizer)
        told = other_ways(checkpoint, dataclasses.replace(config, training=training))
        flags = flags if optimizer == "adam" else [*flags, "--optimizer"]
        assert {line.split()[0] for line in told} == {*flags}


@pytest.mark.parametrize(
    "changes, told",
    [
        ({"clip_grad": 2.0}, "--clip-grad is 2.0; the checkpoint was written with 1.0"),
        ({"adam_beta2": 0.9}, "--adam-beta2 is 0.9; the checkpoint was written with 0.98"),
        ({"sgd_momentum": 0.5}, None),  # it is Adam
        (
            {"document_attention": "isolated", "eod_mask_loss": True},
            [
                "--document-attention is isolated; the checkpoint was written with mixed",
                "--eod-mask-loss is on; the checkpoint was written with off",
            ],
        ),
        (
            {"objective": "mlm"},
            [
                "--objective is mlm; the checkpoint was written with causal",
                "--mask-rate is 0.15; the checkpoint was written without",
            ],
        ),
        ({"global_batch_size": 16}, "--global-batch-size is 16; the checkpoint was written with 8"),
        ({"seq_length": 256}, "--seq-length is 256; the checkpoint was written with 128"),
        ({"weight_decay": 0}, "--weight-decay is 0.0; the checkpoint was written with 0.01"),
        ({"loss_scale": 8}, "--loss-scale is 8.0; the checkpoint was written without"),
        (
            {"memory_path": "on", "no_offload_activations": True},
            "the memory path is --linear-cross-entropy --tiled-mlp --tiled-attention; that of the"
            " checkpoint's run was off",
        ),
    ],
)
def test_what_changed_is_a_line_each(checkpoint, changes, told):
    expected = told if isinstance(told, list) else [told] if told else []
    assert other_ways(checkpoint, resolved(**changes)) == expected


# Of the sources `Blend.continued` tells, and what flops match is in the pattern that it makes.
ELSEWHERE = {"data_path", "data_blend", "train_data_path", "match_flops"}


@pytest.mark.parametrize("section", ["model", "attention", "data"])
def test_what_a_stage_may_have_otherwise_is_told_and_moves_the_loss(checkpoint, section):
    config = resolved()
    settings = getattr(config, section)
    names = [name for name in vars(settings) if name in WHAT and name not in ELSEWHERE]
    assert len(names) > 3
    for name in names:
        other = copy.copy(settings)
        object.__setattr__(other, name, 12345)
        changed = dataclasses.replace(config, **{section: other})
        [line] = other_ways(checkpoint, changed, new_stage=True)
        assert line.startswith(f"{flag_name(name)} is 12345; the checkpoint was written with")
        assert moves_the_loss(checkpoint, changed), name


def test_a_finished_run_that_is_extended(checkpoint):
    longer = resolved(train_iters=20)
    assert other_ways(checkpoint, longer) == [
        "--train-iters is 20; the checkpoint was written with 10",
        "the learning rate goes from 1.000e-01 at iteration 10 to 5.000e-01 at iteration 11; with"
        " the checkpoint's schedule (--use-checkpoint-opt-param-scheduler) to 0.000e+00",
    ]
    kept = with_schedule_of(checkpoint, resolved(train_iters=20, lr=5.0))
    assert kept.training.train_iters == 20 and learning_rate(10, kept.training) == 0.1
    assert other_ways(checkpoint, kept) == [
        "--train-iters is 20; the checkpoint was written with 10"
    ]
    run = dataclasses.replace(longer.run, finetune=True)
    assert other_ways(checkpoint, dataclasses.replace(longer, run=run)) == []


def test_a_stable_schedule_is_extended_without_a_step(tmp_path):
    """As long as its decay has not begun; after that the rate goes up, and the run says so."""
    wsd = {"lr_decay_style": "WSD", "lr_wsd_decay_iters": 4, "lr_wsd_decay_style": "linear"}
    longer = "--train-iters is 20; the checkpoint was written with 10"
    for iteration, told in (
        (6, []),
        (
            8,
            [
                "the learning rate goes from 7.500e-01 at iteration 8 to 1.000e+00 at iteration 9;"
                " with the checkpoint's schedule (--use-checkpoint-opt-param-scheduler) to"
                " 5.000e-01"
            ],
        ),
    ):
        checkpoint = tmp_path / str(iteration)
        checkpoint.mkdir()
        for name, text in texts_of(Progress(iteration=iteration), resolved(**wsd)).items():
            (checkpoint / name).write_bytes(text)
        assert other_ways(checkpoint, resolved(**wsd)) == []
        config = resolved(**wsd | {"train_iters": 20})
        assert other_ways(checkpoint, config) == [longer, *told]
        config = resolved(train_iters=20, lr_decay_style="cosine")
        kept = with_schedule_of(checkpoint, config).training
        assert [learning_rate(i, kept) for i in range(6, 12)] == [1.0, 1.0, 0.75, 0.5, 0.25, 0.0]


def test_weights_may_begin_at_other_positions(tmp_path):
    random_checkpoint(tmp_path / "run")
    yarn = {"yarn_rotary_scaling_factor": 4, "yarn_original_max_position_embeddings": 128}
    longer = {"rotary_base": 5e5, **yarn, "load": tmp_path / "run"}
    with pytest.raises(UserError, match=r"--rotary-base is 500000.0, .* or set --finetune"):
        open_checkpoint(resolved(**longer))
    config = resolved(**longer, finetune=True)
    assert other_ways(open_checkpoint(config), config)[:2] == [
        "--rotary-base is 500000.0; the checkpoint was written with 10000.0",
        "--yarn-rotary-scaling-factor is 4.0; the checkpoint was written without",
    ]


YARN = {"yarn_rotary_scaling_factor": 4, "yarn_original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    "before, now, refused",
    [
        (
            {"rotary_base": 5e5},
            {},
            "--rotary-base is 10000.0, .* with 500000.0: set it to that, or",
        ),
        ({"rotary_base": 5e5}, {"rotary_base": 2e5}, None),
        (YARN, {}, "--yarn-rotary-scaling-factor is not set, .* with 4.0: set it to that, or to"),
        (YARN | {"yarn_beta_fast": 16}, YARN, "--yarn-beta-fast is 32.0, .* with 16.0"),
        # What is set is meant, the default too; and a factor of 1 turns all of a scaling off.
        ({"rotary_base": 5e5}, {"rotary_base": 1e4}, None),
        (
            {"rope_scaling_factor": 2, "rope_original_length": 64},
            {},
            "--rope-scaling-factor is not set, .* with 2.0: set it to that, or to 1 to turn it off",
        ),
        (
            {"rope_scaling_factor": 2, "rope_original_length": 64},
            {"rope_scaling_factor": 1},
            None,
        ),
    ],
    ids=str,
)
def test_weights_do_not_lose_their_positions_by_a_forgotten_flag(before, now, refused, tmp_path):
    random_checkpoint(tmp_path / "run", **before)
    flags = small_run_flags("data", **GIVEN, **now, pretrained_checkpoint=tmp_path / "run")
    [run] = parse_run(flags).resolve(1)
    if refused is None:
        assert starting_point(run.config, run)[1] is not None
    else:
        with pytest.raises(UserError, match=refused):
            starting_point(run.config, run)


def test_new_data_is_said_where_it_matters_alone(tmp_path):
    random_checkpoint(tmp_path / "run")
    config = resolved(load=tmp_path / "run", save=tmp_path / "other", new_data=True)
    with pytest.raises(UserError, match=r"--load \S+run is not the folder of --save: leave it out"):
        open_checkpoint(config)
    config = resolved(load=tmp_path / "run", save=tmp_path / "run", new_data=True)
    assert open_checkpoint(config) is not None


def test_the_share_of_masks_stays_in_a_folder(tmp_path):
    run = tmp_path / "run"
    random_checkpoint(run, objective="mlm")
    other = {"objective": "mlm", "mask_rate": 0.3, "load": run}
    with pytest.raises(UserError, match=r"--mask-rate is 0.3, .* with 0.15: .* another folder"):
        open_checkpoint(resolved(**other, save=run))
    assert open_checkpoint(resolved(**other, save=tmp_path / "other")) is not None
