"""What the torchattacks attacks on smoothed classifiers share: modes, units, checks, and a model left as it was."""

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torchattacks.attack import Attack

from rs_plugins.core.attacks.noisy_loss import GradientName, NoisyLoss
from rs_plugins.core.checks import check_count, check_images, check_labels, check_positive
from rs_plugins.core.models import check_device, check_noiseless, evaluating, probe
from rs_plugins.core.noise import GaussianNoise
from rs_plugins.core.objectives import ObjectiveName
from rs_plugins.core.smoothing import NoiseMode, SmoothedModel, soft_vote
from rs_plugins.errors import InputError, RSPluginsWarning
from rs_plugins_torchattacks.targets import TargetMap, labels_are_targets, least_likely_targets, random_targets

DEFAULT_SIGMA = 0.25  # pixels; the noise for a plain model that comes without a sigma


class SmoothedAttack(Attack):
    """A torchattacks attack on a smoothed classifier, whose algorithm is the method `perturb` of a subclass.

    ``attack.model`` is always the model that was given. What is attacked is put together at each call: the model under
    noise of ``sigma``, or, if it is a `SmoothedModel`, its base under its own noise. Noise is added to pixels, before
    the normalisation of `set_normalization_used`, and never twice. Whatever happens in a call, every submodule is in
    the mode (train or eval) in which it was before.

    A subclass lists its settings in its constructor and hands them on by name; each becomes an attribute, and all are
    read, and checked again, at each call.

    Args:
        model: (n, *input) to logits (n, classes), or a `SmoothedModel`.
        settings: Those below, which all attacks have, and the subclass's own.

    Attributes:
        sigma: Standard deviation of the noise, in pixels. None: that of a `SmoothedModel`, `DEFAULT_SIGMA` otherwise.
        samples: Noise draws per step, shared by all images.
        noise: ``"fixed"``: one set of draws for all steps. ``"fresh"``: a new set at each step.
        antithetic: Whether half of the draws are the other half's negatives.
        objective: The loss: ``"log-mean-softmax"``, ``"mean-cross-entropy"`` or ``"mean-logits"``.
        gradient: ``"backprop"``, or ``"stein"`` or ``"centred-stein"`` for a model without a gradient.
        chunk: At most this many noisy images per forward pass; chosen by device and size if not given.
        seed: Seed of the draws and of random targets; with None, each call takes one from the operating system.

    Raises:
        InputError: If an argument has an impossible value, or ``sigma`` is not that of the `SmoothedModel`.
    """

    sigma: float | None
    samples: int
    noise: NoiseMode
    antithetic: bool
    objective: ObjectiveName
    gradient: GradientName
    chunk: int | None
    seed: int | None
    _normalization_applied: bool | None

    def __init__(self, model: nn.Module, **settings: Any) -> None:
        if not isinstance(model, nn.Module):
            advice = "; pass its model" if isinstance(getattr(model, "model", None), nn.Module) else ""
            raise InputError(f"model: expected a torch.nn.Module, got {type(model).__name__}{advice}")
        super().__init__(type(self).__name__, model)
        self.supported_mode = ["default", "targeted"]
        for name, value in settings.items():
            setattr(self, name, value)
        self.check()  # so that a wrong value is refused here, not at the first call

    def check(self) -> None:
        """Look at the settings, without running the model; a subclass adds the checks of its own.

        Raises:
            InputError: If one has an impossible value or does not fit the model.
        """
        victim = self.smoothed()
        NoisyLoss.checked(
            victim.base,
            victim.sigma,
            self.samples,
            self.noise,
            self.antithetic,
            victim.family,
            self.objective,
            self.gradient,
            victim.seed,
            victim.chunk,
        )

    def perturb(self, victim: SmoothedModel, images: Tensor, labels: Tensor) -> Tensor:
        """Return adversarial images like ``images`` (n, *input); to be written by the subclass.

        Args:
            victim: The smoothed classifier; its ``base`` takes pixels.
            images: (n, *input), n >= 1, pixels in [0, 1], the caller's own kept elsewhere.
            labels: True labels (n,), or the targets if ``self.targeted``.
        """
        raise NotImplementedError

    def forward(self, inputs: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return adversarial images for ``inputs`` (n, *input), pixels in [0, 1].

        The host calls this from `__call__`, which first puts the model into the right mode and undoes normalisation.

        Raises:
            InputError: If an argument has an impossible value.
            ModelError: If the model does not return logits (n, classes), or no gradient flows through it.
        """
        self.check()
        victim = self.smoothed()
        images = self._check_inputs(inputs)
        if not len(images):
            return images
        classes = probe(victim.base, images[:1])
        return self.perturb(victim, images, self._goal(images, labels, classes))

    def smoothed(self) -> SmoothedModel:
        """Return the smoothed classifier under attack: pixels (n, *input) to log-probabilities (n, classes).

        Raises:
            InputError: If a setting has an impossible value or does not fit the model.
        """
        model = self.model
        sigma = None if self.sigma is None else check_positive(self.sigma, "sigma")
        if isinstance(model, SmoothedModel):
            self._check_own_noise(model, sigma)
            base, sigma, family = model.base, model.sigma, model.family
        else:
            check_noiseless(model, "model")
            base, sigma, family = _HostLogits(self), DEFAULT_SIGMA if sigma is None else sigma, GaussianNoise
        return SmoothedModel(
            base, sigma, family=family, samples=self.samples, noise=self.noise, seed=self.seed, chunk=self.chunk
        )

    def aim(self, victim: SmoothedModel) -> dict[str, Any]:
        """Return the settings that all of core's attacks have, for ``victim``."""
        return {
            "sigma": victim.sigma,
            "family": victim.family,
            "samples": victim.samples,
            "noise": victim.noise,
            "antithetic": self.antithetic,
            "objective": self.objective,
            "gradient": self.gradient,
            "targeted": self.targeted,
            "seed": victim.seed,
            "chunk": victim.chunk,
        }

    def _check_own_noise(self, model: SmoothedModel, sigma: float | None) -> None:
        if self.normalization_used is not None:
            raise InputError(_NORMALISED_TWICE)
        if sigma is not None and not math.isclose(sigma, model.sigma, rel_tol=1e-6):
            raise InputError(f"sigma: expected {model.sigma}, which the SmoothedModel brings, or None; got {sigma}")

    # ---- inputs ----------------------------------------------------------------------------------------------------

    def _check_inputs(self, inputs: Tensor) -> Tensor:
        """Return a copy of ``inputs`` on the attack's device, after the checks that need no model."""
        if not isinstance(inputs, Tensor):
            raise InputError(f"inputs: expected a torch.Tensor, got {type(inputs).__name__}")
        images = inputs.detach().clone()
        if self.device is not None:
            images = images.to(check_device(self.device))
        _check_home(images, self.model)
        return check_images(images, "inputs")

    def _goal(self, images: Tensor, labels: Tensor | None, classes: int) -> Tensor:
        """Return the labels to move away from or, in a targeted mode, towards: (n,), int64."""
        if isinstance(labels, Tensor):
            labels = labels.detach().clone().to(images.device)
        if self.targeted:
            labels = self.get_target_label(images, labels)
            if isinstance(labels, Tensor):
                labels = labels.to(images.device)
        return _labels(labels, images, classes, "target labels" if self.targeted else "labels")

    # ---- targeted modes --------------------------------------------------------------------------------------------

    def set_mode_targeted_by_function(self, target_map_function: TargetMap | None = None, quiet: bool = False) -> None:
        """Aim at the labels that ``target_map_function(images, labels)`` returns; with None, at the given labels.

        A lambda works, but an attack that holds one cannot be pickled.
        """
        super().set_mode_targeted_by_function(target_map_function or labels_are_targets, quiet)

    def set_mode_targeted_least_likely(self, kth_min: int = 1, quiet: bool = False) -> None:
        """Aim at the class that the smoothed classifier finds least likely, or ``kth_min``-th least likely.

        Raises:
            InputError: If ``kth_min`` is no positive integer.
        """
        super().set_mode_targeted_least_likely(check_count(kth_min, "kth_min"), quiet)

    def get_least_likely_label(self, inputs: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return for each image the class, other than its label, of ``kth_min``-th lowest smoothed probability, (n,).

        Args:
            inputs: (n, *input), pixels in [0, 1].
            labels: (n,); the smoothed classifier's predictions if not given.

        Raises:
            InputError: If an argument has an impossible value, or there are not that many other classes.
        """
        images = self._check_inputs(inputs)
        scores = self._scores(self.smoothed(), images)
        labels = scores.argmax(dim=1) if labels is None else _labels(labels, images, scores.shape[1], "labels")
        return least_likely_targets(scores, labels, self._kth_min)

    def get_random_target_label(self, inputs: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return for each image a class other than its label, (n,), drawn from the seed and the image's content.

        So an image's target depends neither on how images are batched nor on their order; the global generator is
        left alone.

        Args:
            inputs: (n, *input), pixels in [0, 1].
            labels: (n,); the smoothed classifier's predictions if not given.

        Raises:
            InputError: If an argument has an impossible value.
        """
        images, victim = self._check_inputs(inputs), self.smoothed()
        if labels is None:
            scores = self._scores(victim, images)
            return random_targets(images, scores.argmax(dim=1), scores.shape[1], victim.seed)
        classes = probe(victim.base, images[:1])
        return random_targets(images, _labels(labels, images, classes, "labels"), classes, victim.seed)

    def _scores(self, victim: SmoothedModel, images: Tensor) -> Tensor:
        """Return the smoothed log-probabilities (n, classes) by fixed draws, with every submodule in eval mode."""
        with evaluating(victim), torch.no_grad():
            return soft_vote(victim.base, images, victim.fixed_draws(images), chunk=victim.chunk)

    # ---- the host's switches ---------------------------------------------------------------------------------------

    def set_normalization_used(self, mean: Sequence[float] | Tensor, std: Sequence[float] | Tensor) -> None:
        """Say that the attack is given, and returns, images (n, channels, h, w) normalised by ``mean`` and ``std``.

        ``eps``, ``alpha`` and ``sigma`` stay in pixels: noise is added before the model's input is normalised.

        Args:
            mean: (channels,), in pixels.
            std: (channels,), in pixels, > 0.

        Raises:
            InputError: If the two do not fit each other, or the model is a `SmoothedModel`, which takes pixels.
        """
        if isinstance(self.model, SmoothedModel):
            raise InputError(_NORMALISED_TWICE)
        with torch.inference_mode(False):  # else they could not take part in a gradient
            means, stds = (torch.as_tensor(v, dtype=torch.float32).flatten().tolist() for v in (mean, std))
            if len(means) != len(stds) or not all(math.isfinite(m) for m in means) or not all(s > 0 for s in stds):
                raise InputError(f"mean, std: expected finite values and as many positive ones, got {means}, {stds}")
            super().set_normalization_used(means, stds)

    def set_model_training_mode(
        self, model_training: bool = False, batchnorm_training: bool = False, dropout_training: bool = False
    ) -> None:
        """Choose the model's mode during the attack; afterwards every submodule is in its own mode again.

        Args:
            model_training: Train mode for all but BatchNorm and Dropout layers.
            batchnorm_training: Also for BatchNorm, whose running statistics the attack then changes: it warns.
            dropout_training: Also for Dropout.
        """
        if batchnorm_training:
            warnings.warn(
                "batchnorm_training=True: the attack will change the running statistics of the model's BatchNorm layers"
                if model_training
                else "batchnorm_training=True has no effect without model_training=True",
                RSPluginsWarning,
                stacklevel=2,
            )
        super().set_model_training_mode(model_training, batchnorm_training, dropout_training)

    # ---- the guard -------------------------------------------------------------------------------------------------

    def __call__(self, inputs: Tensor, labels: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
        """Return adversarial images for ``inputs`` (n, *input) and ``labels`` (n,); see `forward`."""
        if self._normalization_applied is True:
            self._check_normalised(inputs)
        with self._undisturbed():
            adversarial: Tensor = super().__call__(inputs, labels, *args, **kwargs)
        return adversarial

    def save(self, *args: Any, **kwargs: Any) -> Any:
        """Attack all images of a data loader and save the results, as torchattacks' `Attack.save` does.

        The robust accuracy that it prints comes from a single forward pass: do not publish it for a smoothed model.
        """
        with self._undisturbed():
            return super().save(*args, **kwargs)

    def get_output_with_eval_nograd(self, inputs: Tensor) -> Tensor:
        """Return the model's own output for ``inputs``, without gradient and with every submodule in eval mode."""
        with evaluating(self.model):  # the host changes nothing if the root is in eval mode already
            output: Tensor = super().get_output_with_eval_nograd(inputs)
        return output

    @contextmanager
    def _undisturbed(self) -> Iterator[None]:
        """Bring back each submodule's mode and the normalisation flag, also after an exception; the host does not."""
        modes = [(module, module.training) for module in self.model.modules()]
        applied = self._normalization_applied
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training
            self._normalization_applied = applied

    def _check_normalised(self, inputs: Tensor) -> None:
        channels = self.normalization_used["mean"].numel()
        shape = tuple(inputs.shape) if isinstance(inputs, Tensor) else type(inputs).__name__
        if not isinstance(inputs, Tensor) or inputs.ndim != 4 or inputs.shape[1] != channels:
            raise InputError(
                f"inputs: expected images of shape (n, {channels}, height, width), as set_normalization_used "
                f"was given {channels} channels, got {shape}"
            )

    def __repr__(self) -> str:
        """Return the attack's name and hyper-parameters, tensors by their shape."""
        settings = {k: v for k, v in vars(self).items() if not k.startswith("_") and k not in _HOSTS}
        if self.sigma is None:
            settings["sigma"] = self.model.sigma if isinstance(self.model, SmoothedModel) else DEFAULT_SIGMA
        settings["attack_mode"] = self.attack_mode
        settings["normalization_used"] = self.normalization_used is not None
        return f"{self.attack}({', '.join(f'{k}={_short(v)}' for k, v in settings.items())})"


# Attributes of the host's that are no settings, or that `repr` puts last.
_HOSTS = {
    *("model", "model_name", "attack", "device", "supported_mode", "targeted"),
    *("attack_mode", "normalization_used"),
}
_NORMALISED_TWICE = (
    "model: a SmoothedModel takes pixels, so normalisation belongs inside its base; "
    "expected no set_normalization_used, which would put the noise after normalisation"
)


class _HostLogits(nn.Module):
    """The attacked model as a function of pixels: through the host's `get_logits`, which normalises."""

    def __init__(self, attack: SmoothedAttack) -> None:
        super().__init__()
        self.model = attack.model
        self._get_logits: Callable[[Tensor], Tensor] = attack.get_logits

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits (n, classes) of pixels ``x`` (n, *input)."""
        return self._get_logits(x)


def _check_home(images: Tensor, model: nn.Module) -> None:
    """Refuse ``images`` that are not where ``model`` computes, or of another floating-point type."""
    own = next((t for t in chain(model.parameters(), model.buffers()) if t.is_floating_point()), None)
    if own is None:
        return
    if own.device != images.device:
        raise InputError(
            f"inputs: expected them on the model's device {own.device}, got {images.device}; "
            "the attack moves them to where the model was when the attack was made: see set_device"
        )
    if own.dtype != images.dtype:
        raise InputError(f"inputs: expected the model's dtype {own.dtype}, got {images.dtype}")


def _labels(labels: Tensor | None, images: Tensor, classes: int, name: str) -> Tensor:
    """Return ``labels`` (n,) as int64 if they are labels of ``images``."""
    if labels is None:
        raise InputError(f"{name}: expected one integer label per image, got None")
    return check_labels(labels, n=len(images), classes=classes, name=name).to(images.device, torch.int64)


def _short(value: object) -> str:
    return f"tensor{tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
