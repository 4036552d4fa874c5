"""Dilated attention: tensors in, tensors out. Imports nothing else of megalong."""

from megalong.attention.dense import dense_attention
from megalong.attention.dilated_attention import dilated_attention
from megalong.attention.pattern import DilatedPattern
from megalong.attention.reference import dilated_attention_reference

__all__ = ["DilatedPattern", "dense_attention", "dilated_attention", "dilated_attention_reference"]
