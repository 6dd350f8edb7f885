"""What every smoothed estimator shares: the settings of its noise, certificates, hard votes."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rs_plugins.core.certification import Certificates, certify, majority
from rs_plugins.core.checks import check_count, check_positive, check_probability, check_seed
from rs_plugins.core.chunks import default_chunk
from rs_plugins.core.confidence import majority_p_value
from rs_plugins.core.decisions import Decider, probes, warn_invalid
from rs_plugins.core.models import evaluating
from rs_plugins.core.noise import Family, make_noise
from rs_plugins.core.plans.fixed_budget import FixedBudget
from rs_plugins.core.plans.protocol import ABSTAIN, Plan
from rs_plugins.core.procedures import Counts
from rs_plugins.core.streams import fresh_seed, stream
from rs_plugins.core.votes import Poll
from rs_plugins.errors import InputError
from rs_plugins_art.arrays import Array


def of_module(name: str, check: Callable[[Any], Any], doc: str) -> Any:
    """Return a property that reads and, after ``check``, writes the attribute ``name`` of the smoothed module."""

    def read(self: "Certifying") -> Any:
        return getattr(self.model, name)

    def write(self: "Certifying", value: Any) -> None:
        setattr(self.model, name, check(value))

    return property(read, write, doc=doc)


class Certifying:
    """Certificates and hard votes of an estimator whose ``model`` is a `SmoothedModel`.

    It has besides a method ``_exact_images``, which checks a batch, ``nb_classes``, ``_nb_classes``, None if not known
    yet, and ``_device``.
    """

    model: Any
    nb_classes: Any
    _nb_classes: Any
    _device: Any
    _exact_images: Callable[[object], Tensor]

    sigma = of_module(
        "sigma", lambda value: check_positive(value, "sigma"), "Standard deviation of the noise, in pixels."
    )
    samples = of_module("samples", lambda value: check_count(value, "samples"), "Noise draws of `predict`.")
    seed = of_module("seed", lambda value: fresh_seed() if value is None else check_seed(value), "Seed of the draws.")
    chunk = of_module(
        "chunk",
        lambda value: None if value is None else check_count(value, "chunk"),
        "At most this many noisy images per forward pass; None: chosen by device and size.",
    )

    @property
    def alpha(self) -> float:
        """Failure probability of a certificate."""
        return self._alpha

    @alpha.setter
    def alpha(self, alpha: float) -> None:
        self._alpha = check_probability(alpha, "alpha")

    @property
    def base_model(self) -> nn.Module:
        """The base classifier, without noise."""
        base: nn.Module = self.model.base
        return base

    @property
    def family(self) -> Family:
        """The noise family."""
        family: Family = self.model.family
        return family

    def certify(
        self,
        x: Array,
        n: int | None = None,
        batch_size: int = 32,
        *,
        plan: Plan | None = None,
        n0: int | None = None,
        alpha: float | None = None,
        seed: int | None = None,
        indices: Sequence[int] | None = None,
        verbose: bool = False,
    ) -> tuple[Array, Array]:
        """Return the certified classes (n,), int64, -1 for abstention, and radii (n,), float64, in pixels.

        Args:
            x: (n, *input), pixels in [0, 1].
            n: Votes per image that bound the probability of its class.
            batch_size: Taken for ART's sake; ``chunk`` says how many noisy images go through at once. Neither changes
                a result.
            plan: How many votes to spend, instead of ``n``, ``n0`` and ``alpha``, which a plan has of its own.
            n0: Votes per image that select the class; 100 if not given.
            alpha: Failure probability of each certificate; the classifier's if not given.
            seed: Seed of the votes; the classifier's if not given.
            indices: Position of each image in its data set, on which its noise depends; 0, 1, … by default.
            verbose: Whether to show a progress bar.

        Raises:
            InputError: If an argument has an impossible value, or both a plan and what it decides are given.
            ModelError: If the model does not return logits (n, classes).
        """
        check_count(batch_size, "batch_size")
        records = self.certificates(x, n, plan=plan, n0=n0, alpha=alpha, seed=seed, indices=indices, verbose=verbose)
        pairs = [(record.prediction, record.radius) for record in records]
        return np.array([p for p, _ in pairs], dtype=np.int64), np.array([r for _, r in pairs], dtype=np.float64)

    def certificates(
        self,
        x: Any,
        n: int | None = None,
        *,
        plan: Plan | None = None,
        n0: int | None = None,
        alpha: float | None = None,
        seed: int | None = None,
        indices: Sequence[int] | None = None,
        verbose: bool = False,
    ) -> Certificates:
        """Certify like `certify`, and yield the full record of each image as soon as it is ready.

        Checks are made at once, the work while the result is consumed.
        """
        chosen = _plan(plan, n, n0, alpha, self.alpha)
        images = self._exact_images(x)
        voting = self._voting(seed, indices)
        return certify(self.base_model, images, self.sigma, plan=chosen, progress=verbose, **voting)

    def votes(
        self,
        x: Any,
        n: int,
        *,
        alpha: float | None = None,
        seed: int | None = None,
        indices: Sequence[int] | None = None,
    ) -> tuple[Counts, Array]:
        """Return ``n`` hard votes per image, (images, classes), and where PREDICT abstains on them, (images,).

        They are drawn afresh for each image, not the draws of `predict`: with a seed that the attack did not know, they
        are what to judge an attack by.

        Args:
            x: (images, *input), pixels in [0, 1].
            n: Votes per image.
            alpha: Level of the test between the two leading classes; the classifier's if not given.
            seed: Seed of the votes; the classifier's if not given.
            indices: Position of each image in its data set; 0, 1, … by default.
        """
        level = check_probability(self.alpha if alpha is None else alpha, "alpha")
        images = self._exact_images(x)
        counts = Poll(self.base_model, images, self.sigma, **self._voting(seed, indices)).votes(n)
        return counts, majority(counts, level) == ABSTAIN

    def _voting(self, seed: int | None, indices: Sequence[int] | None) -> dict[str, Any]:
        """Return what `certify` and `Poll` of core are told about the votes."""
        return {
            "family": self.family,
            "seed": self.seed if seed is None else seed,
            "indices": indices,
            "classes": self._nb_classes,
            "chunk": self.chunk,
            "device": self._device,
        }

    def _hard_rows(self, images: Tensor) -> Array:
        """Return ART's rows for hard votes: one-hot, or zeros for abstention, (n, classes) float64."""
        if majority_p_value(self.samples, 0) > self.alpha:
            raise InputError(
                f"samples: {self.samples} are too few to predict at alpha = {self.alpha}: every row would abstain, "
                "even if all votes agree"
            )
        answers = majority(self._fixed_votes(images), self.alpha)
        rows = np.zeros((len(images), self.nb_classes))
        rows[answers != ABSTAIN, answers[answers != ABSTAIN]] = 1
        return rows

    def _fixed_votes(self, images: Tensor) -> Counts:
        """Return the hard votes (n, classes) under the draws of `predict`; NaN logits are votes for no class."""
        device, classes = self._device, self.nb_classes
        draws = self.model.fixed_draws(images[:1].to(device))
        chunk = self.chunk or default_chunk(draws[0], device)
        counts = np.zeros((len(images), classes + 1), dtype=np.int64)
        if not len(images):
            return counts[:, :-1]
        source = stream(self.seed, "rounding", device=device)
        decide = self._decider(probes(images.shape[1:], make_noise(self.family, self.sigma), source, draws.dtype))
        with evaluating(self.model), torch.no_grad():
            for row, image in enumerate(images):
                for part in draws.split(chunk):
                    winners = decide(image.to(device) + part)
                    counts[row] += winners.bincount(minlength=classes + 1).cpu().numpy()
                warn_invalid(row, int(counts[row, -1]))
        return counts[:, :-1]

    def _decider(self, copies: Tensor) -> Decider:
        return Decider.measured(self.base_model, copies, self.nb_classes)


def _plan(plan: Plan | None, n: int | None, n0: int | None, alpha: float | None, default_alpha: float) -> Plan:
    given = [name for name, value in (("n", n), ("n0", n0), ("alpha", alpha)) if value is not None]
    if plan is not None and given:
        raise InputError(
            f"plan: expected a plan or {' and '.join(given)}, got both; a plan has its own votes and alpha"
        )
    if plan is not None:
        return plan
    if n is None:
        raise InputError("n: expected the number of votes per image, or a plan such as plan=FixedBudget(n=10_000)")
    return FixedBudget(n0=100 if n0 is None else n0, n=n, alpha=default_alpha if alpha is None else alpha)
