"""What is in a checkpoint, without loading any of its tensors.

    python tools/inspect_checkpoint.py RUN/iter_0001000 [--verify]
    python tools/inspect_checkpoint.py RUN                          (the one in force)

Names, shapes and number formats; iteration and tokens; the layout that saved it, which any other
may load; the configuration. --verify compares every file with its hash.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a clone need not be installed

from megalong.command_line import ArgumentParser, run

if TYPE_CHECKING:
    from megalong.checkpoint.manifest import Manifest
    from megalong.checkpoint.reading import CheckpointReader


def main() -> None:
    parser = ArgumentParser(__doc__)
    parser.add_argument("checkpoint", type=Path, help="a checkpoint, or a run folder")
    parser.add_argument("--verify", action="store_true", help="compare every file with its hash")
    arguments = parser.parse_args()
    from megalong.checkpoint.folder import being_read, find_checkpoint
    from megalong.checkpoint.manifest import Manifest, check_files, check_share
    from megalong.checkpoint.reading import CheckpointReader

    checkpoint = find_checkpoint(arguments.checkpoint)
    manifest = Manifest.read(checkpoint)
    with being_read(checkpoint):
        show(CheckpointReader(checkpoint), manifest)
        if arguments.verify:
            check_files(checkpoint)
            check_share(checkpoint, manifest)
            print(f"sound: all {len(manifest.files)} files are what was written")


def show(reader: CheckpointReader, manifest: Manifest) -> None:
    """Print all there is to know."""
    from megalong.checkpoint.names import WEIGHTS, parameter_of
    from megalong.checkpoint.texts import read_config_text, read_settings
    from megalong.progress import human_bytes

    progress, settings = reader.progress(), read_settings(reader.checkpoint)
    sizes = {name: math.prod(entry.size) for name, entry in reader.tensors.items()}
    parameters = sum(size for name, size in sizes.items() if parameter_of(name, WEIGHTS))
    print(f"{reader.checkpoint}: {human_bytes(manifest.size)} in {len(manifest.files)} files")
    print(
        f"iteration {progress.iteration:,} | {progress.consumed_samples:,} sequences"
        f" | {progress.consumed_tokens:,} tokens | {progress.updates:,} updates"
    )
    print(f"saved by {layout(settings, manifest.ranks)}")
    # Training does not count those of ids that its tokenizer has not; it is not asked for here.
    print(
        f"{parameters:,} parameters, with those that fill up the vocabulary; in all"
        f" {len(reader.tensors)} tensors:"
    )
    width = max(map(len, reader.tensors))
    for name, entry in sorted(reader.tensors.items()):
        dtype = str(entry.properties.dtype).removeprefix("torch.")
        print(f"  {name:{width}}  {dtype:8}  {' x '.join(map(str, entry.size)) or 'scalar'}")
    print("configuration:")
    print("  " + read_config_text(reader.checkpoint).strip().replace("\n", "\n  "))


def layout(settings: dict, ranks: int) -> str:
    """The parallel sizes of a resolved configuration in words."""
    sequence, tensor, pipeline = (
        settings[f"{axis}_parallel_size"] for axis in ("sequence", "tensor_model", "pipeline_model")
    )
    data = ranks // (sequence * tensor * pipeline)
    return (
        f"{ranks} ranks: sequence {sequence} x tensor {tensor} x pipeline {pipeline} x data {data},"
        f" ZeRO {settings['zero_stage']}"
    )


if __name__ == "__main__":
    run(main)
