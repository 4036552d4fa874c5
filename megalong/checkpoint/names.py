"""How the tensors of a checkpoint are called: the kind, and the parameter's canonical name; or that
they are random states, and whose."""

from __future__ import annotations

WEIGHTS = "weights"  # other kinds: the optimizer's moments (`megalong.model.optimizers`)


def tensor_name(kind: str, parameter: str) -> str:
    """The name of one of the tensors of a parameter."""
    return f"{kind}.{parameter}"


def parameter_of(name: str, kind: str) -> str | None:
    """The parameter whose tensor of this kind `name` is; None where it is another's."""
    return name.removeprefix(f"{kind}.") if name.startswith(f"{kind}.") else None


def random_state_name(rank: int, generator: str) -> str:
    """The name of the state of one of a rank's random generators."""
    return f"random.{rank}.{generator}"
