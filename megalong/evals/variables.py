"""Variable tracking: which variables have a value, directly or by way of others."""

from __future__ import annotations

from random import Random

from megalong.evals.language import Language, Mark, Phrase
from megalong.evals.sample import Draft, largest_that_fits

ASSIGN = Phrase("VAR{} ={}.\n", mark=Mark.ASSIGNMENT)
COPY = Phrase("VAR{} = VAR{}.\n", mark=Mark.ASSIGNMENT_OF_VARIABLE)
QUESTION = Phrase(
    "In their order, the variables that have the value{} are", mark=Mark.VARIABLES_QUESTION
)

CHAINS, HOPS = 2, 4


def variable_tracking(language: Language, length: int, depth: float, draw: Random) -> Draft:
    """RULER's multi-hop tracing (arXiv 2404.06654, section 3): chains of assignments, X = 12345,
    Y = X, ..., each with a value of its own. All variables of one chain, which begins at `depth`,
    are asked for in the order of their assignments. A chain has fewer hops where the sample has no
    room for all."""
    return largest_that_fits(length, HOPS, 1, lambda hops: _chains(language, hops, depth, draw))


def _chains(language: Language, hops: int, depth: float, draw: Random) -> Draft:
    draft = Draft(language)
    names = language.keys(CHAINS * (hops + 1), draw)
    values = language.values(CHAINS, draw)
    for chain, value in enumerate(values):
        variables = names[chain * (hops + 1) :][: hops + 1]
        begin = draw.random() if chain else depth
        depths = [begin, *sorted(draw.uniform(begin, 1) for _ in range(hops))]
        facts = [draft.tell(begin, ASSIGN, variables[0], value)]
        for where, name, other in zip(depths[1:], variables[1:], variables, strict=False):
            facts.append(draft.tell(where, COPY, name, other))
        if not chain:
            asked = facts
    draft.ask(QUESTION, values[0])
    draft.answer_all((fact, slice(0, 1)) for fact in asked)
    return draft
