"""What the attacks on smoothed classifiers share: ART's contract, its forms of arguments, a model left as it was."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from art.attacks.attack import EvasionAttack
from art.estimators.certification.randomized_smoothing.randomized_smoothing import RandomizedSmoothingMixin
from art.estimators.classification import PyTorchClassifier
from art.summary_writer import SummaryWriter, SummaryWriterDefault
from torch import Tensor
from torch.nn.functional import one_hot
from tqdm.auto import tqdm

from rs_plugins.core.attacks.noisy_loss import GradientName, NoisyLoss
from rs_plugins.core.checks import check_count, check_flag, check_images, check_positive, check_seed
from rs_plugins.core.geometry import add_inside
from rs_plugins.core.models import device_and_dtype, evaluating
from rs_plugins.core.objectives import Logits, ObjectiveName
from rs_plugins.core.smoothing import NoiseMode, SmoothedModel, soft_vote
from rs_plugins.core.streams import fresh_seed
from rs_plugins.errors import InputError
from rs_plugins_art.arrays import Array, to_classes, to_images, to_tensor
from rs_plugins_art.black_box import SmoothedBlackBox
from rs_plugins_art.certifying import Certifying
from rs_plugins_art.fitting import gradients_kept
from rs_plugins_art.neutral import check_neutral

_COUNTS = ("max_iter", "batch_size", "samples")
_FLAGS = ("targeted", "verbose")


class SmoothedEvasion(EvasionAttack):
    """An ART attack on a smoothed classifier, whose algorithm is what a subclass says in `_budgets` and `_perturb`.

    Attributes:
        success: For an attack that looks for a smallest perturbation: of which images of the last `generate` it has
            seen an adversarial one, boolean (n,). None otherwise.
    """

    attack_params = [  # noqa: RUF012  a plain list is what the host reads
        *EvasionAttack.attack_params,
        *("max_iter", "targeted", "batch_size", "minimal", "sigma", "samples", "noise", "antithetic", "objective"),
        *("gradient", "chunk", "seed", "verbose", "summary_writer"),
    ]
    _estimator_requirements = ((PyTorchClassifier, SmoothedBlackBox),)

    max_iter: int
    batch_size: int
    minimal: bool
    sigma: float | None
    samples: int
    noise: NoiseMode
    antithetic: bool
    objective: ObjectiveName
    gradient: GradientName
    chunk: int | None
    seed: int | None
    verbose: bool
    success: Array | None

    def __init__(
        self, estimator: Any, classifier: Any, summary_writer: str | bool | SummaryWriter, **settings: Any
    ) -> None:
        if (estimator is None) == (classifier is None):
            raise InputError("estimator: expected one classifier, as `estimator` or as `classifier`, not both")
        super().__init__(estimator=classifier if estimator is None else estimator, summary_writer=summary_writer)
        self.success = None
        for name, value in settings.items():
            setattr(self, name, value)
        self._check_params()

    def _budgets(self, images: Tensor) -> dict[str, Tensor | None]:
        """Return what is in pixels, one value per image, (n,), under the names that `_perturb` takes."""
        raise NotImplementedError

    def _perturb(
        self, logits: Logits, images: Tensor, labels: Tensor, sigma: float, **how: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Return adversarial images, and `success` of them.

        Args:
            logits: The base classifier.
            images: (k, *input), pixels in [0, 1].
            labels: True labels, or targets if ``targeted``, (k,).
            sigma: Standard deviation of the noise, in pixels.
            **how: The budgets, and what all attacks of core have.
        """
        raise NotImplementedError

    # ---- the host's contract ---------------------------------------------------------------------------------------

    def generate(self, x: Any, y: Any = None, *, mask: Any = None) -> Array:
        """Return adversarial images, a new float32 array of the shape of ``x``.

        Args:
            x: (n, *input), floating point, pixels in [0, 1].
            y: True labels, or targets if ``targeted``, in any of ART's forms; of class probabilities, the most likely
                class. Without it, the predictions of the smoothed classifier are the labels: those of `predict` of a
                classifier of ours, else those of a `SmoothedClassifier` with the attack's seed; none abstains.
            mask: Broadcastable to ``x``; where it is 0 a pixel stays as it is.

        Raises:
            InputError: If an argument has an impossible value.
            ModelError: If the model does not return logits (n, classes), or no gradient flows through it.
        """
        self._check_params()
        self.success = None
        seed = fresh_seed() if self.seed is None else self.seed
        victim = attacked(self.estimator, self.sigma, seed)
        device, dtype = device_and_dtype(victim.base, getattr(self.estimator, "device", None))
        images = self._images(x, torch.promote_types(dtype, torch.float32))
        if self.targeted and y is None:
            raise InputError("y: needed for a targeted attack")
        by_image = self._budgets(images) | {"mask": None if mask is None else _mask(mask, images)}
        logits = _taking(dtype, victim.base)
        with evaluating(self.estimator.model):
            labels = self._labels(y, images, victim, logits, device)
            parts = [slice(start, start + self.batch_size) for start in range(0, len(images), self.batch_size)]
            found = [
                self._perturb(
                    logits,
                    images[part].to(device),
                    labels[part],
                    victim.sigma,
                    family=victim.family,
                    seed=seed,
                    watch=self._reporter(number, images[part], labels[part]),
                    **self._settings(),
                    **{name: None if each is None else each[part].to(device) for name, each in by_image.items()},
                )
                for number, part in enumerate(tqdm(parts, desc=type(self).__name__, disable=not self.verbose))
            ]
        if self.summary_writer is not None:
            self.summary_writer.reset()
        self._keep([success for _, success in found])
        return _as_host(torch.cat([images[:0], *(adversarial.to(images.device) for adversarial, _ in found)]), images)

    def set_params(self, **kwargs: Any) -> None:
        """Change settings, all of them or, if one is refused, none.

        Raises:
            InputError: If a value is impossible.
            ValueError: If a name is not in ``attack_params``.
        """
        before = self.__dict__.copy()
        try:
            super().set_params(**kwargs)
        except BaseException:
            self.__dict__.clear()
            self.__dict__.update(before)
            raise

    @property
    def summary_writer(self) -> SummaryWriter | None:
        """What writes down each step for TensorBoard, if anything does."""
        return self._summary_writer

    @summary_writer.setter
    def summary_writer(self, writer: str | bool | SummaryWriter | None) -> None:
        if not isinstance(writer, str | bool | SummaryWriter | None):
            raise InputError(f"summary_writer: expected a bool, a path or a SummaryWriter, got {writer!r}")
        self._summary_writer_arg = False if writer is None else writer
        self._summary_writer = SummaryWriterDefault(writer) if writer and isinstance(writer, str | bool) else None
        if isinstance(writer, SummaryWriter):
            self._summary_writer = writer

    def __repr__(self) -> str:
        """Return name and settings, arrays by their shape."""
        settings = ((name, getattr(self, name)) for name in self.attack_params)
        return f"{type(self).__name__}({', '.join(f'{name}={_short(value)}' for name, value in settings)})"

    def _check_params(self) -> None:
        super()._check_params()
        for name in _COUNTS:
            setattr(self, name, check_count(getattr(self, name), name))
        for name in _FLAGS:
            check_flag(getattr(self, name), name)
        if self.chunk is not None:
            self.chunk = check_count(self.chunk, "chunk")
        seed = 0 if self.seed is None else check_seed(self.seed)
        check_neutral(self.estimator)
        victim = attacked(self.estimator, self.sigma, seed)
        how = self._settings()
        names = ("samples", "noise", "antithetic", "objective", "gradient", "chunk")
        samples, noise, antithetic, objective, gradient, chunk = (how[name] for name in names)
        NoisyLoss.checked(
            victim.base, victim.sigma, samples, noise, antithetic, victim.family, objective, gradient, seed, chunk
        )
        if isinstance(self.estimator, SmoothedBlackBox) and gradient == "backprop":
            raise InputError(
                "gradient: expected 'stein' or 'centred-stein' for a SmoothedBlackBox, which has no gradient, "
                f"got {gradient!r}"
            )

    def _settings(self) -> dict[str, Any]:
        """Return the settings that all attacks of core have, under the names that they have there."""
        names = ("samples", "noise", "antithetic", "objective", "gradient", "targeted", "chunk")
        return {name: getattr(self, name) for name in names} | {"steps": self.max_iter}

    # ---- a call ----------------------------------------------------------------------------------------------------

    def _images(self, x: Any, dtype: torch.dtype) -> Tensor:
        """Return ``x`` as images (n, *input) of type ``dtype``, after the checks."""
        images = check_images(to_images(x, dtype), "x").detach()
        if isinstance(self.estimator, Certifying):
            self.estimator._exact_images(x)
        elif tuple(images.shape[1:]) != tuple(self.estimator.input_shape):
            expected, got = tuple(self.estimator.input_shape), tuple(images.shape)
            raise InputError(f"x: expected a batch of images of shape {expected}, got shape {got}")
        return images

    def _labels(self, y: Any, images: Tensor, victim: SmoothedModel, logits: Logits, device: torch.device) -> Tensor:
        """Return the labels (n,) to get away from or, if targeted, to reach."""
        if y is not None:
            return to_classes(y, n=len(images), classes=self.estimator.nb_classes).to(device)
        if isinstance(self.estimator, SmoothedBlackBox):  # its vote is a hard one
            return torch.from_numpy(self.estimator.predict(images.cpu().numpy()).argmax(axis=1)).to(device)
        draws = victim.fixed_draws(images[:1].to(device))
        with torch.no_grad():
            parts = [
                soft_vote(logits, part.to(device), draws, chunk=self.chunk) for part in images.split(128) if len(part)
            ]
        return torch.cat([part.argmax(dim=1) for part in parts]) if parts else torch.zeros(0, dtype=torch.int64)

    def _keep(self, successes: list[Tensor | None]) -> None:
        """Set `success` of all images from that of each batch."""
        known = [success.cpu().numpy() for success in successes if success is not None]
        if self.minimal:
            self.success = np.concatenate([np.zeros(0, dtype=bool), *known])

    def _reporter(self, batch: int, images: Tensor, labels: Tensor) -> Callable[..., None] | None:
        """Return a function that tells ART's summary writer about each step of one batch.

        The writer knows an image by its place and compares steps, so it is shown all images at each step: those that
        have stopped early as they were last.
        """
        writer = self.summary_writer
        if writer is None:
            return None
        rows = one_hot(labels.cpu(), self.estimator.nb_classes).numpy().astype(np.float32)
        shown, slopes = images.cpu().clone(), torch.zeros_like(images, device="cpu")

        def report(step: int, moving: Tensor, current: Tensor, gradient: Tensor) -> None:
            shown[moving.cpu()], slopes[moving.cpu()] = current.detach().cpu(), gradient.detach().cpu()
            with torch.enable_grad(), gradients_kept(self.estimator.model):  # a writer may ask for gradients
                writer.update(
                    batch_id=batch,
                    global_step=step + 1,  # an indicator divides by it
                    grad=slopes.numpy().copy(),
                    patch=None,
                    estimator=self.estimator,
                    x=shown.numpy().copy(),
                    y=rows,
                    targeted=self.targeted,
                )

        return report


