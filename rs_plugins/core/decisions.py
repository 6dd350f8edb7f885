"""One noisy image, one decision: the class that the base classifier gives it, whatever batch it is in.

The batch size changes the order of summation inside a network, and with it the last digits of the logits. A decision
that this could turn is taken again on the image alone, where no neighbour has a say.
"""

import torch
from torch import Tensor, nn

from rs_plugins.core.models import check_logits, check_unchanged, evaluating
from rs_plugins.errors import ModelError

PROBES = 16  # noisy copies on which rounding is measured
MARGIN = 16  # decisions closer than this many times the rounding that was measured are taken again


class Decider:
    """Decides for each image of a batch; to be called inside `evaluating`.

    Args:
        model: The base classifier, (n, *input) to logits (n, classes).
        classes: The number of columns of the logits.
        rounding: How far the batch is known to move a logit.
    """

    def __init__(self, model: nn.Module, classes: int, rounding: float) -> None:
        self.rounding = rounding
        self._model, self._classes = model, classes

    @classmethod
    def measured(cls, model: nn.Module, copies: Tensor, classes: int) -> "Decider":
        """Return the decider of ``model``, its rounding measured on noisy ``copies`` (n, *input).

        The measurement is no proof: it compares batches of n, of 5 and of 1.

        Raises:
            ModelError: If logits depend on the batch by more than rounding, or are NaN for all copies.
        """
        decider = cls(model, classes, 0.0)
        with evaluating(model), torch.no_grad(), torch.autocast(copies.device.type, enabled=False):
            together, few = decider._logits(copies.clone()), decider._logits(copies[:5].clone())
            alone = torch.cat([decider._logits(copy) for copy in copies.clone().split(1)])
        if bool(alone.isnan().any(dim=1).all()):
            raise ModelError("model: it returns NaN logits on every noisy copy; nothing it says can be certified")
        moved = torch.cat([together - alone, few - alone[:5]]).nan_to_num(0.0, 0.0, 0.0).abs()
        decider.rounding = float(moved.max())
        scale = float(alone.nan_to_num(0.0, 0.0, 0.0).abs().max())
        if decider.rounding > max(2**-7, 16 * torch.finfo(alone.dtype).eps) * scale:
            raise ModelError(
                f"model: the logits of an image change by {decider.rounding:.3g} with the batch it is in, or from call "
                "to call; batch statistics or dropout that stay on in eval mode?"
            )
        return decider

    def __call__(self, batch: Tensor) -> Tensor:
        """Return the class of each image of ``batch`` (n, *input) as (n,); ``classes`` itself where a logit is NaN.

        Of equal logits the first wins.

        Raises:
            ModelError: If the model does not return logits (n, classes), or changes its input.
        """
        winners, close = self._winners(self._logits(batch))
        if len(batch) > 1:
            for row in close.nonzero().flatten().tolist():
                winners[row] = self._winners(self._logits(batch[row : row + 1].clone()))[0][0]
        return winners

    def _logits(self, batch: Tensor) -> Tensor:
        with check_unchanged(batch):
            return check_logits(self._model(batch), len(batch), self._classes)

    def _winners(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Return the class of each row of ``logits``, and where it leads by less than rounding could change."""
        relative = min(2**10 * torch.finfo(logits.dtype).eps, 2**-7)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        best, second = logits.topk(2, dim=1).values.unbind(1)  # NaN counts as largest
        invalid = best.isnan()
        scale = torch.maximum(best.abs(), logits.amin(dim=1).abs())
        scale = torch.where(scale.isinf(), best.abs(), scale)  # -inf is how some models say "never"
        close = ~(best - second > torch.clamp(relative * scale, min=MARGIN * self.rounding)) & ~invalid
        return logits.argmax(dim=1).masked_fill(invalid, self._classes), close
