"""The stages of a run, as a file and the command line describe them."""

import re

import pytest
import yaml

from megalong.config.arguments import config_from_values, parse_arguments, to_yaml
from megalong.config.recipe import parse_run
from megalong.training.learning_rate import learning_rate
from megalong.utils.errors import UserError
from tests.recipe_file import NEEDED, RECIPE, changed, stages_of, write_recipe


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return write_recipe(tmp_path)


def test_each_stage_is_a_run_that_goes_on_from_the_one_before(file):
    short, long = stages_of()
    assert [(s.name, s.number, s.count, s.begin, s.end) for s in (short, long)] == [
        ("short", 1, 2, 0, 10),
        ("long", 2, 2, 10, 15),
    ]
    assert (short.tokens, long.tokens) == (10 * 4 * 64, 5 * 4 * 256)
    assert short.notes == ()
    [note] = long.notes
    assert note == ("stage long: train_tokens 5,000 are rounded up to 5,120, 5 iterations of 1,024")
    for stage in (short, long):
        assert stage.config.model.hidden_size == 64 and stage.config.run.save == "run"
    assert short.config.attention.segment_lengths == (16, 64)
    assert short.config.data.data_path == ("corpus",)
    assert long.config.data.data_path is None and long.config.data.data_blend == "blend.yaml"
    assert long.config.attention.attention == ("dilated", "dense")
    assert (short.config.model.rotary_base, long.config.model.rotary_base) == (10000.0, 50000.0)
    assert [s.config.parallel.sequence_parallel_size for s in (short, long)] == [1, 2]
    rates = [learning_rate(i, short.config.training) for i in range(1, 11)]
    assert rates == pytest.approx([5e-4, 1e-3, *(1e-3 * left / 8 for left in range(8, 0, -1))])
    rates = [learning_rate(i, long.config.training) for i in range(11, 16)]
    assert rates == pytest.approx([5e-4, 5e-4, 5e-4, 5e-4, 5e-4 * (2 * 0.5**0.5 - 1)])


def test_a_run_without_stages_is_one_without_a_name(file):
    flags = [*NEEDED, "--save", "run"]
    [only] = parse_run(flags).resolve(1)
    given = parse_arguments(flags)
    assert (only.name, only.begin, only.given, only.config) == (None, 0, given, given.resolve(1))
    with pytest.raises(UserError, match=r"^nothing is added"), only.settings.errors():
        raise UserError("nothing is added")


def test_what_starts_a_like_run_is_written_down(file):
    stages = stages_of("--micro-batch-size", "1", "--profile", "--profile-step-start", "12",
                       "--profile-step-end", "14")  # fmt: skip
    assert [stage.config.run.profile for stage in stages] == [False, True]
    file.write_text(stages[0].flags)
    again = stages_of("--load", "run")
    assert [stage.config for stage in again] == [stage.config for stage in stages]
    listed = yaml.safe_load(stages[0].flags)["stages"]
    assert [stage["train_iters"] for stage in listed] == [10, 5] and "lr" in listed[0]
    assert "hidden_size" not in listed[0]


def test_what_is_written_of_a_scaling_and_of_samples_is_read_again(file):
    """Of what one stage has, the file written gives the others their default or nothing."""
    changed(file, ("rotary_base: 50000", "rope_scaling_factor: 4\n      rope_original_length: 64"),
            ("    lr: 5.0e-4", "    lr: 5.0e-4\n    pretrained_checkpoint: null"),
            ("    train-iters: 10", "    train-iters: 10\n    sample_prompts: [a, b]\n"
             "    sample_interval: 3\n    keep_best_by: code"),
            ("save: run\n", "save: run\nkeep_best: true\n"))  # fmt: skip
    stages = stages_of()
    assert [stage.config.samples.sample_prompts for stage in stages] == [("a", "b"), None]
    assert [stage.config.run.keep_best_by for stage in stages] == ["code", None]
    listed = yaml.safe_load(stages[0].flags)["stages"]
    assert [stage["rope_original_length"] for stage in listed] == [8192, 64]
    file.write_text(stages[0].flags)
    assert [s.config for s in stages_of("--load", "run")] == [s.config for s in stages]


