"""Tokenizers: what all have in common, a file for each kind, a faster library, and training."""
