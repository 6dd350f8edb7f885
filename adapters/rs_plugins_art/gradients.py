"""Gradients, losses and activations of the smoothed classifier, as ART's attacks ask for them."""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from rs_plugins.core.checks import check_count
from rs_plugins.core.models import evaluating
from rs_plugins.core.smoothing import soft_vote, soft_vote_gradient
from rs_plugins.errors import InputError
from rs_plugins_art.arrays import Array, like, to_classes
from rs_plugins_art.estimator import SmoothedEstimator
from rs_plugins_art.neutral import refuse_training_mode


class SmoothedGradients(SmoothedEstimator):
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
        for labels in self._wanted(label, len(images)):
            loss, slope = self._slope(images, labels, draws)
            scale = loss.neg().exp().to(slope) if self.output == "probs" else torch.ones(len(slope)).to(slope)
            slopes.append(-slope * scale.reshape(-1, *[1] * (slope.ndim - 1)))
        return torch.stack(slopes, dim=1).float().cpu().numpy()

    def _slope(self, images: Tensor, labels: Tensor, draws: Tensor) -> tuple[Tensor, Tensor]:
        """Return -log mean softmax_y, (n,), and its gradient, (n, *input), under ``draws``."""
        with evaluating(self.model):
            return soft_vote_gradient(self.base_model, images, labels, draws, chunk=self.chunk)

    def _wanted(self, label: Any, n: int) -> list[Tensor]:
        """Return the labels (n,) of each gradient that ``label`` asks for."""
        classes = self.nb_classes
        if label is None:
            return [torch.full((n,), each, device=self._device) for each in range(classes)]
        labels = np.asarray(label.cpu() if isinstance(label, Tensor) else label)
        if labels.ndim == 0:
            labels = np.full(n, labels)
        return [to_classes(labels, n=n, classes=classes, name="label").to(self._device)]

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

    def get_activations(
        self, x: Any, layer: int | str | None = None, batch_size: int = 128, framework: bool = False
    ) -> Any:
        """Return what a module of the base model gives for ``x`` (n, *input) without noise, in eval mode.

        Args:
            x: (n, *input).
            layer: Position in ``layer_names``, or the name of any submodule of ``base_model``.
            batch_size: Images per pass.
            framework: Return a differentiable tensor instead of an array.

        Raises:
            InputError: If there is no such layer. A smoothed classifier itself has none.
        """
        module = self._layer(layer)
        images = self._images(x)
        outputs: list[Tensor] = []
        handle = module.register_forward_hook(lambda module, inputs, output: outputs.append(output))
        activations = []
        try:
            with evaluating(self.model), torch.set_grad_enabled(framework):
                for part in images.split(check_count(batch_size, "batch_size")):
                    self.base_model(part.to(self._device))
                    activations.append(outputs[-1])
        finally:
            handle.remove()
        joined = torch.cat(activations)
        return joined if framework else joined.detach().cpu().numpy()

    def _layer(self, layer: int | str | None) -> nn.Module:
        modules: dict[str, nn.Module] = dict(self.base_model.named_modules())
        names = self.layer_names
        if isinstance(layer, int) and 0 <= layer < len(names):
            layer = names[layer]
        if not isinstance(layer, str) or layer not in modules:
            raise InputError(
                f"layer: expected a layer of the base model, one of {names} or a position there, got {layer!r}"
            )
        return modules[layer]

    def custom_loss_gradient(self, loss_fn: Any, x: Any, y: Any, layer_name: Any, training_mode: bool = False) -> Any:
        """Return the gradient in ``x`` of a distance between the activations of ``x`` and of ``y``, shape of ``x``.

        Args:
            loss_fn: The distance: called with the difference of the activations and ``p=2``, it returns a scalar.
            x: (n, *input).
            y: The images to come close to, (n, *input).
            layer_name: As ``layer`` of `get_activations`, whose activations these are: without noise.
            training_mode: False: activations are those of the base model in eval mode.

        Raises:
            InputError: If there is no such layer.
        """
        refuse_training_mode(training_mode)
        with torch.inference_mode(False), torch.enable_grad():
            images, aims = self._images(x).detach().clone().requires_grad_(), self._images(y).detach().clone()
            activations = self.get_activations(images, layer_name, framework=True)
            difference = activations - self.get_activations(aims, layer_name, framework=True)
            (gradient,) = torch.autograd.grad(loss_fn(difference, p=2), images)
        return like(x, gradient)

    def _predict_framework(self, x: Tensor, y: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Return the differentiable log-probabilities at ``x``, for ART's patch attacks."""
        with evaluating(self.model):
            return self.model(x), y
