"""A search in words, and the files that start a layout."""

import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from megalong.config.arguments import config_from_values, parse_arguments
from megalong.config.memory import USABLE
from megalong.dry_run.cluster import load_cluster
from megalong.dry_run.cost import StepCost
from megalong.dry_run.plan_text import (
    Training,
    duration,
    explained,
    layout_name,
    rejected,
    table,
    write_launch_files,
)
from megalong.dry_run.search import NotRun, PlannedLayout, Search, Slower
from megalong.utils.errors import UserError

GIB = 2**30
VALUES = {
    "num_layers": 4,
    "hidden_size": 128,
    "num_attention_heads": 4,
    "seq_length": 4096,
    "global_batch_size": 8,
    "data_path": ("unread",),
    "tokenizer_type": "ByteTokenizer",
}


def layout(memory=(3, 5), host=0, fits=True, seconds=2.0, **values):
    cost = StepCost(
        compute={"attention": 0.5, "mlp": 0.5},
        communication={"sequence": 0.25},
        hidden={"sequence": 0.125},
        bubble=0.25,
        offload=0.0,
        launches=0.25,
        update=0.25,
        total=seconds,
        tokens_per_second=8 * 4096 / seconds,
        mfu=0.25,
    )
    weights, activations = memory
    return PlannedLayout(
        config=config_from_values({**VALUES, **values}).resolve(8),
        memory=Counter(weights=weights * GIB, activations=activations * GIB),
        host=host,
        traffic={"sequence": {"all_gather": {"calls": 8, "bytes": 3_000_000_000}}},
        flops={("mlp", "forward"): 10**12},
        kernels=1234,
        cost=cost if fits else None,
    )


@pytest.fixture
def training():
    return Training(tokens=8 * 4096 * 43_200, ranks=8, cluster=load_cluster("h100"))


def test_a_layout_is_named_by_its_degrees():
    values = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}
    config = layout(num_layers_per_virtual_pipeline_stage=1, **values).config
    name = "TP 2 SP 1 PP 2 DP 2, chunks of 1 layer, 4 x 1 sequences, ZeRO 1, memory path auto"
    assert layout_name(config, 8) == name


def test_the_table_has_days_and_costs(training):
    head, row = table([layout()], training).splitlines()
    assert head.split()[:2] == ["step", "s"]
    # 43,200 steps of 2 s are a day; of 8 devices.
    cells = row.split()
    assert cells[:5] == ["1", "2", "16,384", "25.0%", "8.0"]
    dollars = f"{24 * 8 * training.cluster.price:,.0f}"
    assert ["1", "day", dollars] == cells[cells.index("3") + 1 :][:3]
    assert "62% activations, 38% weights" in row


@pytest.mark.parametrize(
    ("seconds", "words", "dollars"),
    [
        (5.3333, "5.33 s", "0.04"),
        (0.5, "0.5 s", "<0.01"),
        (90, "1.5 min", "0.60"),
        (5_400, "1.5 hours", "36.00"),
        (86_400 * 2, "2 days", "1,152"),
        (86_400 * 12_345, "12,345 days", "7,110,720"),
    ],
)
def test_times_and_costs_have_units_of_their_size(seconds, words, dollars, training):
    short = replace(training, tokens=seconds * 8 * 4096 / 2)
    assert duration(seconds) == words
    assert f" tokens in {words} for ${dollars}" in explained(layout(), short)


def test_an_explanation_adds_up(training):
    text = explained(layout(), training)
    block = text.split("slowest stage:\n")[1].split("\n\n")[0].splitlines()
    seconds = {line.split("  ")[2]: float(line.split()[-2]) for line in block if "%" in line}
    assert sum(seconds.values()) == 2.0
    assert "hidden behind computation: sequence axis" in text
    assert "8 calls  3.0 GB" in text and "not calibrated" in text
    assert "1.35 to 2.6 times too short" in " ".join(text.split())


