"""Tasks that ask for what was said long before, made on the fly: recall of one thing or of many,
copying, following variables, counting. No data, nothing drawn from outside.

A task is a function that drafts a sample (`sample.py`), said in a language (`language.py`): the
text of a tokenizer, or bare token ids. To add one: a function in `tasks.py`, and its name here.
The configuration imports this file, which imports no torch.
"""

from types import MappingProxyType

from megalong.evals import tasks
from megalong.evals.language import STYLES
from megalong.evals.sample import Task

__all__ = ["STYLES", "TASKS"]

_NAMES = (
    "passkey", "mqar", "copy", "variable_tracking", "niah_single", "niah_multikey",
    "niah_multivalue", "niah_multiquery", "common_words", "frequent_words",
)  # fmt: skip
TASKS: MappingProxyType[str, Task] = MappingProxyType(
    {name: getattr(tasks, name) for name in _NAMES}
)