def attacked(estimator: Any, sigma: float | None, seed: int) -> SmoothedModel:
    """Return the smoothed classifier that an attack on ``estimator`` is aimed at.

    Args:
        estimator: A smoothed classifier of ours; one of ART's, whose noise is its ``scale``; or any other, to which
            noise of ``sigma`` is added.
        sigma: Standard deviation of the noise, in pixels; None if the estimator brings it.
        seed: Seed of the draws by which an estimator that is not ours predicts.

    Raises:
        InputError: If ``sigma`` is missing, impossible or not the estimator's own, or noise would be added twice.
    """
    given = None if sigma is None else check_positive(sigma, "sigma")
    of_art = isinstance(estimator, RandomizedSmoothingMixin)
    model = estimator.model
    if isinstance(model, SmoothedModel) and not of_art:
        own: float | None = model.sigma
    else:
        own = check_positive(estimator.scale, "scale") if of_art else None
        if own is None and given is None:
            raise InputError("sigma: needed, in pixels, because the estimator is not smoothed")
        model = SmoothedModel(model, own or given or 0, seed=seed)
    if own is not None and given is not None and not math.isclose(given, own, rel_tol=1e-6):
        raise InputError(f"sigma: expected {own}, which the smoothed classifier brings, got {sigma}")
    return model


