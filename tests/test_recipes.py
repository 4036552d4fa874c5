"""The configurations of examples/recipes: each is one that would run."""

import dataclasses
import os
import re
import shutil
import subprocess

import pytest
import yaml

from megalong.config import ModelConfig
from megalong.config.recipe import parse_run
from megalong.hf.configs import megalong_values
from megalong.training.stage_table import stage_table
from tests.launching import REPOSITORY

RECIPES = REPOSITORY / "examples" / "recipes"
FILES = sorted(str(file.relative_to(RECIPES)) for file in RECIPES.glob("*/*.yaml"))
# Flags that their commands have besides, and ranks.
FLAGS = {"hybrid/gpu.yaml": ["--preset", "longnet-llama-1.3b"]}
RANKS = {"hybrid/gpu.yaml": 16, "imported_to_long/gpu.yaml": 8, "short_to_long/gpu.yaml": 8}
LENGTHS = {
    "short_to_long/cpu.yaml": [256, 1024, 4096],
    "short_to_long/gpu.yaml": [2048, 8192, 32768],
    "imported_to_long/pretrained.yaml": [256],
    "imported_to_long/cpu.yaml": [1024],
    "imported_to_long/gpu.yaml": [131072],
    "hybrid/cpu.yaml": [256, 2048],
    "hybrid/gpu.yaml": [4096, 32768, 131072],
}
# config.json of Qwen2.5-0.5B, what is of the model.
QWEN = {
    "model_type": "qwen2", "hidden_act": "silu", "hidden_size": 896, "initializer_range": 0.02,
    "intermediate_size": 4864, "max_position_embeddings": 32768, "max_window_layers": 24,
    "num_attention_heads": 14, "num_hidden_layers": 24, "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6, "rope_theta": 1e6, "sliding_window": 32768, "tie_word_embeddings": True,
    "use_sliding_window": False, "vocab_size": 151936,
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_a_recipe_passes_its_dry_run(name):
    data = [] if name.startswith("imported") else ["--tokenizer-model", "tokenizer.model"]
    flags = [*FLAGS.get(name, []), "--data-path", "data", *data, "--dry-run"]
    recipe = parse_run(["--config", str(RECIPES / name), *flags])
    ranks = RANKS.get(name, 1)
    stages = recipe.resolve(ranks)
    assert [stage.config.model.seq_length for stage in stages] == LENGTHS[name]
    for stage in stages:
        assert stage.config.attention.oddities(stage.config.model.seq_length) == []
        assert stage.config.data.tokenizer_model is not None
    last = stage_table(stages, 32000, ranks)
    assert all(f"{length:,}" in last for length in LENGTHS[name])


@pytest.mark.parametrize("name", FILES)
def test_a_recipe_says_how_it_is_started(name):
    """Its comment has the command, or cpu.sh beside it has; README.md has the same flags."""
    file = RECIPES / name
    head = "".join(re.findall("^#.*\n", file.read_text(), re.MULTILINE))
    if "--config" not in head:
        assert "cpu.sh" in head and f'"$here/{file.name}"' in file.with_name("cpu.sh").read_text()
        return
    readme = (RECIPES / "README.md").read_text()
    for flag in ["--config", f"examples/recipes/{name}", *FLAGS.get(name, [])]:
        assert flag in head and flag in readme


def test_no_two_recipes_share_a_run_folder():
    runs = [yaml.safe_load((RECIPES / name).read_text())["run"] for name in FILES]
    assert all(run["load"] == run["save"] for run in runs)
    assert len({run["save"] for run in runs}) == len(FILES) == len(LENGTHS)


@pytest.mark.parametrize("stops_in", ["runs/pretrained", "runs/imported_to_long_cpu", None])
def test_the_script_ends_where_a_training_was_asked_to_stop(stops_in, tmp_path):
    """In a tree of its own, from elsewhere, with a python that writes down how it was called."""
    folder = tmp_path / "examples" / "recipes" / "imported_to_long"
    shutil.copytree(RECIPES / "imported_to_long", folder)
    data = tmp_path / "runs" / "quickstart" / "data"
    data.mkdir(parents=True)
    (data / "python.jsonl").write_text("".join(f"{i}\n" for i in range(39)))
    fake = tmp_path / "bin" / "python"
    fake.parent.mkdir()
    fake.write_text(
        "#!/usr/bin/env bash\n"
        'echo "$DS_ACCELERATOR,$CUDA_VISIBLE_DEVICES, $*" >>calls\n'
        f'[[ "$*" != *"--save {stops_in} "* ]] ||'
        f" {{ mkdir {stops_in}; echo stopped by SIGINT >{stops_in}/stopped; }}\n"
    )
    fake.chmod(0o755)
    ended = subprocess.run(
        [folder / "cpu.sh"],
        cwd="/",
        env=os.environ | {"PATH": f"{fake.parent}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
    )
    calls = (tmp_path / "calls").read_text().splitlines()
    assert all(call.startswith("cpu,, ") for call in calls)
    if stops_in is None:
        assert ended.returncode == 0
        assert "evaluate.py --model runs/from_scratch_cpu" in calls[-1]
        assert (tmp_path / "runs" / "held_out.jsonl").read_text() == "36\n37\n38\n"
    else:
        assert ended.returncode == 1
        assert "stopped by SIGINT; the same command goes on" in ended.stderr
        assert f"pretrain_longnet.py --config {folder}" in calls[-1] and stops_in in calls[-1]


def test_the_long_qwen_is_the_model_that_is_imported():
    content = yaml.safe_load((RECIPES / "imported_to_long" / "gpu.yaml").read_text())
    values = megalong_values(QWEN, "config.json")
    assert content["model"]["seq_length"] == 4 * values["seq_length"]
    assert content["model"]["rotary_base"] == 4 * values["rotary_base"]
    assert content["model"]["padded_vocab_size"] == QWEN["vocab_size"]
    defaults = {field.name: field.default for field in dataclasses.fields(ModelConfig)}
    ours = defaults | content["model"]
    changed = {"attention", "seq_length", "rotary_base", "kv_channels"}
    assert {name: ours[name] for name in values.keys() - changed} == {
        name: value for name, value in values.items() if name not in changed
    }
