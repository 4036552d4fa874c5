"""PREFIX.loss, beside a .bin/.idx pair: which of its tokens count in the loss.

One byte a token, in the order of the .bin: 1 where the token is to be predicted, 0 where it is only
context, as a prompt is to the answer. Without such a file all tokens count. PREFIX.json says how
many do (`description`), and a pair of it is not complete without the file.
"""

from __future__ import annotations

import glob
import hashlib
import os
from collections.abc import Callable
from typing import Any

from megalong.utils.errors import UserError

SUFFIX = ".loss"
KEY = "loss_mask"  # in PREFIX.json
_CHUNK = 1 << 24  # bytes at a time


def has_loss_mask(prefix: str, tokens: int, described: dict[str, Any]) -> bool:
    """Whether there is a mask of a pair of so many tokens. described: the content of its .json.

    Raises UserError where the .json says that there is one, or that no token counts, and where it
    is of another length.
    """
    path = prefix + SUFFIX
    if not os.path.isfile(path):
        if described.get(KEY):
            raise UserError(
                f"{path}: no such file, and {prefix}.json says that it tells which tokens count in"
                " the loss: an interrupted copy?"
            )
        return False
    size = os.path.getsize(path)
    if size != tokens:
        what = "cut short" if size < tokens else "too long"
        raise UserError(
            f"{path}: {size:,} bytes, but one for each of the {tokens:,} tokens of {prefix}.bin is"
            f" expected: {what}, or the two files are not of one run"
        )
    if tokens and described.get(KEY) and not described[KEY].get("tokens"):
        raise UserError(f"{path}: none of the tokens counts in the loss: nothing can be learned")
    return True


def may_mask_loss(path: str) -> bool:
    """Whether there is a mask of a prefix, or of some pair of a folder or a pattern, as far as the
    names of files tell."""
    if os.path.isdir(path):
        pattern = os.path.join(glob.escape(path), "*")
    elif os.path.isfile(path + ".idx"):
        pattern = glob.escape(path)
    else:
        stem, suffix = os.path.splitext(path)
        pattern = stem if suffix in (".bin", ".idx") else path
    return bool(glob.glob(pattern + SUFFIX))


def description(
    path: str | os.PathLike, on_bytes: Callable[[int], object] = lambda count: None
) -> dict[str, Any]:
    """What PREFIX.json says of a mask: tokens that count, bytes and sha256 of the file.

    on_bytes: hears how many more were read. Raises UserError for a byte that is neither 0 nor 1.
    """
    import numpy as np  # not above: flags are read without it

    digest, tokens, size = hashlib.sha256(), 0, 0
    with open(path, "rb") as file:
        while len(chunk := np.fromfile(file, np.uint8, _CHUNK)):
            if chunk.max() > 1:
                place = int(np.flatnonzero(chunk > 1)[0])
                raise UserError(
                    f"{path}: byte {size + place:,} is {chunk[place]}, and 1 (the token counts in"
                    " the loss) or 0 (it does not) is expected"
                )
            digest.update(chunk)
            tokens += int(np.count_nonzero(chunk))
            size += len(chunk)
            on_bytes(len(chunk))
    return {"tokens": tokens, "bytes": size, "sha256": digest.hexdigest()}
