"""What watches a run from outside: when it may end, how fast it goes on, and what is said of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

Seen = Mapping[str, float]  # what a check saw; "step" and "loss" are always among it


class Watch:
    """Looks at a model at each check of a run; this one sees nothing and changes nothing."""

    def look(self) -> Seen:
        """Return what the run's history is to hold of the model as it is."""
        return {}

    def enough(self, seen: Seen) -> str:
        """Return why the run should end after this check, "" where it should go on."""
        return ""

    def pace(self, history: Sequence[Seen]) -> float:
        """Return what the learning rate is multiplied with after these checks: above 0, at most 1."""
        return 1.0

    def note(self, loss: float, history: Sequence[Seen]) -> str:
        """Say how far the run is, after a step with this loss and these checks."""
        return f"loss {loss:.3f}"
