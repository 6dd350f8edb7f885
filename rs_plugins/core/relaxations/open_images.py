"""A batch on its way through the certifier: which images are open, and what was found about each."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from rs_plugins.core.relaxations.bound_results import Status


@dataclass
class Found:
    """What is known about an image so far; a ``status`` of None says that it is open."""

    status: Status | None = None
    method: str = ""
    margin: float = float("nan")
    slack: float | None = None
    prediction: int = -1
    seconds: float = 0.0
    message: str = ""
    adversarial: Tensor | None = None

    def end(self, status: Status, method: str, margin: float | None = None, *, message: str = "") -> None:
        """Take down that the work on this image is over."""
        self.status, self.method, self.message = status, method, message
        self.margin = self.margin if margin is None else margin


@dataclass
class Batch:
    """Images (n, *input) and classes (n,), the best margins so far, their terms (see `slack`), and what was found."""

    x: Tensor
    y: Tensor
    classes: int
    best: Tensor = field(init=False)
    terms: Tensor = field(init=False)
    found: list[Found] = field(init=False)

    def __post_init__(self) -> None:
        self.best = self.x.new_full((len(self.x), self.classes - 1), torch.nan)
        self.terms = self.best.clone()
        self.found = [Found() for _ in range(len(self.x))]

    def open(self) -> list[int]:
        """Return the rows that nothing is known about."""
        return [row for row, found in enumerate(self.found) if found.status is None]

    def book(self, rows: list[int], seconds: float) -> None:
        """Share out a time."""
        for row in rows:
            self.found[row].seconds += seconds / len(rows)
