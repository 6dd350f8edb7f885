"""What the layers inside a classifier's base model give, as ART asks for it."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from rs_plugins.core.checks import check_count
from rs_plugins.core.models import evaluating
from rs_plugins.errors import InputError
from rs_plugins_art.arrays import like
from rs_plugins_art.neutral import refuse_training_mode


class InnerLayers:
    """Activations of an estimator that has ``base_model``, ``layer_names`` and a method ``_images``."""

    base_model: Any
    layer_names: Any
    _device: Any
    _images: Callable[[object], Tensor]

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
            with evaluating(self.base_model), torch.set_grad_enabled(framework):
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
