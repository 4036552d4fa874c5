"""The pattern, by the name that it has in an exported folder, where a copy of its file stands in
the place of this one (`megalong.hf.exporting`)."""

from megalong.attention.pattern import DilatedPattern, column_starts

__all__ = ["DilatedPattern", "column_starts"]
