"""Rotary frequencies, by the name that they have in an exported folder, where a copy of their file
stands in the place of this one (`megalong.hf.exporting`)."""

from megalong.model.rope_scaling import rope_frequencies

__all__ = ["rope_frequencies"]
