"""Texts that a run continues while it trains, to be read."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from megalong.config.flags import default, flag, flag_name, require_positive
from megalong.utils.errors import UserError


@dataclass(frozen=True)
class SamplesConfig:
    """Texts that a run continues while it trains, to be read."""

    sample_prompts: tuple[str, ...] | None = flag(
        None,
        "texts to continue now and then, or .txt files with one in each line; every new token takes"
        " a forward pass over a whole sequence",
        item=str,
    )
    sample_interval: int | None = flag(
        None, "iterations between such samples (default: --eval-interval)"
    )
    sample_tokens: int | None = flag(None, "tokens of a continuation (default: 32)")
    sample_temperature: float | None = flag(
        None, "of the draws of their tokens; 0, the default, takes the likeliest always"
    )

    def resolve(self, eval_interval: int) -> SamplesConfig:
        """These settings, where there are prompts with all that is not given filled in; none is the
        same as an empty list of them."""
        if not self.sample_prompts:
            return dataclasses.replace(self, sample_prompts=None)
        return dataclasses.replace(
            self,
            sample_interval=default(self.sample_interval, eval_interval),
            sample_tokens=default(self.sample_tokens, 32),
            sample_temperature=default(self.sample_temperature, 0.0),
        )

    def check(self, causal: bool) -> None:
        """Raise UserError where these settings are not for such a run (after `resolve`)."""
        if self.sample_prompts is None:
            for field in dataclasses.fields(self):
                if getattr(self, field.name) is not None:
                    raise UserError(
                        f"{flag_name(field.name)} is about samples: set --sample-prompts, or leave"
                        " it out"
                    )
            return
        if not causal:
            raise UserError(
                "--sample-prompts are continued token by token, which a masked-language model does"
                " not: with --objective mlm leave them out"
            )
        require_positive(self, "sample_interval", "sample_tokens")
        assert self.sample_temperature is not None
        if not 0 <= self.sample_temperature < float("inf"):
            raise UserError("--sample-temperature must be a number and not negative")
