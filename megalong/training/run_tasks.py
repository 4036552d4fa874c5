"""The samples of the tasks that a run is evaluated on."""

from __future__ import annotations

from megalong.config import Config
from megalong.data.tokenizers.tokenizer import Tokenizer
from megalong.evals.trials import Trials, language_of
from megalong.utils.errors import UserError


def trials_of(config: Config, tokenizer: Tokenizer) -> list[Trials]:
    """What `--eval-tasks` asks for: each task at each length.

    Raises UserError where a length is too short for a task, or the vocabulary too small.
    """
    tasks = config.tasks
    if not tasks.eval_tasks:
        return []
    first = tokenizer.bos if config.data.prepend_bos else tokenizer.eod
    assert first is not None
    style = tasks.eval_task_style
    try:
        language = language_of(style, tokenizer.encode, tokenizer.text_ids, first)
    except UserError as error:
        raise UserError(f"--eval-task-style {style}: {error}") from None
    found = []
    for task in tasks.eval_tasks:
        for length in tasks.eval_task_lengths:
            trials = Trials(task, language, length, tasks.eval_task_samples)
            trials.check("--eval-tasks", "--eval-task-lengths")
            found.append(trials)
    return found
