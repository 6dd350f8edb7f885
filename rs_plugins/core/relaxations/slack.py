"""By how much a margin must be above 0 before rounding is left out of account."""

from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor

SLACK: Mapping[torch.dtype, float] = MappingProxyType({torch.float32: 1e-5, torch.float64: 1e-10})
ROUNDINGS = 16  # how many roundings of all terms together


def slack(margins: Tensor, terms: Tensor | None = None) -> Tensor:
    """Return the slack of each margin, of the same shape: a margin m is proved positive where m > slack.

    A stated allowance for the rounding of sums, 1e-5·(1 + |m|) in single and 1e-10·(1 + |m|) in double precision; and
    of ``terms``, how large all that is summed up to the margin is (`RelaxedNetwork.terms`), `ROUNDINGS` roundings. It
    is no proof about rounding. In other types nothing is proved: the slack is infinite.

    Args:
        margins: Lower bounds of differences of logits, of any shape.
        terms: Of the same shape. Without, the slack is meant for networks whose values are about 1.
    """
    least = SLACK.get(margins.dtype, float("inf")) * (1 + margins.detach().abs())
    return least if terms is None else least + ROUNDINGS * torch.finfo(margins.dtype).eps * terms.detach()
