"""Configurations for tests: of flags, and of a small run of two stages in a file."""

from pathlib import Path

from megalong.config import Config
from megalong.config.arguments import parse_arguments
from megalong.config.recipe import parse_run
from megalong.config.stages import Stage

NEEDED = ["--data-path", "data", "--tokenizer-type", "ByteTokenizer"]
RECIPE = """\
model:
  num_layers: 2
  hidden_size: 64
num_attention_heads: 4
lr: 1.0e-3
lr_decay_style: linear
global_batch_size: 4
micro_batch_size: 2
data_path: corpus
tokenizer_type: ByteTokenizer
save: run
load: run
stages:
  - name: short
    seq_length: 64
    segment_lengths: [16, 64]
    dilation_rates: [1, 2]
    train-iters: 10
    lr_warmup_iters: 2
  - name: long
    model:
      seq_length: 256
      rotary_base: 50000
    attention:
      attention: [dilated, dense]
      segment_lengths: [64, 256]
      dilation_rates: [1, 4]
    training:
      train_tokens: 5e3
    data_blend: blend.yaml
    lr: 5.0e-4
    lr_decay_style: WSD
    lr_wsd_decay_iters: 2
    sequence_parallel_size: 2
"""


def resolve(*flags: object, ranks: int | None = 1) -> Config:
    """Return the configuration of these flags, resolved on so many ranks; None: not resolved."""
    config = parse_arguments([*NEEDED, *map(str, flags)])
    return config if ranks is None else config.resolve(ranks)


def write_recipe(folder: Path) -> Path:
    """recipe.yaml, and the blend that it names."""
    (folder / "blend.yaml").write_text("- path: a\n- path: b\n")
    file = folder / "recipe.yaml"
    file.write_text(RECIPE)
    return file


def stages_of(*flags: str, ranks: int = 2) -> tuple[Stage, ...]:
    """The stages of the recipe.yaml here."""
    return parse_run(["--config", "recipe.yaml", *flags]).resolve(ranks)


def changed(file: Path, *replacements: tuple[str, str]) -> None:
    """Put each new text into the place of the old one, which the file has once."""
    text = file.read_text()
    for old, new in replacements:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    file.write_text(text)
