"""What is said of the stages of a run before any is trained."""

import re

import pytest

from megalong.config.recipe import parse_run
from megalong.training.stage_table import print_stages, stage_table
from megalong.utils.errors import UserError
from tests.recipe_file import changed, stages_of, write_recipe


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return write_recipe(tmp_path)


def test_the_table_of_the_stages(file):
    recipe = parse_run(["--config", "recipe.yaml", "--dry-run"])
    assert recipe.dry_run == 0 and recipe.fewest_ranks == 2
    assert parse_run(["--config", "recipe.yaml", "--dry-run", "8"]).dry_run == 8
    lines = stage_table(recipe.resolve(2), 257, 2).splitlines()
    head, short, long, *lines = lines
    assert re.split(r"  +", head)[:5] == ["stage", "sequence", "batch", "iterations", "tokens"]
    assert re.split(r"  +", short)[:5] == ["short", "64", "4", "10", "2,560"]
    assert re.split(r"  +", long)[:5] == ["long", "256", "4", "5", "5,120"]
    dilated = "dilated attention, segment length/dilation rate:"
    assert [re.split(r"  +", line) for line in lines[1:11]] == [
        ["attention", "short", f"{dilated} 16/1, 64/2"],
        ["", "long", f"layers dilated dense, and so on: {dilated} 64/1, 256/4; dense attention"],
        ["positions", "short", "rope, rotary_base 10000.0"],
        ["", "long", "rope, rotary_base 50000.0"],
        ["learning rate", "short", f"0.001 to {1e-3 / 8:.2g}, linear, warm-up 2"],
        ["", "long", "0.0005 to 0.00021, WSD, exponential in the last 2"],
        ["data", "short", "corpus"],
        ["", "long", "a, b"],
        ["layout", "short", "sequence 1 x tensor 1 x pipeline 1 x data 2, ZeRO 1, micro batch 2"],
        ["", "long", "sequence 2 x tensor 1 x pipeline 1 x data 1, ZeRO 1, micro batch 2"],
    ]
    total, throughout, *more = lines[12:]
    shares = [float(re.search(r"([\d.]+)%", line)[1]) for line in (short, long)]
    assert sum(shares) == pytest.approx(100, abs=0.11) and shares[1] > 66
    assert total.startswith("15 iterations, 7,680 tokens, ") and total.endswith("on 2 ranks")
    ratio = float(throughout.split()[-4])
    assert ratio == pytest.approx(shares[1] / 100 * 7680 / 5120, rel=0.01)
    assert "train_tokens 5,000 are rounded up" in more[-1]


def test_the_table_needs_no_data_and_says_what_is_odd(file, capsys):
    changed(file, ("data_path: corpus\n", ""), ("    data_blend: blend.yaml\n", ""),
            ("segment_lengths: [64, 256]", "segment_lengths: [64, 512]"),
            ("rotary_base: 50000", "yarn_rotary_scaling_factor: 4\n"
             "      yarn_original_max_position_embeddings: 64"))  # fmt: skip
    with pytest.raises(UserError, match="--data-path is missing"):
        stages_of()
    print_stages(parse_run(["--config", "recipe.yaml", "--dry-run", "2"]))
    told = capsys.readouterr().out
    assert "\ndata           all    (not given)\n" in told
    assert "rope, rotary_base 10000.0, yarn_rotary_scaling_factor 4.0, yarn_original_max" in told
    assert told.endswith(
        "\nstage long: --segment-lengths 512: above --seq-length 256, and so one segment, the whole"
        " sequence\n"
    )
    flags = ("--valid-data-path", "v", "--tokenizer-type", "ByteTokenizer")
    print_stages(parse_run([*flags, "--lr-decay-style", "constant", "--dry-run"]))
    told = capsys.readouterr().out
    assert "\ndata             (not given), valid_data_path v\n" in told
    assert "\nlearning rate    0.0006, constant\n" in told
