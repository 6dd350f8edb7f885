"""One noisy image, one decision: the class that the base classifier gives it, whatever batch it is in.

The batch size changes the order of summation inside a network, and with it the last digits of the logits. A decision
that this could turn is taken again where the batch has no say: on the image alone; or, where many are close (half
precision, a GPU), in a *panel*, a batch of a fixed size in which neither the place nor the neighbours move a bit.
"""

import warnings
from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from rs_plugins.core.models import check_logits, check_unchanged, evaluating, whole_batches
from rs_plugins.core.noise import Noise
from rs_plugins.core.perturbing import perturb_
from rs_plugins.errors import ModelError, ModelWarning

PROBES = 16  # noisy copies on which rounding is measured
MARGIN = 16  # decisions closer than this many times the rounding that was measured are taken again
SHADES = (0.0, 1 / 4, 1 / 2, 3 / 4, 1.0)  # of the grey images among the probes; the others are random pixels
SHIFT = 5  # how far the probes are moved in a panel to see whether the place matters


def probes(shape: torch.Size, noise: Noise, source: torch.Generator, dtype: torch.dtype) -> Tensor:
    """Return noisy copies (PROBES, *shape) of synthetic images, to measure rounding on without looking at any data.

    What is measured on them is the same for every part of a data set, so that its parts count alike.
    """
    images = torch.empty(PROBES, *shape, dtype=dtype, device=source.device).uniform_(generator=source)
    for place, shade in enumerate(SHADES):
        images[2 * place + 1] = shade
    copies = torch.empty_like(images)
    perturb_(noise, copies, images, source)
    return copies