@pytest.mark.parametrize(
    "tokens, iterations",
    [("2**20", 1024), ("1Mi", 1024), ("'2048'", 2), ("4.0e3", 4), ("4e3", 4)],
)
def test_how_tokens_may_be_written(file, tokens, iterations):
    changed(file, ("train_tokens: 5e3", f"train_tokens: {tokens}"))
    assert stages_of()[1].iterations == iterations


def test_how_a_stage_is_computed_the_command_line_decides(file):
    for flags in (
        ("--sequence-parallel-size", "1", "--zero-stage", "2"),
        ("--micro-batch-size", "1", "--memory-path", "on"),
    ):
        for stage in stages_of(*flags):
            given = yaml.safe_load(to_yaml(stage.given))
            found = {name: value for each in given.values() for name, value in each.items()}
            for flag, value in zip(flags[::2], flags[1::2], strict=True):
                assert str(found[flag[2:].replace("-", "_")]) == value, flag
    assert [stage.config.training.clip_grad for stage in stages_of("--clip-grad", "2")] == [2, 2]


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--lr 1", "--lr holds for all stages, and long has lr of its own (--config recipe.yaml,"
         " line 31)"),
        ("--train-data-path x", "--train-data-path holds for all stages, and long has data_blend"),
        ("--train-iters 5", "--train-iters beside stages: each stage has its own"),
        ("--lr-begin-iters 5", "--lr-begin-iters beside stages: the schedule of a stage begins"),
        ("--use-checkpoint-opt-param-scheduler", "each stage has its own: leave it out"),
        ("--dry-run -1", "--dry-run -1"),
        ("--global-batch-size 3", "line 8: stage short: --global-batch-size 3 does not divide"),
    ],
)  # fmt: skip
def test_flags_that_do_not_go_with_the_stages(file, flags, message):
    with pytest.raises(UserError) as error:
        stages_of(*flags.split(), ranks=1)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "change, line, message",
    [
        (("    seq_length: 64", "    seq_lenght: 64"), 15,
         "stage short: seq_lenght: unknown key; did you mean seq_length?"),
        (("train_tokens: 5e3", "train_token: 5e3"), 29,
         "training.train_token: unknown key; did you mean train_tokens?"),
        (("rotary_base: 50000", "lr_wsd_decay_iters: 2"), 23, "belongs to the section training"),
        (("rotary_base: 50000", "seq-length: 2"), 23, "model.seq-length: given twice"),
        (("lr: 5.0e-4", "min_lr: 0\n    min_lr: 0"), 32, "stage long: min_lr: given twice"),
        (("rotary_base: 50000", "hidden_size: 32"), 23,
         "stage long: hidden_size: is the same in all stages: set it beside `stages:`"),
        (("rotary_base: 50000", "rotary_base: fast"), 23, "expected float, found 'fast'"),
        (("lr: 5.0e-4", "lr_begin_iters: 1"), 31, "the schedule of a stage begins with the stage"),
        (("lr: 5.0e-4", "pretrained_checkpoint: x"), 31, "only the first stage begins with"),
        (("name: long", "name: short"), 20, "short is the name of another stage already"),
        (("  - name: long\n    model:", "  - model:"), 20, "one without a name"),
        (("name: long", "name: ' '"), 20, "one without a name"),
        (("name: long", "name: 1.5"), 20, "a name is text, found 1.5: put it in quotes"),
        (("train_tokens: 5e3", "train_tokens: 2**x"), 29, "number, found '2**x'"),
        (("    train-iters: 10\n", ""), 14, "stage short has no length: set train_iters"),
        (("train-iters: 10", "train-iters: 0"), 18, "expected a positive whole number, found 0"),
        (("train-iters: 10", "train_iters: 1\n    train_tokens: 64"), 19, "keep one of them"),
        (("train-iters: 10", "train-iters: 1"), 19,
         "stage short: --lr-warmup-iters 2 is more than the 1 iteration of the stage"),
        (("lr_wsd_decay_iters: 2", "lr_wsd_decay_iters: 6"), 33,
         "stage long: --lr-wsd-decay-iters 6 is more than the 5 of the stage's 5 iterations"),
        (("global_batch_size: 4\n", ""), 19, "train_tokens is a number of iterations only where"),
        (("rotary_base: 50000", "rope_original_length: 64"), 23, "--rope-scaling-factor"),
        (("save: run\n", "save: run\nrope_original_length: 64\n"), 12,
         "stage short: --rope-original-length 64"),
        (("segment_lengths: [16, 64]", "segment_lengths: [16]"), 16,
         "stage short: --segment-lengths has 1 values and --dilation-rates 2"),
        (("lr: 1.0e-3\n", "lr: 1.0e-3\ntrain_iters: 5\n"), 6, "each stage has its own"),
        (("save: run\n", ""), 12, "set --save"),
        (("  - name: short", "  - 5\n  - name: short"), 14, "expected `name: ...` and settings"),
        (("  - name: short", "  - [{a: 1, a: 2}]\n  - name: short"), 14, "a: given twice"),
    ],
)  # fmt: skip
def test_bad_stages_name_key_and_line(file, change, line, message):
    changed(file, change)
    with pytest.raises(UserError) as error:
        stages_of()
    assert message in str(error.value) and "\n" not in str(error.value)
    assert re.match(rf"--config recipe.yaml, line {line}: ", str(error.value)), error.value