def test_what_does_not_fit_says_by_how_much(training):
    large = layout(memory=(30, 70), fits=False)
    on_host = layout(host=400 * GIB, fits=False)
    slower = [Slower(large.config, 16.0), Slower(large.config, 32.0)]
    not_run = [NotRun(large.config, 900 * GIB), NotRun(large.config, 800 * GIB, activations=True)]
    found = Search([layout(), large, on_host], not_run, slower)
    found.refused["--zero-stage 2 cannot"] += 3
    text = rejected(found, training)
    usable = USABLE * training.cluster.device.memory / GIB
    assert f"2 layouts would not fit in {usable:.1f} GiB" in text
    assert "100.0 GiB (70% activations, 30% weights)" in text
    assert "3200 GiB on the host of a node, which has" in text
    name = layout_name(large.config, training.ranks)
    for reason, needed in (("estimate of --memory-path auto", 900), ("activations, of", 800)):
        line = rf"1 layout not run that would not fit in {usable:.1f} GiB by .*{reason}.*:\n"
        assert re.search(rf"{line}    {needed}\.0 GiB: {re.escape(name)}$", text, re.MULTILINE)
    assert "3 x --zero-stage 2 cannot" in text
    assert "2 other ways to share the work not run" in text


@pytest.mark.parametrize(("ranks", "nodes"), [(4, 1), (32, 4)])
def test_files_that_start_it(tmp_path, ranks, nodes):
    values = {**VALUES, "data_path": ("some data",), "pipeline_model_parallel_size": 2}
    config = config_from_values(values)
    folder = tmp_path / "a plan"
    paths = write_launch_files(folder, config, ranks, 8, "PP 2", overwrite=False)
    settings, command, job = paths
    assert parse_arguments(["--config", str(settings)]) == config
    assert yaml.safe_load(settings.read_text())["parallel"] == {"pipeline_model_parallel_size": 2}
    assert f"#SBATCH --nodes={nodes}\n" in job.read_text()
    assert f"#SBATCH --gpus-per-node={ranks // nodes}\n" in job.read_text()
    for script in (command, job):
        subprocess.run(["bash", "-n", script], check=True)
        subprocess.run([Path(sys.executable).with_name("shellcheck"), script], check=True)
    fake = tmp_path / "checkout/.venv/bin/torchrun"  # that of megalong's folder goes first
    fake.parent.mkdir(parents=True)
    fake.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    fake.chmod(0o755)
    environment = {"PATH": "/usr/bin:/bin", "MEGALONG": str(tmp_path / "checkout")}
    environment |= {"NODE_RANK": "1", "MASTER_ADDR": "first"}
    done = subprocess.run(
        ["bash", command, "--lr", "1"], env=environment, capture_output=True, text=True, check=True
    )
    words = done.stdout.splitlines()
    assert f"--nproc-per-node={ranks // nodes}" in words
    assert ("--node-rank=1" in words) == (nodes > 1)
    run = ["--save", str(folder / "run")]
    assert words[-6:] == ["--config", str(settings), *run, "--lr", "1"]
    with pytest.raises(UserError, match=r"config\.yaml: is there already: set --overwrite"):
        write_launch_files(folder, config, ranks, 8, "PP 2", overwrite=False)
    write_launch_files(folder, config, ranks, 8, "PP 2", overwrite=True)


def test_a_run_folder_that_was_given_stays(tmp_path):
    config = config_from_values({**VALUES, "save": "runs/mine", "keep_last": 2})
    settings, command, job = write_launch_files(tmp_path, config, 4, 8, "", overwrite=False)
    assert parse_arguments(["--config", str(settings)]) == config
    assert "--save" not in command.read_text()
    assert f"RUN=${{RUN:-{Path('runs/mine').resolve()}}}\n" in job.read_text()


def test_a_job_on_cpus_asks_for_no_gpus(tmp_path):
    config = config_from_values(VALUES)
    options = {"overwrite": False, "on_gpu": False, "predicted": "Planned are 3 days."}
    *_, job = write_launch_files(tmp_path, config, 16, 8, "DP 16", **options)
    text = job.read_text()
    assert "gpus" not in text and " RANKS_PER_NODE=8\n" in text
    assert "#SBATCH --ntasks-per-node=1\n#SBATCH --exclusive\n# Set it" in text
    assert "# Planned are 3 days.\n#SBATCH --time=24:00:00\n" in text
    subprocess.run(["bash", "-n", job], check=True)
    subprocess.run([Path(sys.executable).with_name("shellcheck"), job], check=True)


def test_nodes_are_full(tmp_path):
    with pytest.raises(UserError, match="12 ranks do not fill nodes of 8"):
        write_launch_files(tmp_path, config_from_values(VALUES), 12, 8, "", overwrite=False)
