"""SmoothAdv (Salman et al. 2019) as ART evasion attacks."""

import math
from typing import Any

import numpy as np
import torch
from art.attacks.attack import EvasionAttack
from art.estimators.classification import PyTorchClassifier
from art.summary_writer import SummaryWriter
from torch import Tensor, nn
from torch.nn.functional import one_hot
from tqdm.auto import tqdm

from rs_plugins.core.attacks.smoothadv import smooth_adv_pgd
from rs_plugins.core.checks import check_count, check_images, check_positive, check_seed
from rs_plugins.core.models import device_and_dtype, evaluating
from rs_plugins.core.smoothing import NoiseMode, SmoothedModel, check_noise_mode, soft_vote
from rs_plugins.errors import InputError
from rs_plugins_art.arrays import Array, to_classes, to_images, to_tensor
from rs_plugins_art.estimator import SmoothedEstimator
from rs_plugins_art.neutral import check_neutral


class SmoothAdvPGD(EvasionAttack):
    """PGD in an l2 ball on -log mean softmax under noise: SmoothAdv_PGD of Salman et al. (2019).

    Args:
        estimator: A `SmoothedClassifier`, or any ART `PyTorchClassifier` without preprocessing.
        classifier: Another name for ``estimator``.
        norm: 2.
        eps: l2 budget in pixels: a number, or an array with one value per image (broadcastable to the images).
        eps_step: Length of a step in pixels, in the same forms.
        max_iter: Number of steps.
        targeted: Whether ``y`` are targets to reach, instead of labels to get away from.
        num_random_init: 0: the attack starts at the image.
        batch_size: Images attacked at once; changes no result.
        sigma: Standard deviation of the noise, in pixels; needed unless the estimator is smoothed, whose own counts.
        samples: Noise draws per step, shared by all images (the paper's m).
        chunk: At most this many noisy images per forward pass; chosen by device and size if not given.
        seed: Seed of the draws; with None, each call takes one from the operating system.
        noise: ``"fixed"``: one set of draws for all steps, as in the paper. ``"fresh"``: a new set at each step.
        verbose: Whether to show a progress bar.
        summary_writer: As for ART's own attacks.

    Raises:
        InputError: If an argument has an impossible value, or ART would change images on their way to the model.
        EstimatorError: If the estimator is no `PyTorchClassifier`.
    """

    attack_params = [  # noqa: RUF012  a plain list is what the host reads
        *EvasionAttack.attack_params,
        *("norm", "eps", "eps_step", "max_iter", "targeted", "num_random_init", "batch_size"),
        *("sigma", "samples", "chunk", "seed", "noise", "verbose"),
    ]
    _estimator_requirements = (PyTorchClassifier,)

    def __init__(
        self,
        estimator: PyTorchClassifier | None = None,
        *,
        classifier: PyTorchClassifier | None = None,
        norm: float = 2,
        eps: Any = 1.0,
        eps_step: Any = 0.2,
        max_iter: int = 10,
        targeted: bool = False,
        num_random_init: int = 0,
        batch_size: int = 32,
        sigma: float | None = None,
        samples: int = 16,
        chunk: int | None = None,
        seed: int | None = 0,
        noise: NoiseMode = "fixed",
        verbose: bool = False,
        summary_writer: str | bool | SummaryWriter = False,
    ) -> None:
        if (estimator is None) == (classifier is None):
            raise InputError("estimator: expected one classifier, as `estimator` or as `classifier`, not both")
        super().__init__(estimator=estimator or classifier, summary_writer=summary_writer)
        self.norm = norm
        self.eps = eps
        self.eps_step = eps_step
        self.max_iter = max_iter
        self.targeted = targeted
        self.num_random_init = num_random_init
        self.batch_size = batch_size
        self.sigma = sigma
        self.samples = samples
        self.chunk = chunk
        self.seed = seed
        self.noise: NoiseMode = noise
        self.verbose = verbose
        self._check_params()

    def generate(self, x: Any, y: Any = None, *, mask: Any = None) -> Array:
        """Return adversarial images, a new float32 array of the shape of ``x``.

        Args:
            x: (n, *input), floating point, pixels in [0, 1].
            y: True labels, or targets if ``targeted``, in any of ART's forms; of class probabilities, the most likely
                class. Without it, the smoothed classifier's own predictions are the labels.
            mask: Broadcastable to ``x``; where it is 0 a pixel stays as it is.

        Raises:
            InputError: If an argument has an impossible value.
            ModelError: If the model does not return logits (n, classes), or no gradient flows through it.
        """
        self._check_params()
        victim = self._victim()
        device = self.estimator.device
        images = check_images(self._images(x, victim), "x").detach()
        if not len(images):
            return images.float().cpu().numpy()
        free = None if mask is None else _mask(mask, images)
        eps, step = _per_image(self.eps, images, "eps"), _per_image(self.eps_step, images, "eps_step")
        with evaluating(self.estimator.model):
            labels = self._labels(victim, images.to(device), y)
            parts = torch.arange(len(images)).split(self.batch_size)
            adversarial = [
                self._attack(
                    victim,
                    images[part].to(device),
                    labels[part.to(device)],
                    number,
                    eps=eps[part].to(device),
                    step=step[part].to(device),
                    mask=None if free is None else free[part].to(device),
                )
                for number, part in enumerate(tqdm(parts, desc="SmoothAdvPGD", disable=not self.verbose))
            ]
        if self.summary_writer is not None:
            self.summary_writer.reset()
        return torch.cat(adversarial).float().cpu().numpy()

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
            self.__dict__.update(before)
            raise

    def _attack(self, victim: SmoothedModel, images: Tensor, labels: Tensor, number: int, **how: Any) -> Tensor:
        """Return adversarial images for the batch ``number``; ``how`` are its eps, step and mask."""
        return smooth_adv_pgd(
            victim.base,
            images,
            labels,
            victim.sigma,
            steps=self.max_iter,
            samples=self.samples,
            noise=self.noise,
            family=victim.family,
            targeted=self.targeted,
            seed=victim.seed,
            chunk=self.chunk,
            watch=None if self.summary_writer is None else self._reporter(number, labels),
            **how,
        )

    def _reporter(self, batch: int, labels: Tensor) -> Any:
        """Return a function that tells ART's summary writer about each step of one batch."""
        rows = one_hot(labels, self.estimator.nb_classes).cpu().numpy().astype(np.float32)

        def report(step: int, images: Tensor, gradient: Tensor) -> None:
            self.summary_writer.update(
                batch_id=batch,
                global_step=step + 1,  # an indicator divides by it
                grad=gradient.float().cpu().numpy(),
                patch=None,
                estimator=self.estimator,
                x=images.float().cpu().numpy(),
                y=rows,
                targeted=self.targeted,
            )

        return report

    def _victim(self) -> SmoothedModel:
        """Return the smoothed classifier under attack: the estimator's own noise, or ours around its model."""
        model: nn.Module = self.estimator.model
        if not isinstance(model, SmoothedModel):
            if self.sigma is None:
                raise InputError("sigma: needed, in pixels, because the estimator is not smoothed")
            return SmoothedModel(model, self.sigma, samples=self.samples, seed=self.seed)
        if self.sigma is not None and not math.isclose(self.sigma, model.sigma, rel_tol=1e-6):
            raise InputError(f"sigma: expected {model.sigma}, which the smoothed classifier brings, got {self.sigma}")
        return SmoothedModel(model.base, model.sigma, family=model.family, samples=self.samples, seed=self.seed)

    def _labels(self, victim: SmoothedModel, images: Tensor, y: Any) -> Tensor:
        """Return the labels (n,) to get away from or, if targeted, to reach."""
        if y is not None:
            return to_classes(y, n=len(images), classes=self.estimator.nb_classes).to(images.device)
        if self.targeted:
            raise InputError("y: needed for a targeted attack")
        with torch.no_grad():
            votes = [soft_vote(victim.base, part, victim.draws(part), chunk=self.chunk) for part in images.split(128)]
        return torch.cat(votes).argmax(dim=1)

    def _images(self, x: Any, victim: SmoothedModel) -> Tensor:
        """Return ``x`` as images (n, *input) in the model's floating-point type, of the shape that it takes."""
        if isinstance(self.estimator, SmoothedEstimator):
            return self.estimator._images(x)
        images = to_images(x, device_and_dtype(victim.base, self.estimator.device)[1])
        expected = tuple(self.estimator.input_shape)
        if tuple(images.shape[1:]) != expected:
            raise InputError(f"x: expected a batch of images of shape {expected}, got shape {tuple(images.shape)}")
        return images

    def _check_params(self) -> None:
        super()._check_params()
        if self.norm not in (2, "2"):
            raise InputError(f"norm: expected 2, got {self.norm!r}; other balls are not supported yet")
        if self.num_random_init != 0:
            raise InputError(
                f"num_random_init: expected 0, got {self.num_random_init!r}; random starts are not supported yet"
            )
        for name in ("max_iter", "batch_size", "samples"):
            check_count(getattr(self, name), name)
        if self.chunk is not None:
            check_count(self.chunk, "chunk")
        if self.sigma is not None:
            check_positive(self.sigma, "sigma")
        if self.seed is not None:
            check_seed(self.seed)
        for name in ("targeted", "verbose"):
            if not isinstance(getattr(self, name), bool):
                raise InputError(f"{name}: expected True or False, got {getattr(self, name)!r}")
        for name in ("eps", "eps_step"):
            _budget(getattr(self, name), name)
        check_noise_mode(self.noise)
        check_neutral(self.estimator)
        self._victim()


def _budget(value: Any, name: str) -> Tensor:
    """Return a budget or step as a tensor, in pixels."""
    budget = to_tensor(value, name).double()
    if not bool((budget.isfinite() & (budget >= 0)).all()):
        raise InputError(f"{name}: expected finite values >= 0, got {value}")
    return budget


def _per_image(value: Any, images: Tensor, name: str) -> Tensor:
    """Return ``value``, in any form that broadcasts to ``images`` (n, *input), as one number per image, (n,)."""
    budget = _budget(value, name)
    if budget.shape != (len(images),):
        pixels = _broadcast(budget, images, name).flatten(1)
        budget = pixels[:, 0]
        if not bool((pixels == budget.unsqueeze(1)).all()):
            raise InputError(f"{name}: expected one value per image, which is what an l2 ball has, got one per pixel")
    return budget.to(images.dtype)


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
