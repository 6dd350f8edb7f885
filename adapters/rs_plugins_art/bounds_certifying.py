"""Certificates, margins and intervals of a classifier by bounds on its logits."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rs_plugins.core.checks import check_count, check_images, check_nonnegative
from rs_plugins.core.models import evaluating
from rs_plugins.core.relaxations.bound_results import BoundCertificate
from rs_plugins.core.relaxations.certifying import cascade_up_to, certify_bounds
from rs_plugins.core.relaxations.network import Method
from rs_plugins.core.relaxations.regions import Norm, Region
from rs_plugins.core.relaxations.slack import slack
from rs_plugins.errors import InputError
from rs_plugins_art.arrays import Array, to_classes, to_tensor
from rs_plugins_art.bounds_module import Box, check_bound
from rs_plugins_art.certifying import of_module
from rs_plugins_art.neutral import norm_name, refuse_training_mode
from rs_plugins_art.plain_gradients import PlainGradients

ToBoxes = Callable[[Array, Any, Any], Array]


class BoundsCertifying(PlainGradients):
    """What `BoundsClassifier` is built on; see there."""

    provided_concrete_to_interval: ToBoxes | None

    bound = of_module("bound", check_bound, "By which bounds intervals and margins are found.")

    def certify(
        self,
        x: Any = None,
        y: Any = None,
        eps: float | None = None,
        *,
        preds: Any = None,
        labels: Any = None,
        **how: Any,
    ) -> Array:
        """Return for each image whether it is proved that its ball has its class, all of it, (n,).

        ART's call is taken too: ``certify(preds=intervals, labels=y)``, of the intervals that `predict_intervals`
        returns. As those are of one logit at a time, fewer images are proved by them than by margins.

        Args:
            x: Images (n, *input), pixels in [0, 1]; or intervals (n, 2, classes), if there is no ``eps``.
            y: True classes, in any form.
            eps: Radius of the ball, in pixels.
            preds: Intervals, by ART's name.
            labels: True classes, by ART's name.
            **how: As in `certify_records`.

        Raises:
            InputError: If an argument has an impossible value.
            ModelError: If the model has a module that bounds do not know.
        """
        y = labels if y is None else y
        if eps is not None:
            if preds is not None:
                raise InputError("eps: expected None with interval predictions, whose radius it is, got it beside")
            return np.array([record.status == "verified" for record in self.certify_records(x, y, eps, **how)], bool)
        if how:
            raise TypeError(f"certify() got an unexpected keyword argument {min(how)!r} with interval predictions")
        return _proved(x if preds is None else preds, y)

    def certify_records(
        self,
        x: Any,
        y: Any,
        eps: float,
        *,
        norm: Norm | float = "linf",
        cascade: Sequence[str] | None = None,
        alpha_steps: int = 20,
        attack_steps: int = 40,
        attack_restarts: int = 1,
        dtype: torch.dtype = torch.float64,
        batch_size: int = 32,
        seed: int | None = None,
        indices: Sequence[int] | None = None,
        verbose: bool = False,
    ) -> list[BoundCertificate]:
        """Return what `rs_plugins.core.relaxations.certifying.certify_bounds` finds out about each image.

        Args:
            x: (n, *input), pixels in [0, 1].
            y: True classes, in any form.
            eps: Radius of the ball, in pixels.
            norm: ``"linf"`` or ``"l2"``; or as ART has it, ``np.inf``, ``"inf"`` or 2.
            cascade: Which bounds, in order; by default all up to the classifier's ``bound``.
            alpha_steps: Steps in which ``"alpha-crown"`` optimises its slopes.
            attack_steps: Steps of a run of the attack that comes first; 0 for none.
            attack_restarts: Its runs.
            dtype: Type of the copy that is certified.
            batch_size: Images at once.
            seed: Seed of the attack; the classifier's if not given.
            indices: Position of each image in its data set; 0, 1, … by default.
            verbose: Whether to show a progress bar.

        Raises:
            InputError: If an argument has an impossible value.
            ModelError: If the model has a module that bounds do not know.
        """
        images = self._exact_images(x)
        classes = to_classes(y, n=len(images), classes=self.nb_classes).cpu()
        return certify_bounds(
            self.base_model,
            images,
            classes,
            eps,
            norm=norm_name(norm),
            cascade=cascade_up_to(self.bound) if cascade is None else cascade,
            alpha_steps=alpha_steps,
            attack_steps=attack_steps,
            attack_restarts=attack_restarts,
            dtype=dtype,
            batch_size=batch_size,
            device=self._device,
            seed=self.seed if seed is None else seed,
            indices=indices,
            progress=verbose,
        )

    def margins(
        self,
        x: Any,
        y: Any,
        eps: float,
        method: Method | None = None,
        *,
        norm: Norm | float = "linf",
        batch_size: int = 32,
    ) -> Array:
        """Return lower bounds of logit_y - logit_k over the ball, k in order without y, (n, classes - 1).

        Rounding is not accounted for; `certify` does.

        Args:
            x: (n, *input), pixels in [0, 1].
            y: True classes, in any form.
            eps: Radius of the ball, in pixels.
            method: ``"ibp"``, ``"crown-ibp"`` or ``"crown"``; the classifier's ``bound`` if not given.
            norm: ``"linf"`` or ``"l2"``; or as ART has it, ``np.inf``, ``"inf"`` or 2.
            batch_size: Images at once.

        Raises:
            InputError: If an argument has an impossible value.
        """
        images, eps = check_images(self._images(x)).detach(), check_nonnegative(eps, "eps")
        method = None if method is None else check_bound(method)
        classes = to_classes(y, n=len(images), classes=self.nb_classes)
        size, place = check_count(batch_size, "batch_size"), self._device
        rows = [images.new_zeros(0, self.nb_classes - 1)]
        with torch.no_grad():
            for part, true in zip(images.split(size), classes.split(size), strict=True):
                found = self.model.margins(Region(part.to(place), eps, norm_name(norm)), true.to(place), method)
                rows.append(found.cpu())
        return torch.cat(rows).numpy()

    def predict_intervals(
        self,
        x: Any,
        is_interval: bool = False,
        bounds: Any = None,
        limits: Any = None,
        batch_size: int = 128,
        training_mode: bool = False,
        **kwargs: Any,
    ) -> Array:
        """Return the least and the greatest value of each logit, by the classifier's ``bound``, (n, 2, classes).

        Args:
            x: Images (n, *input), or boxes (n, 2, *input), lower ends first; they may leave [0, 1].
            is_interval: Whether they are boxes.
            bounds: As of `concrete_to_interval`, for images.
            limits: As of `concrete_to_interval`, for images.
            batch_size: Images at once.
            training_mode: False: bounds are those of the model in eval mode.
            **kwargs: Not used.

        Raises:
            InputError: If an argument has an impossible value.
        """
        refuse_training_mode(training_mode)
        if not is_interval:
            if bounds is None:
                raise InputError("bounds: expected the radius of the boxes around the images, in pixels, got None")
            make = self.provided_concrete_to_interval or self.concrete_to_interval
            x = make(self._images(x).detach().cpu().numpy(), bounds, limits)
        boxes = self._boxes(x)
        rows = [boxes.new_zeros(0, 2, self.nb_classes)]
        with evaluating(self.base_model), torch.no_grad():
            for part in boxes.split(check_count(batch_size, "batch_size")):
                part = part.to(self._device)
                rows.append(self.model.bounds(Box(part[:, 0], part[:, 1])).cpu())
        return torch.cat(rows).numpy()

    def _boxes(self, x: Any) -> Tensor:
        """Return boxes (n, 2, *input) after the checks."""
        boxes = to_tensor(x, "x")
        if boxes.ndim < 3 or boxes.shape[1] != 2:
            raise InputError(f"x: expected boxes of shape (n, 2, *input), got shape {tuple(boxes.shape)}")
        boxes = torch.unflatten(self._images(boxes.detach().flatten(0, 1)), 0, (-1, 2))
        if bool((boxes[:, 0] > boxes[:, 1]).any()):
            raise InputError("x: expected boxes whose lower ends, x[:, 0], are at most their upper ends, x[:, 1]")
        return boxes

    @staticmethod
    def concrete_to_interval(x: Array, bounds: Any, limits: Any = None) -> Array:
        """Return boxes (n, 2, *input) around images.

        Args:
            x: (n, *input).
            bounds: Radius in pixels; or how far a box goes below the image and how far above, two numbers or arrays.
            limits: The least and the greatest value, where boxes are cut; None: they are not.

        Raises:
            InputError: If ``bounds`` or ``limits`` are none such.
        """
        below, above = bounds if np.ndim(bounds) else (bounds, bounds)
        boxes = np.stack([x - np.asarray(below, x.dtype), x + np.asarray(above, x.dtype)], axis=1)
        return boxes if limits is None else boxes.clip(limits[0], limits[1])

    @staticmethod
    def get_accuracy(preds: Any, labels: Any) -> float:
        """Return the share of the predictions (n, classes) that are right by the labels (n,)."""
        rows, right = to_tensor(preds, "preds").detach().cpu(), to_tensor(labels, "labels").cpu()
        return float((rows.argmax(dim=1) == right).double().mean())

    def re_convert(self) -> None:
        """Do nothing; see `BoundedModel.re_convert`."""


def _proved(intervals: Any, y: Any) -> Array:
    """Return where the true logit is above all others for certain, by intervals (n, 2, classes), (n,)."""
    found = to_tensor(intervals, "preds").detach().cpu()
    if found.ndim != 3 or found.shape[1] != 2 or not found.is_floating_point():
        got = f"{found.dtype} of shape {tuple(found.shape)}"
        raise InputError(
            f"preds: expected intervals of shape (n, 2, classes), got {got}; for images give the radius eps"
        )
    classes = to_classes(y, n=len(found), classes=found.shape[2], name="labels").cpu().unsqueeze(1)
    others = found[:, 1].scatter(1, classes, -torch.inf).amax(dim=1)
    own = found[:, 0].gather(1, classes).squeeze(1)
    margins = own - others
    return (margins > slack(margins, own.abs() + others.abs())).numpy()