@pytest.mark.parametrize(
    "preset, change, line, message",
    [
        ("longnet-llama-125m", ("    dilation_rates: [1, 2]\n", ""), 16,
         "stage short: --segment-lengths is given without --dilation-rates"),
        ("longnet-125m", ("seq_length: 256", "seq_length: 131072"), 22,
         "stage long: --seq-length 131072 is beyond what xPos can scale"),
    ],
)  # fmt: skip
def test_bad_stages_beside_a_preset_name_line_too(file, preset, change, line, message):
    of_model = "model:\n  num_layers: 2\n  hidden_size: 64\nnum_attention_heads: 4\n"
    changed(file, (of_model, ""), change)
    with pytest.raises(UserError) as error:
        stages_of("--preset", preset)
    assert str(error.value).startswith(f"--config recipe.yaml, line {line - 4}: {message}")


def test_a_null_beside_the_stages_is_meant(file):
    """Of the positions of an imported model, say."""
    changed(file, ("save: run\n", "save: run\nyarn_attention_factor: null\n"))
    first, second = parse_run(["--config", "recipe.yaml"]).stages
    assert "yarn_attention_factor" in first.meant & second.meant
    assert "lr" not in first.meant


LLAMA_31 = {"rope_scaling_factor": 8, "rope_original_length": 64}
YARN = {"yarn_rotary_scaling_factor": 4, "yarn_original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    "positions, of_all, forgotten",
    [
        # By stage; which is refused, and for what.
        ([{}, {"rotary_base": 4e4}, {}], {}, ("third", "rotary_base: 40000.0 of the stage before"
         " it, second, is not of this one: set it here too, or rotary_base: 10000.0, the default")),
        ([{}, {"rotary_base": 4e4}, {"rotary_base": 1e4}], {}, None),
        ([{}, {"rotary_base": 4e4}, {"rotary_base": 8e4}], {}, None),
        ([{"rotary_base": 4e4}, {"rotary_base": 4e4}], {}, None),
        # What is beside `stages:` holds for all, and its defaults are set for none by itself.
        ([{}, {"rotary_base": 4e4}, {}], {"rotary_base": 2e4}, None),
        ([{}, {"rotary_base": 4e4}, {}], {"rotary_base": 1e4}, ("third", "rotary_base: 40000.0")),
        ([LLAMA_31, {}], {}, ("second", "rope_scaling_factor: 8.0 of the stage before it, first, is"
         " not of this one: set it here too, or rope_scaling_factor: null, the default, if")),
        ([LLAMA_31, {"rope_scaling_factor": 8}], {}, ("second", "rope_original_length: 64")),
        ([LLAMA_31, {"rope_scaling_factor": None}], {}, None),
        ([LLAMA_31, {"rope_scaling_factor": 1}, {}], {}, None),
        ([LLAMA_31, YARN], {}, None),
        ([LLAMA_31, {}], LLAMA_31, None),
        ([YARN | {"yarn_beta_fast": 16}, YARN], {}, ("second", "yarn_beta_fast: 16.0 of the")),
    ],
    ids=str,
)  # fmt: skip
def test_no_stage_forgets_the_positions_of_the_one_before_it(file, positions, of_all, forgotten):
    content = yaml.safe_load(RECIPE.partition("stages:")[0]) | of_all
    names = ("first", "second", "third")
    content["stages"] = [
        {"name": name, "train_iters": 2, **own} for name, own in zip(names, positions, strict=False)
    ]
    file.write_text(yaml.safe_dump(content, sort_keys=False))
    if forgotten is None:
        stages = stages_of()
        file.write_text(stages[0].flags)  # which says of each what it is
        assert [s.config for s in stages_of("--load", "run")] == [s.config for s in stages]
        return
    stage, words = forgotten
    line = 1 + file.read_text().splitlines().index(f"- name: {stage}")
    with pytest.raises(UserError) as error:
        stages_of()
    assert str(error.value).startswith(f"--config recipe.yaml, line {line}: stage {stage}: {words}")
    assert "\n" not in str(error.value)


