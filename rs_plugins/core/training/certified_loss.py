"""The loss of certified training: cross-entropy on the worst that bounds leave possible, and on clean images."""

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from rs_plugins.core.relaxations.network import LowerSlope, Method, RelaxedNetwork
from rs_plugins.core.relaxations.normalising import batch_statistics
from rs_plugins.core.relaxations.regions import Region
from rs_plugins.core.training.eps_schedule import clean_weight
from rs_plugins.core.training.losses import check_range
from rs_plugins.core.training.warmup_regulariser import input_radius, warmup_regulariser
from rs_plugins.core.training.weight_noise import Weighted


class CertifiedLoss(nn.Module):
    """kappa·CE(f(x), y) + (1 - kappa)·L_cert + l1·Σ|W| + regulariser·(1 - share)·R, a function of the weights.

    share is the part of the radius that has been reached, kappa = 1 - w_rob·share. L_cert is `certified_cross_entropy`
    of margins over all images within the radius in l-infinity, Σ|W| `absolute_weights`, R `warmup_regulariser`, which
    is left out as long as the radius is 0. Batch normalisation in train mode takes the statistics of the clean batch,
    also for the bounds.

    Args:
        network: The network.
        bound: ``"ibp"``, ``"crown-ibp"`` or ``"crown"``.
        w_rob: Weight of the certified loss at the whole radius, in [0, 1].
        l1: Weight of the absolute weights.
        regulariser: Weight of the regulariser at the beginning of the ramp.
        lower_slope: Of ReLU, as `RelaxedNetwork.margins` has it.
    """

    def __init__(
        self,
        network: RelaxedNetwork,
        *,
        bound: Method = "crown-ibp",
        w_rob: float = 1.0,
        l1: float = 0.0,
        regulariser: float = 0.5,
        lower_slope: LowerSlope = "adaptive",
    ) -> None:
        super().__init__()
        self.network = network
        self.bound, self.lower_slope = bound, lower_slope
        self.w_rob, self.l1, self.regulariser = w_rob, l1, regulariser

    def forward(self, x: Tensor, y: Tensor, eps: float, share: float = 1.0) -> Tensor:
        """Return the loss, a scalar.

        Args:
            x: Images (n, *input), pixels in [0, 1].
            y: Labels (n,).
            eps: The radius now, in pixels.
            share: Which part of the last one it is, in [0, 1].

        Raises:
            InputError: If a label is none of the network's.
            ModelError: If the network cannot be bounded.
        """
        kappa, region, model = clean_weight(share, self.w_rob), Region(x, eps), self.network.model
        y, total, statistics = check_range(y, self.network.classes), x.new_zeros(()), None
        if kappa or self._depends_on_the_batch:
            with batch_statistics(model) as statistics:
                logits = self.network.logits(x)
            total = kappa * cross_entropy(logits, y)
        strength, intervals = self.regulariser * (1 - share) if eps else 0.0, None
        if strength:
            intervals = self.network.intervals(region, statistics)
            total = total + strength * warmup_regulariser(intervals.values(), input_radius(model, region))
        if kappa < 1:
            margins = self.network.margins(
                *(region, y),
                method=self.bound,
                lower_slope=self.lower_slope,
                statistics=statistics,
                intervals=intervals,
            )
            total = total + (1 - kappa) * certified_cross_entropy(margins)
        return total + self.l1 * absolute_weights(model) if self.l1 else total

    @torch.no_grad()
    def observe(self, x: Tensor) -> None:
        """Let batch normalisation in train mode see the clean images ``x``, so that its running statistics go on."""
        if self._depends_on_the_batch:
            self.network.logits(x)

    @property
    def _depends_on_the_batch(self) -> bool:
        """Whether there is batch normalisation that takes the statistics of the batch."""
        kind = nn.modules.batchnorm._BatchNorm
        found = (part for part in self.network.modules() if isinstance(part, kind))
        return any(part.training or part.running_mean is None for part in found)


def certified_cross_entropy(margins: Tensor) -> Tensor:
    """Return the mean of CE(v, y) with v_y = 0 and v_k = -m_k, at least the cross-entropy of any image in the region.

    Args:
        margins: Lower bounds m_k on logit_y - logit_k over the region for all k but y, (n, classes - 1).
    """
    v = torch.cat([torch.zeros_like(margins[:, :1]), -margins], dim=1)
    return (v.logsumexp(dim=1)).mean()


def absolute_weights(model: nn.Module) -> Tensor:
    """Return Σ|W| over linear and convolutional layers, without biases and batch normalisation.

    A weight that is computed of others (``torch.nn.utils.parametrize``) counts as it is used, one that layers share
    counts once.
    """
    weights = {id(weight): weight for weight in [part.weight for part in model.modules() if isinstance(part, Weighted)]}
    return torch.stack([weight.abs().sum() for weight in weights.values()]).sum() if weights else torch.zeros(())
