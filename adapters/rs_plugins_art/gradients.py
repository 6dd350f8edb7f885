"""Gradients, losses and activations of the smoothed classifier, as ART's attacks ask for them."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from rs_plugins.core.models import evaluating
from rs_plugins.core.smoothing import soft_vote, soft_vote_gradient
from rs_plugins.errors import InputError
from rs_plugins_art.arrays import Array, like, wanted_labels
from rs_plugins_art.estimator import SmoothedEstimator
from rs_plugins_art.inner_layers import InnerLayers
from rs_plugins_art.neutral import refuse_training_mode


class SmoothedGradients(InnerLayers, SmoothedEstimator):
    """What `SmoothedClassifier` is built on; see there."""

    def loss_gradient(self, x: Any, y: Any, training_mode: bool = False, *, sampling: object = None) -> Any:
        """Return the gradient in ``x`` of the mean over images of -log mean softmax_y, shape of ``x``.

        Args:
            x: (n, *input), an array or a tensor; the result comes as float32 array or as a tensor like ``x``.
            y: Labels in any form; soft labels cost one pass per class.
            training_mode: False: gradients are those of the model in eval mode.
            sampling: Not used; one attack passes it.

        Raises:
            InputError: If an argument has an impossible value.
            ModelError: If no gradient flows through the model.
        """
        refuse_training_mode(training_mode)
        images = self._images(x).detach().to(self._device)
        targets = self._targets(y, len(images))
        draws = self.model.draws(images[:1])
        if targets.ndim == 1:
            gradient = self._slope(images, targets, draws)[1]
        else:
            gradient = torch.zeros_like(images)
            for label in targets.sum(dim=0).nonzero().flatten():
                weight = targets[:, label].reshape(-1, *[1] * (images.ndim - 1))
                gradient += weight.to(images) * self._slope(images, label.expand(len(images)), draws)[1]
        return like(x, gradient / max(len(images), 1))

    def class_gradient(self, x: Array, label: Any = None, training_mode: bool = False) -> Array:
        """Return the gradients in ``x`` of the log-probabilities, of the probabilities with ``output="probs"``.

        Args:
            x: (n, *input).
            label: None for all classes, giving (n, classes, *input); one class, or one per image, (n, 1, *input).
            training_mode: False: gradients are those of the model in eval mode.

        Raises:
            InputError: If an argument has an impossible value.
            ModelError: If no gradient flows through the model.
        """
        refuse_training_mode(training_mode)
        images = self._images(x).detach().to(self._device)
        draws = self.model.draws(images[:1])
        slopes = []
        for labels in wanted_labels(label, len(images), self.nb_classes, self._device):
            loss, slope = self._slope(images, labels, draws)
            scale = loss.neg().exp().to(slope) if self.output == "probs" else torch.ones(len(slope)).to(slope)
            slopes.append(-slope * scale.reshape(-1, *[1] * (slope.ndim - 1)))
        return torch.stack(slopes, dim=1).float().cpu().numpy()

    def _slope(self, images: Tensor, labels: Tensor, draws: Tensor) -> tuple[Tensor, Tensor]:
        """Return -log mean softmax_y, (n,), and its gradient, (n, *input), under ``draws``."""
        with evaluating(self.model):
            return soft_vote_gradient(self.base_model, images, labels, draws, chunk=self.chunk)

    def compute_loss(self, x: Any, y: Any, reduction: str = "none") -> Any:
        """Return -log mean softmax_y under the draws of `predict`: (n,) or, reduced, a scalar.

        Args:
            x: (n, *input). For a tensor the result is one, differentiable if ``x`` requires a gradient.
            y: Labels in any form.
            reduction: ``"none"``, ``"mean"`` or ``"sum"`` over the images.

        Raises:
            InputError: If an argument has an impossible value.
        """
        if reduction not in ("none", "mean", "sum"):
            raise InputError(f"reduction: expected 'none', 'mean' or 'sum', got {reduction!r}")
        images = self._images(x).to(self._device)
        targets = self._targets(y, len(images))
        draws = self.model.fixed_draws(images[:1].detach())
        differentiable = images.requires_grad and torch.is_grad_enabled()
        with evaluating(self.model), torch.set_grad_enabled(differentiable):
            vote = soft_vote(self.base_model, images, draws, chunk=self.chunk)
            targets = targets.to(vote) if targets.ndim == 2 else targets
            loss = cross_entropy(vote, targets, reduction=reduction)
        return loss.to(x.device) if isinstance(x, Tensor) else loss.detach().cpu().numpy()

    def _predict_framework(self, x: Tensor, y: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Return the differentiable log-probabilities at ``x``, for ART's patch attacks."""
        with evaluating(self.model):
            return self.model(x), y
