"""Tasks that a run is evaluated on beside held-out text."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from megalong.config.flags import default, flag, flag_name, require_positive
from megalong.evals import STYLES, TASKS
from megalong.utils.errors import UserError, counted


@dataclass(frozen=True)
class TasksConfig:
    """Tasks that a run is evaluated on beside held-out text."""

    eval_tasks: tuple[str, ...] | None = flag(
        None,
        "tasks, made on the fly, that ask for what was said long before",
        item=str,
        choices=tuple(TASKS),
    )
    eval_task_style: str | None = flag(
        None,
        "what they are made of: text of the tokenizer (the default), or bare token ids, for a model"
        " that is trained on such",
        choices=STYLES,
    )
    eval_task_lengths: tuple[int, ...] | None = flag(
        None, "tokens of their samples (default: --seq-length)", item=int
    )
    eval_task_samples: int | None = flag(None, "samples of each task and length (default: 32)")
    eval_task_interval: int | None = flag(
        None, "iterations between their evaluations (default: --eval-interval)"
    )

    def description(self, seq_length: int) -> str:
        """What is evaluated on, and how much there is to read, in words (after `resolve`)."""
        assert self.eval_tasks is not None and self.eval_task_lengths is not None
        lengths = ", ".join(f"{length:,}" for length in self.eval_task_lengths)
        made_of = "text" if self.eval_task_style == "text" else "bare ids"
        sequences = len(self.eval_tasks) * len(self.eval_task_lengths) * self.eval_task_samples
        return (
            f"tasks: {', '.join(self.eval_tasks)}, of {made_of}, {lengths} tokens,"
            f" {counted(self.eval_task_samples, 'sample')} of each, every"
            f" {counted(self.eval_task_interval, 'iteration')}: an evaluation reads"
            f" {counted(sequences, 'sequence')} of {seq_length:,},"
            f" {counted(sequences * seq_length, 'token')}"
        )

    def resolve(self, seq_length: int, eval_interval: int) -> TasksConfig:
        """These settings, where there are tasks with all that is not given filled in; none is the
        same as an empty list of them."""
        if not self.eval_tasks:
            return dataclasses.replace(self, eval_tasks=None)
        return dataclasses.replace(
            self,
            eval_tasks=tuple(dict.fromkeys(self.eval_tasks)),
            eval_task_style=default(self.eval_task_style, "text"),
            eval_task_lengths=tuple(dict.fromkeys(default(self.eval_task_lengths, (seq_length,)))),
            eval_task_samples=default(self.eval_task_samples, 32),
            eval_task_interval=default(self.eval_task_interval, eval_interval),
        )

    def check(self, seq_length: int, causal: bool) -> None:
        """Raise UserError where these settings are not for such a run (after `resolve`)."""
        if self.eval_tasks is None:
            for field in dataclasses.fields(self):
                name = field.name
                if getattr(self, name) is not None:
                    raise UserError(
                        f"{flag_name(name)} is about tasks: set --eval-tasks, or leave it out"
                    )
            return
        if not causal:
            raise UserError(
                "--eval-tasks are about predicting the next token: with --objective mlm leave them"
                " out"
            )
        require_positive(self, "eval_task_samples", "eval_task_interval")
        assert self.eval_task_lengths is not None
        for length in self.eval_task_lengths:
            if length > seq_length:
                raise UserError(
                    f"--eval-task-lengths {length} is longer than --seq-length {seq_length}: leave"
                    " it out; tools/evaluate.py tries a checkpoint at other lengths"
                )
