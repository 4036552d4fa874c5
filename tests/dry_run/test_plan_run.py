"""tools/plan_run.py, as it is typed."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest

from megalong.config.arguments import parse_arguments
from megalong.dry_run import fake_device
from tests.launching import REPOSITORY

MODEL = "--num-layers 2 --hidden-size 64 --num-attention-heads 4 --seq-length 1024"
PATTERN = "--segment-lengths 256 1024 --dilation-rates 1 4"


def plan_run(*words):
    command = [sys.executable, REPOSITORY / "tools/plan_run.py", *words]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.skipif(fake_device.compiler() is None, reason="needs a C++ compiler")
def test_a_plan(tmp_path):
    flags = f"{MODEL} {PATTERN} --precision bf16 --sequence-parallel-size 2 --cluster h100 --gpus 2"
    output = tmp_path / "plan.json"
    done = plan_run(
        *flags.split(), "--explain", "--emit", tmp_path / "run", "--json", output,
        "--train-tokens", "1e9",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "TP 1 SP 2 PP 1 DP 1, 1 x 1 sequences, ZeRO 1, memory path off" in done.stdout
    assert "seconds of a step, in the slowest stage:" in done.stdout
    plan = json.loads(output.read_text())
    [layout] = plan["layouts"]
    assert layout["fits"] and plan["gpus"] == 2 and plan["tokens"] == 1e9
    assert layout["traffic"]["sequence"]["all_gather"]["bytes"] > 0
    total = layout["cost"]["total"]
    assert layout["cost"]["days"] == pytest.approx(1e9 / (1024 / total) / 86_400)
    emitted = parse_arguments(["--config", str(tmp_path / "run/config.yaml")])
    assert emitted.parallel.sequence_parallel_size == 2
    assert emitted.data.data_path is None and emitted.model.hidden_size == 64


STAGES = """
{num_layers: 2, hidden_size: 64, num_attention_heads: 4, precision: bf16, save: run,
 global_batch_size: 2, dilation_rates: [1, 4], rope_original_length: 1024, stages: [
  {name: short, seq_length: 1024, segment_lengths: [256, 1024], train_iters: 100},
  {name: long, seq_length: 2048, segment_lengths: [512, 2048], train_tokens: 1e6,
   rope_scaling_factor: 2, sequence_parallel_size: 2}]}
"""


@pytest.mark.skipif(fake_device.compiler() is None, reason="needs a C++ compiler")
def test_a_plan_of_a_stage(tmp_path):
    (tmp_path / "recipe.yaml").write_text(STAGES)
    flags = ["--config", tmp_path / "recipe.yaml", "--cluster", "h100", "--gpus", "2"]
    output = tmp_path / "plan.json"
    done = plan_run(*flags, "--stage", "long", "--zero-stage", "1", "--no-tiled-mlp",
                    "--memory-path", "auto", "--valid-data-path", "v",
                    "--json", output)  # fmt: skip
    assert done.returncode == 0, done.stderr
    _, _, told = done.stdout.partition("\nLayout 1, for the stage long; the others keep")
    assert "    sequence_parallel_size: 2\n" in told and "    tiled_mlp: false\n" in told
    assert "    memory_path: 'off'\n" in told  # what auto comes to in this layout
    assert json.loads(output.read_text())["tokens"] == 245 * 2 * 2048  # whole iterations
    for words, message in (
        ((), "the file of --config has stages: set --stage to one of short, long"),
        (("--stage", "longer"), "--stage longer: no such stage: set one of short, long"),
        (("--stage", "long", "--emit", tmp_path), "--emit writes a run of its own"),
        (
            ("--stage", "long", "--lr-warmup-iters", "300"),
            "recipe.yaml, line 5: stage long: --lr-warmup-iters 300 is more than the 245",
        ),
    ):
        done = plan_run(*flags, *words)
        assert done.returncode == 2 and message in done.stderr


@pytest.mark.skipif(fake_device.compiler() is None, reason="needs a C++ compiler")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_plan_that_is_stopped_ends_at_once(number):
    flags = f"{MODEL} {PATTERN} --cluster h100 --gpus 2 --processes 1"
    command = [sys.executable, REPOSITORY / "tools/plan_run.py", *flags.split()]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    # As from a terminal, Ctrl-C is for all of a group.
    with subprocess.Popen(command, **pipes, start_new_session=True) as plan:
        first = plan.stderr.readline()
        assert re.match(r"\d+ layouts in \d+ ways to share the work; ", first)
        time.sleep(1)  # a process begins to import
        (os.killpg if number == signal.SIGINT else os.kill)(plan.pid, number)
        said, errors = plan.communicate(timeout=60)
    assert plan.returncode == 128 + number
    assert "Stopped: 0 layouts had been run." in said
    assert "Traceback" not in errors and "leaked" not in errors, errors


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--gpus 8", "error: --cluster says what is planned for: set it"),
        ("--cluster h100", "error: --gpus says what is planned for: set it"),
        ("--cluster h1000 --gpus 8", "did you mean h100?"),
        ("--cluster h100 --gpus 0", "error: --gpus 0 must be at least 1"),
        (
            "--cluster h100 --gpus 8 --tensor-model-parallel-size 16",
            "error: --gpus 8 does not divide by --tensor-model-parallel-size 16: set a divisor",
        ),
        (
            "--cluster h100 --gpus 8 --tensor-model-parallel-size 8 --num-attention-heads 12"
            " --hidden-size 768",
            "does not divide by --tensor-model-parallel-size 8, whose ranks share it: set"
            " --tensor-model-parallel-size 4, or",
        ),
        ("--cluster h100 --gpus 1 --explain 99", "error: --explain 99: the table has at most"),
        ("--cluster h100 --gpus 8 --layrs 3", "error: unrecognized argument: --layrs"),
        (
            "--cluster h100 --gpus 8 --num-layers 6 --pipeline-model-parallel-size 4",
            "can be: --num-layers 6 does not divide by --pipeline-model-parallel-size 4",
        ),
    ],
)
def test_mistakes_are_one_line(words, message):
    done = plan_run(*words.split())
    assert done.returncode == 2
    assert message in done.stderr and done.stderr.count("\n") == 1
