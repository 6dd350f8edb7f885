"""By how much a margin must be above 0 before rounding is left out of account."""

from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor

SLACK: Mapping[torch.dtype, float] = MappingProxyType({torch.float32: 1e-5, torch.float64: 1e-10})


def slack(margins: Tensor) -> Tensor:
    """Return the slack of each margin, of the same shape: a margin m is proved positive where m > slack.

    A stated allowance for the rounding of sums, 1e-5·(1 + |m|) in single and 1e-10·(1 + |m|) in double precision. It is
    no proof about rounding. In other types nothing is proved: the slack is infinite.
    """
    return SLACK.get(margins.dtype, float("inf")) * (1 + margins.detach().abs())
