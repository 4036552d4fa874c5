"""Tasks that ask for what was said long before, made on the fly: recall of one thing or of many,
copying, following variables, counting. No data, nothing drawn from outside.

A task is a function that drafts a sample (`sample.py`), said in a language (`language.py`): the
text of a tokenizer, or bare token ids. To add one: a function, and a row here. `trials.py` makes
the samples of an evaluation, `scores.py` its numbers. The configuration imports this file, which
imports no torch.
"""

from types import MappingProxyType

from megalong.evals.counting import common_words, frequent_words
from megalong.evals.language import STYLES
from megalong.evals.needles import (
    niah_multikey,
    niah_multiquery,
    niah_multivalue,
    niah_single,
    passkey,
)
from megalong.evals.recall import copy, mqar
from megalong.evals.sample import Task
from megalong.evals.variables import variable_tracking

__all__ = ["STYLES", "TASKS"]

_ALL = (
    passkey, mqar, copy, variable_tracking, niah_single, niah_multikey, niah_multivalue,
    niah_multiquery, common_words, frequent_words,
)  # fmt: skip
TASKS: MappingProxyType[str, Task] = MappingProxyType({task.__name__: task for task in _ALL})