def budget(value: Any, name: str) -> Tensor:
    """Return a budget or a length as a tensor, in pixels.

    Raises:
        InputError: If it is not numeric, negative or not finite.
    """
    numbers = to_tensor(value, name).detach().double()
    if not bool((numbers.isfinite() & (numbers >= 0)).all()):
        raise InputError(f"{name}: expected finite values >= 0, got {value}")
    return numbers


def by_image(value: Any, images: Tensor, name: str) -> Tensor:
    """Return ``value``, one per image, (n,), or in any form that broadcasts to ``images`` (n, *input), as (n,).

    Raises:
        InputError: If it does not broadcast, or differs between pixels of an image.
    """
    numbers = budget(value, name).to(images.device)
    if numbers.shape != (len(images),):
        pixels = _broadcast(numbers, images, name).flatten(1)
        numbers = pixels[:, 0] if pixels.shape[1] else pixels.new_zeros(len(pixels))
        if not bool((pixels == numbers.unsqueeze(1)).all()):
            raise InputError(f"{name}: expected one value for all pixels of an image, got one per pixel")
    return numbers.to(images.dtype)


def _mask(mask: Any, images: Tensor) -> Tensor:
    """Return where ``mask`` lets pixels change, boolean, of the shape of ``images``."""
    return _broadcast(to_tensor(mask, "mask") != 0, images, "mask")


def _broadcast(value: Tensor, images: Tensor, name: str) -> Tensor:
    try:
        return value.to(images.device).expand(images.shape)
    except RuntimeError:
        raise InputError(
            f"{name}: expected a shape that broadcasts to {tuple(images.shape)}, got {tuple(value.shape)}"
        ) from None


def _taking(dtype: torch.dtype, base: Logits) -> Logits:
    """Return ``base``, which computes in ``dtype``, as a function of images of any floating-point type."""
    return lambda noisy: base(noisy.to(dtype))


def _as_host(adversarial: Tensor, images: Tensor) -> Array:
    """Return the result as float32, rounded towards ``images`` so that it stays within the budget."""
    if adversarial.dtype != torch.float32:
        adversarial = add_inside(images.float(), (adversarial - images).float())
    return adversarial.cpu().numpy()


def _short(value: object) -> str:
    shape = getattr(value, "shape", None)
    return f"array{tuple(shape)}" if shape else repr(value)
