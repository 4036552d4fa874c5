"""What is in a checkpoint, without loading any of its tensors.

    python tools/inspect_checkpoint.py RUN/iter_0001000 [--verify] [--brief] [--json]
    python tools/inspect_checkpoint.py RUN                          (the one in force)

Names, shapes and number formats; iteration and tokens; the layout that saved it, which any other
may load; the configuration. --verify compares every file with its hash first, and says so in the
second line.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a clone need not be installed

from megalong.utils.command_line import ArgumentParser, run
from megalong.utils.errors import counted

if TYPE_CHECKING:
    from megalong.checkpoint.manifest import Manifest
    from megalong.checkpoint.reading import CheckpointReader


def main() -> None:
    parser = ArgumentParser(__doc__)
    parser.add_argument("checkpoint", type=Path, help="a checkpoint, or a run folder")
    parser.add_argument("--verify", action="store_true", help="compare every file with its hash")
    parser.add_argument("--brief", action="store_true", help="no tensors and no configuration")
    parser.add_argument("--json", action="store_true", help="the same as one JSON object")
    arguments = parser.parse_args()
    from megalong.checkpoint.folder import being_read, find_checkpoint
    from megalong.checkpoint.manifest import Manifest, check_files, check_share
    from megalong.checkpoint.reading import CheckpointReader

    checkpoint = find_checkpoint(arguments.checkpoint)
    manifest = Manifest.read(checkpoint)
    with being_read(checkpoint):
        if arguments.verify:
            check_files(checkpoint)
            check_share(checkpoint, manifest)
        content = describe(CheckpointReader(checkpoint), manifest)
    content["verified"] = arguments.verify
    if arguments.brief:
        del content["tensors"], content["configuration"]
    print(json.dumps(content, indent=2) if arguments.json else "\n".join(in_words(content)))


def describe(reader: CheckpointReader, manifest: Manifest) -> dict[str, Any]:
    """All there is to know, without the tensors' values."""
    import yaml

    from megalong.checkpoint.content import WEIGHTS, parameter_of, read_config_text, read_settings

    progress, settings = reader.progress(), read_settings(reader.checkpoint)
    tensors = {
        name: {
            "dtype": str(entry.properties.dtype).removeprefix("torch."),
            "shape": list(entry.size),
        }
        for name, entry in sorted(reader.tensors.items())
    }
    sizes = {name: math.prod(tensor["shape"]) for name, tensor in tensors.items()}
    return {
        "checkpoint": str(reader.checkpoint),
        "bytes": manifest.size,
        "files": len(manifest.files),
        "iteration": progress.iteration,
        "consumed_samples": progress.consumed_samples,
        "consumed_tokens": progress.consumed_tokens,
        "updates": progress.updates,
        "blend": progress.blend,
        "stages": [{key: stage[key] for key in ("name", "begin")} for stage in progress.stages],
        "layout": layout(settings, manifest.ranks),
        # Training does not count those of ids that its tokenizer has not; it is not asked for here.
        "parameters": sum(size for name, size in sizes.items() if parameter_of(name, WEIGHTS)),
        "values": sum(sizes.values()),
        "tensors": tensors,
        "configuration": yaml.safe_load(read_config_text(reader.checkpoint)),
    }


def in_words(content: dict[str, Any]) -> Iterator[str]:
    """The lines of what `describe` has found."""
    import yaml

    from megalong.data.blend import History
    from megalong.utils.progress import human_bytes

    files = counted(content["files"], "file")
    yield f"{content['checkpoint']}: {human_bytes(content['bytes'])} in {files}"
    if content["verified"]:
        yield f"sound: {files} compared, with no difference from what was written"
    yield (
        f"iteration {content['iteration']:,} | {content['consumed_samples']:,} sequences"
        f" | {content['consumed_tokens']:,} tokens | {content['updates']:,} updates"
    )
    if content["stages"]:
        begun = (
            f"{each['name']} from iteration {each['begin'] + 1:,}" for each in content["stages"]
        )
        yield f"stages: {', '.join(begun)}"
    if content["blend"] is not None:
        yield from History.from_values(content["blend"]).in_words()
    yield f"saved by {content['layout']}"
    yield (
        f"{content['parameters']:,} parameters, with those that fill up the vocabulary; with the"
        f" optimizer's state {content['values']:,} values"
    )
    if "tensors" not in content:
        return
    yield f"{len(content['tensors'])} tensors:"
    width = max(map(len, content["tensors"]))
    for name, tensor in content["tensors"].items():
        shape = " x ".join(map(str, tensor["shape"])) or "scalar"
        yield f"  {name:{width}}  {tensor['dtype']:8}  {shape}"
    yield "configuration:"
    text = yaml.safe_dump(content["configuration"], sort_keys=False, default_flow_style=None)
    yield from (f"  {line}" for line in text.splitlines())


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
