"""Predictions, losses and gradients of a network itself, as ART's attacks ask for them."""

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from rs_plugins.core.checks import check_count
from rs_plugins.core.models import evaluating
from rs_plugins.errors import InputError, ModelError
from rs_plugins_art.arrays import Array, like, set_aside_broken, wanted_labels
from rs_plugins_art.inner_layers import InnerLayers
from rs_plugins_art.neutral import refuse_training_mode
from rs_plugins_art.pixel_estimator import PixelEstimator


class PlainGradients(InnerLayers, PixelEstimator):
    """What `BoundsClassifier` is built on; see there.

    Unlike in ART's own classifier, labels may have any of its forms, images are taken in every floating-point type, and
    modes and gradients of the model are afterwards as they were.
    """

    def predict(self, x: Any, batch_size: int = 128, training_mode: bool = False, **kwargs: Any) -> Array:
        """Return the logits (n, classes), float32.

        Args:
            x: (n, *input), floating point, pixels; values outside [0, 1] are taken as they are. An image with NaN or
                infinity gets a row of NaN, with a warning: some attacks try such images.
            batch_size: Images per pass.
            training_mode: False: predictions are those of the model in eval mode.
            **kwargs: Not used; callers of ART pass ``y``, ``logits`` and others.

        Raises:
            InputError: If an argument has an impossible value.
            ModelError: If the model does not return logits (n, classes).
        """
        refuse_training_mode(training_mode)
        batch_size = check_count(batch_size, "batch_size")
        x, broken = set_aside_broken(x)
        images = self._images(x)
        rows = np.empty((len(images), self.nb_classes), dtype=np.float32)
        with evaluating(self.base_model), torch.no_grad():
            for start in range(0, len(images), batch_size):
                part = images[start : start + batch_size].to(self._device)
                rows[start : start + batch_size] = self.base_model(part).float().cpu().numpy()
        rows[broken] = np.nan
        return rows

    def loss_gradient(self, x: Any, y: Any, training_mode: bool = False, **kwargs: Any) -> Any:
        """Return the gradient in ``x`` of the mean cross-entropy over images, shape of ``x``.

        Args:
            x: (n, *input), an array or a tensor; the result comes as float32 array or as a tensor like ``x``.
            y: Labels in any form.
            training_mode: False: gradients are those of the model in eval mode.
            **kwargs: Not used.

        Raises:
            InputError: If an argument has an impossible value.
            ModelError: If no gradient flows through the model.
        """
        refuse_training_mode(training_mode)
        images = self._images(x).detach().to(self._device)
        if not len(images):
            return like(x, images)
        targets = self._targets(y, len(images))
        return like(x, self._slope(images, lambda logits: _loss(logits, targets, "mean")))

    def class_gradient(self, x: Array, label: Any = None, training_mode: bool = False, **kwargs: Any) -> Array:
        """Return the gradients in ``x`` of the logits.

        Args:
            x: (n, *input).
            label: None for all classes, giving (n, classes, *input); one class, or one per image, (n, 1, *input).
            training_mode: False: gradients are those of the model in eval mode.
            **kwargs: Not used.

        Raises:
            InputError: If an argument has an impossible value.
            ModelError: If no gradient flows through the model.
        """
        refuse_training_mode(training_mode)
        images = self._images(x).detach().to(self._device)
        slopes = [
            self._slope(images, lambda logits, k=labels: logits.gather(1, k.unsqueeze(1)).sum())
            for labels in wanted_labels(label, len(images), self.nb_classes, self._device)
        ]
        return torch.stack(slopes, dim=1).float().cpu().numpy()

    def _slope(self, images: Tensor, value: Any) -> Tensor:
        """Return the gradient in ``images`` of ``value`` of their logits."""
        with evaluating(self.base_model), torch.inference_mode(False), torch.enable_grad():
            images = images.clone().requires_grad_()
            result = value(self.base_model(images))
            if not result.requires_grad:
                raise ModelError("model: expected a gradient of the logits with respect to the images, got none")
            (slope,) = torch.autograd.grad(result, images)
        return slope

    def compute_loss(self, x: Any, y: Any, reduction: str = "none", **kwargs: Any) -> Any:
        """Return the cross-entropy: (n,) or, reduced, a scalar.

        Args:
            x: (n, *input). For a tensor the result is one, differentiable if ``x`` requires a gradient.
            y: Labels in any form.
            reduction: ``"none"``, ``"mean"`` or ``"sum"`` over the images.
            **kwargs: Not used.

        Raises:
            InputError: If an argument has an impossible value.
        """
        if reduction not in ("none", "mean", "sum"):
            raise InputError(f"reduction: expected 'none', 'mean' or 'sum', got {reduction!r}")
        images = self._images(x).to(self._device)
        targets = self._targets(y, len(images))
        differentiable = images.requires_grad and torch.is_grad_enabled()
        with evaluating(self.base_model), torch.set_grad_enabled(differentiable):
            loss = _loss(self.base_model(images), targets, reduction)
        return loss.to(x.device) if isinstance(x, Tensor) else loss.detach().cpu().numpy()

    def _predict_framework(self, x: Tensor, y: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Return the differentiable logits at ``x``, for ART's patch attacks."""
        with evaluating(self.base_model):
            return self.base_model(x), y


def _loss(logits: Tensor, targets: Tensor, reduction: str) -> Tensor:
    return cross_entropy(logits, targets.to(logits) if targets.ndim == 2 else targets, reduction=reduction)