def test_what_is_of_a_scaling_may_stand_beside_the_stages(file):
    """It is of those that have the scaling, which no other has a use for."""
    of_all = "yarn_original_max_position_embeddings: 64\nrope_original_length: 32\n"
    changed(file, ("rotary_base: 50000", "yarn_rotary_scaling_factor: 4"))
    changed(file, ("save: run\n", "save: run\n" + of_all))
    changed(file, ("    train-iters: 10", "    train-iters: 10\n    rope_scaling_factor: 2"))
    found = [stage.config.model for stage in stages_of()]
    assert [model.rope_original_length for model in found] == [32, 8192]
    assert [model.yarn_original_max_position_embeddings for model in found] == [None, 64]


def test_stages_are_a_list_and_for_one_command(file):
    with pytest.raises(UserError, match=r"line 13: stages: a run of several is for pretrain"):
        parse_arguments(["--config", "recipe.yaml"])
    for wrong in ("stage", "Stages", "stags"):
        file.write_text(RECIPE.replace("stages:", f"{wrong}:"))
        words = rf"line 13: {wrong}: unknown key; did you mean stages\?$"
        with pytest.raises(UserError, match=words):
            stages_of()
    file.write_text("save: run\nstages: {}\n")
    with pytest.raises(UserError, match=r"line 2: stages: a list is expected"):
        stages_of()


def test_a_stage_alone(file):
    """As a run that has no other: its iterations count from 0, what others have is not its own."""
    changed(file, ("save: run\n", "save: run\nprofile: true\nprofile_step_start: 12\n"
                   "profile_step_end: 14\nrope_original_length: 64\n"),
            ("rotary_base: 50000", "rope_scaling_factor: 4"))  # fmt: skip
    recipe = parse_run(["--config", "recipe.yaml"])
    short, long = (recipe.alone(recipe.stage(name)) for name in ("short", "long"))
    assert (short["train_iters"], long["train_iters"], long["lr_begin_iters"]) == (10, 5, 0)
    assert "rope_original_length" not in short and long["rope_original_length"] == 64
    assert not short["profile"] and not long["profile"]
    for values in (short, long):
        config_from_values(values).resolve(2)