class Decider:
    """Decides for each image of a batch; to be called inside `evaluating`.

    Args:
        model: The base classifier, (n, *input) to logits (n, classes).
        classes: The number of columns of the logits.
        rounding: How far the batch is known to move a logit.
        panel: In batches of this size close decisions are taken again.
        quick: A faster way to compute the same logits up to rounding; None for the model itself.
        careful: How panels of more than one are computed; None for the model itself.
    """

    def __init__(
        self,
        model: nn.Module,
        classes: int,
        rounding: float,
        *,
        panel: int = 1,
        quick: Callable[[Tensor], Tensor] | None = None,
        careful: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.rounding, self.panel = rounding, panel
        self._model, self._classes = model, classes
        self._quick, self._careful = quick or model, careful or model
        self._surprises: Tensor | int = 0

    @classmethod
    def measured(
        cls,
        model: nn.Module,
        copies: Tensor,
        classes: int,
        *,
        panel: int = 1,
        quick: Callable[[Tensor], Tensor] | None = None,
        careful: Callable[[Tensor], Tensor] | None = None,
    ) -> "Decider":
        """Return the decider of ``model``, its rounding measured on noisy ``copies`` (n, *input).

        The measurement is no proof: it compares batches of n, of 5, of 1 and the panel. A ``panel`` in which the place
        or the neighbours of a copy change its logits is given up: close decisions are then taken on the image alone.

        Raises:
            ModelError: If logits depend on the batch by more than rounding, or are NaN for all copies.
        """
        decider = cls(model, classes, 0.0, panel=panel, quick=quick, careful=careful)
        with evaluating(model), torch.no_grad(), torch.autocast(copies.device.type, enabled=False):
            together = decider._logits(copies.clone(), decider._quick)
            few = decider._logits(copies[:5].clone(), decider._quick)
            settled = decider._settled(copies)
            single = settled if decider._looks_alone else decider._one_by_one(copies)
        if bool(settled.isnan().any(dim=1).all()):
            raise ModelError("model: it returns NaN logits on every noisy copy; nothing it says can be certified")
        moved = torch.cat([together - settled, few - settled[:5], single - settled]).nan_to_num(0.0, 0.0, 0.0).abs()
        decider.rounding = float(moved.max())
        scale = float(settled.nan_to_num(0.0, 0.0, 0.0).abs().max())
        if decider.rounding > max(2**-7, 16 * torch.finfo(settled.dtype).eps) * scale:
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
        winners, close = self.look(batch)
        if close is not None and bool(close.any()):
            winners[close] = self.again(batch[close])
        return winners

    def look(self, batch: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the classes as above, (n,), and which of them `again` has to decide: (n,) booleans, or None for none.

        Nothing here waits for a GPU.
        """
        winners, close = self._winners(self._logits(batch, self._quick))
        return winners, None if self._looks_alone and len(batch) == 1 else close

    def again(self, copies: Tensor, before: Tensor | None = None) -> Tensor:
        """Return the classes (n,) of close ``copies`` (n, *input), from batches that are the same for every caller.

        ``before`` (n,) is what `look` said of them, so that surprises can be counted. Nothing here waits for a GPU.
        """
        winners, close = self._winners(self._in_passes(copies, self.panel), share=0.5)
        if before is not None:
            changed = winners != before
            self._surprises = self._surprises + (changed if close is None else changed & ~close).sum()
        return winners

    def surprises(self) -> int:
        """Return how many close decisions were turned by far, and forget them.

        By so far that a logit must have moved by a quarter of the margin: others, which `look` did not find close, may
        have been turned as well.
        """
        count, self._surprises = int(self._surprises), 0
        return count

    @property
    def _looks_alone(self) -> bool:
        """Whether the first look at a single image is already what counts in case of doubt."""
        return self.panel == 1 and self._quick is self._model

    def _one_by_one(self, copies: Tensor) -> Tensor:
        return torch.cat([self._logits(copy.clone(), self._quick) for copy in copies.split(1)])

    def _in_passes(self, copies: Tensor, size: int) -> Tensor:
        """Return the logits of ``copies`` from batches of exactly ``size``; what is missing is filled with zeros."""
        compute = self._model if size == 1 else self._careful
        parts = []
        with whole_batches(self._model) if size > 1 else nullcontext():  # a panel's neighbours are to have no say
            for part in copies.split(size):
                batch = part.new_zeros(size, *part.shape[1:])
                batch[: len(part)] = part
                parts.append(self._logits(batch, compute)[: len(part)])
        return torch.cat(parts)

    def _settled(self, copies: Tensor) -> Tensor:
        """Return the logits of ``copies`` that count in case of doubt; give up a panel that does not hold."""
        if self.panel > 1 and not self._panel_holds(copies):
            self.panel = 1
        return self._in_passes(copies, self.panel)

    def _panel_holds(self, copies: Tensor) -> bool:
        """Return whether the same copy has the same logits, to the bit, in other places and with other neighbours."""
        rows = torch.arange(self.panel, device=copies.device) % len(copies)
        full = self._in_passes(copies[rows], self.panel)
        moved = self._in_passes(copies[rows].roll(SHIFT, 0), self.panel).roll(-SHIFT, 0)
        sparse = self._in_passes(copies[:1], self.panel)
        same = [(moved, full), (full[rows], full), (sparse, full[:1])]
        return all(torch.equal(one.nan_to_num(), other.nan_to_num()) for one, other in same)

    def _logits(self, batch: Tensor, compute: Callable[[Tensor], Tensor]) -> Tensor:
        with check_unchanged(batch):
            return check_logits(compute(batch), len(batch), self._classes)

    def _winners(self, logits: Tensor, share: float = 1.0) -> tuple[Tensor, Tensor | None]:
        """Return the class of each row of ``logits``, and where it leads by less than that ``share`` of the margin.

        None stands for nowhere, where that can be told at a glance: on a CPU each small operation counts.
        """
        relative, margin = share * min(2**10 * torch.finfo(logits.dtype).eps, 2**-7), share * MARGIN * self.rounding
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        best, second = logits.topk(2, dim=1).values.unbind(1)  # NaN counts as largest
        lead, winners = best - second, logits.argmax(dim=1)
        if logits.is_cpu:
            low, high = logits.aminmax()
            if float(lead.min()) > max(relative * max(float(high), -float(low)), margin):
                return winners, None  # with NaN or infinity about, this comparison is false
        invalid = best.isnan()
        scale = torch.maximum(best.abs(), logits.amin(dim=1).abs())
        scale = torch.where(scale.isinf(), best.abs(), scale)  # -inf is how some models say "never"
        close = ~(lead > torch.clamp(relative * scale, min=margin)) & ~invalid
        return winners.masked_fill(invalid, self._classes), close


def warn_invalid(index: int, invalid: int) -> None:
    """Warn that some noisy copies of an image gave NaN logits."""
    if invalid:
        warnings.warn(
            f"image {index}: {invalid} noisy copies gave NaN logits; they count as votes for no class",
            ModelWarning,
            stacklevel=3,
        )
