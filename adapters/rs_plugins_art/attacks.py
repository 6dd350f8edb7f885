"""SmoothAdv (Salman et al. 2019) as ART evasion attacks: PGD in an l2 or linf ball, and DDN."""

from collections.abc import Callable
from types import FunctionType
from typing import Any, ClassVar, TypeVar, get_args

import numpy as np
from art.summary_writer import SummaryWriter
from torch import Tensor

from rs_plugins.core.attacks.noisy_loss import GradientName, level_of_each
from rs_plugins.core.attacks.norms import L2, LINF, Norm
from rs_plugins.core.attacks.pgd import Rule
from rs_plugins.core.attacks.smoothadv import PUBLISHED, PUBLISHED_DDN, smooth_adv_ddn, smooth_adv_pgd
from rs_plugins.core.checks import check_count, check_flag, check_probability
from rs_plugins.core.objectives import Logits, ObjectiveName
from rs_plugins.core.smoothing import NoiseMode
from rs_plugins.errors import InputError
from rs_plugins_art.attack_base import SmoothedEvasion, budget, by_image

PGD = TypeVar("PGD", bound="SmoothAdvPGD")
DDN = TypeVar("DDN", bound="SmoothAdvDDN")


class SmoothAdvPGD(SmoothedEvasion):
    """Ascent on -log mean softmax under noise in an l2 or linf ball: SmoothAdv_PGD of Salman et al. (2019).

    The defaults are the strongest that we know for a number of passes; `published` has those of the paper. Noise goes
    on in pixels and is never added twice: of ART's own smoothed classifiers the base model is attacked, at their scale.

    Args:
        estimator: A `SmoothedClassifier`; ART's `PyTorchRandomizedSmoothing` or one derived from it; any
            `PyTorchClassifier`, with ``sigma``; each without preprocessing. With a ``gradient`` by Stein's identity
            also a `SmoothedBlackBox`, whose scores are taken for logits.
        classifier: Another name for ``estimator``.
        norm: 2 or infinity, ``np.inf`` or ``"inf"``.
        eps: Budget in pixels: a number, or an array with one value per image, (n,) or broadcastable to the images.
        eps_step: Length of a step in pixels, in the same forms. None: ``eps`` with dual averaging, where a step says
            how much more of the ball opens; 2·eps/max_iter with ``rule="projected"``, as in the paper.
        max_iter: Number of steps.
        targeted: Whether ``y`` are targets to reach, instead of labels to get away from.
        num_random_init: 0: the attack starts at the image. Else the number of runs from random points of the ball; of
            each image the result of greatest loss is kept, judged by draws that no step has seen.
        batch_size: Images attacked at once; changes no result.
        minimal: Whether to look for the smallest perturbation within ``eps`` instead, by DDN; for norm 2 only.
            `success` then says of which images one was found; of the others the image comes back where the search
            ended, perturbed by at most ``eps``. What is smallest for the draws that the attack used lies at their
            boundary, where other draws, also those of `predict`, say as often that nothing has changed; with
            fresh draws the luckiest of all steps is kept, so that it is more often. More ``samples`` make that less
            so, and `SmoothAdvDDN` has ``confirm`` against it. The search has steps of its own: ``eps_step`` and
            ``rule`` do nothing in it, and ``num_random_init`` and ``early_stop`` are refused.
        sigma: Standard deviation of the noise, in pixels; needed unless the estimator is smoothed, whose own counts.
        samples: Noise draws per step, shared by all images (the paper's m).
        noise: ``"fresh"``: a new set of draws at each step. ``"fixed"``: one set for all steps, as in the paper.
        antithetic: Whether half of the draws are the other half's negatives.
        rule: ``"dual-averaging"`` or, as in the paper, ``"projected"``.
        objective: ``"log-mean-softmax"``, the paper's; ``"mean-cross-entropy"`` or ``"mean-logits"``.
        gradient: ``"backprop"``; or for models without a gradient ``"stein"``, the paper's, or ``"centred-stein"``,
            which is less noisy.
        early_stop: The probability, at most, that an image stops by mistake, once a vote says that the smoothed
            classifier is wrong about it; that saves passes. None: none stops early.
        chunk: At most this many noisy images per forward pass; chosen by device and size if not given.
        seed: Seed of draws and starts; with None, each call takes one from the operating system.
        verbose: Whether to show a progress bar.
        summary_writer: As for ART's own attacks.

    Raises:
        InputError: If an argument has an impossible value, or ART would change images on their way to the model.
        EstimatorError: If the estimator is none of those.
    """

    attack_params = [  # noqa: RUF012  a plain list is what the host reads
        *("norm", "eps", "eps_step", "num_random_init", "rule", "early_stop"),
        *SmoothedEvasion.attack_params,
    ]
    norms: ClassVar[tuple[Norm, ...]] = (L2, LINF)

    norm: Any
    eps: Any
    eps_step: Any
    num_random_init: int
    rule: Rule
    early_stop: float | None

    def __init__(
        self,
        estimator: Any = None,
        *,
        classifier: Any = None,
        norm: Any = 2,
        eps: Any = 1.0,
        eps_step: Any = None,
        max_iter: int = 10,
        targeted: bool = False,
        num_random_init: int = 0,
        batch_size: int = 32,
        minimal: bool = False,
        sigma: float | None = None,
        samples: int = 16,
        noise: NoiseMode = "fresh",
        antithetic: bool = True,
        rule: Rule = "dual-averaging",
        objective: ObjectiveName = "log-mean-softmax",
        gradient: GradientName = "backprop",
        early_stop: float | None = None,
        chunk: int | None = None,
        seed: int | None = 0,
        verbose: bool = False,
        summary_writer: str | bool | SummaryWriter = False,
    ) -> None:
        super().__init__(
            estimator,
            classifier,
            summary_writer,
            norm=norm,
            eps=eps,
            eps_step=eps_step,
            max_iter=max_iter,
            targeted=targeted,
            num_random_init=num_random_init,
            batch_size=batch_size,
            minimal=minimal,
            sigma=sigma,
            samples=samples,
            noise=noise,
            antithetic=antithetic,
            rule=rule,
            objective=objective,
            gradient=gradient,
            early_stop=early_stop,
            chunk=chunk,
            seed=seed,
            verbose=verbose,
        )

    @classmethod
    def published(cls: type[PGD], estimator: Any = None, **settings: Any) -> PGD:
        """Return the attack with the settings of Salman et al. (2019), but for those in ``settings``."""
        return cls(estimator, **{**PUBLISHED, **settings})

    def _budgets(self, images: Tensor) -> dict[str, Tensor | None]:
        eps = by_image(self.eps, images, "eps")
        if self.minimal:
            return {"max_norm": eps}
        return {"eps": eps, "step": None if self.eps_step is None else by_image(self.eps_step, images, "eps_step")}

    def _perturb(
        self, logits: Logits, images: Tensor, labels: Tensor, sigma: float, **how: Any
    ) -> tuple[Tensor, Tensor | None]:
        if self.minimal:
            return smooth_adv_ddn(logits, images, labels, sigma, levels=None, **how)
        adversarial = smooth_adv_pgd(
            logits,
            images,
            labels,
            sigma,
            norm=self._ball(),
            rule=self.rule,
            random_start=self.num_random_init > 0,
            restarts=max(1, self.num_random_init),
            early_stop=self.early_stop,
            **how,
        )
        return adversarial, None

    def _ball(self) -> Norm:
        """Return the norm of the budget.

        Raises:
            InputError: If ``norm`` is none that this attack knows.
        """
        try:
            found = {2.0: L2, np.inf: LINF}.get(float(self.norm))
        except (TypeError, ValueError):
            found = None
        if found not in self.norms:
            known = " or ".join({L2: "2", LINF: "inf"}[norm] for norm in self.norms)
            raise InputError(f"norm: expected {known}, got {self.norm!r}")
        return found

    def _check_params(self) -> None:
        super()._check_params()
        self.norm = 2 if self._ball() is L2 else np.inf
        self.num_random_init = check_count(self.num_random_init, "num_random_init", least=0)
        budget(self.eps, "eps")
        if self.eps_step is not None:
            budget(self.eps_step, "eps_step")
        if self.rule not in get_args(Rule):
            raise InputError(f"rule: expected one of {', '.join(map(repr, get_args(Rule)))}, got {self.rule!r}")
        level_of_each(self.max_iter * max(1, self.num_random_init), self.early_stop, "early_stop")
        if check_flag(self.minimal, "minimal"):
            self._check_minimal()

    def _check_minimal(self) -> None:
        """Check that a smallest perturbation can be looked for with these settings."""
        if self.norm != 2:
            raise InputError(f"minimal: expected False for norm={self.norm!r}; smallest perturbations are l2 ones")
        for name, none in (("num_random_init", 0), ("early_stop", None)):
            if getattr(self, name) != none:
                got = getattr(self, name)
                raise InputError(f"{name}: expected {none} with minimal=True, whose search does not use it, got {got}")


def _with_defaults(init: Any, **defaults: Any) -> Callable[..., None]:
    """Return a constructor like ``init`` with other defaults, which its signature shows."""
    made = FunctionType(init.__code__, init.__globals__, init.__name__, init.__defaults__, init.__closure__)
    made.__kwdefaults__ = {**init.__kwdefaults__, **defaults}
    made.__annotations__ = init.__annotations__
    made.__qualname__ = init.__qualname__
    return made


class SmoothAdvLinfPGD(SmoothAdvPGD):
    """SmoothAdv by PGD in an linf ball: `SmoothAdvPGD` with ``norm=np.inf`` and by default ``eps=8/255``.

    Args and errors are those of `SmoothAdvPGD`.
    """

    norms: ClassVar[tuple[Norm, ...]] = (LINF,)
    __init__ = _with_defaults(SmoothAdvPGD.__init__, norm=np.inf, eps=8 / 255)


class SmoothAdvDDN(SmoothedEvasion):
    """The smallest l2 perturbation found by DDN against a smoothed classifier (Salman et al. 2019, Rony et al. 2019).

    After `generate`, `success` says of which images the draws that the attack used saw an adversarial one; fresh draws
    need not confirm it unless ``confirm`` asks for it. Of these the nearest that was seen comes back, the very image
    that was judged; ``x`` itself if it is adversarial. Of the others the image comes back where the search ended,
    perturbed by at most ``eps``: not the unchanged image, which would look like a perturbation of length 0. `published`
    makes the attack of the paper, which is not antithetic.

    Args:
        estimator: As for `SmoothAdvPGD`.
        classifier: Another name for ``estimator``.
        eps: No perturbation is longer than this l2 norm, in pixels (core's and the paper's ``max_norm``): a number, or
            an array with one value per image, (n,) or broadcastable to the images. None: no such bound.
        max_iter: Number of steps; there is one pass more, which judges the last image.
        gamma: By which share the norm of the perturbation changes at each step, in (0, 1).
        init_norm: The norm to begin with, in pixels, > 0, in the forms of ``eps``.
        levels: Pixels are rounded to this many levels, but where that would break ``eps``; None: never.
        targeted: Whether ``y`` are targets to reach, instead of labels to get away from.
        batch_size: Images attacked at once; changes no result.
        minimal: True, which this attack always is; some of ART's metrics set it.
        sigma: As for `SmoothAdvPGD`.
        samples: Noise draws per step (the paper's m), which also vote; an odd number avoids ties.
        noise: ``"fixed"``: one set of draws for all steps, as in the paper. ``"fresh"``: a new set at each step. The
            luckiest of all steps is then kept, so that without ``confirm`` fewer of the claimed successes hold.
        antithetic: As for `SmoothAdvPGD`.
        objective: As for `SmoothAdvPGD`.
        gradient: As for `SmoothAdvPGD`.
        confirm: An image counts as adversarial at a step only if also a vote of draws that no step has seen says so,
            which takes a pass of 100 draws. This is the probability, at most, that `success` is a mistake. The search
            then ends where the smoothed classifier is clearly fooled. None: the step's draws decide alone, as in the
            paper.
        chunk: At most this many noisy images per forward pass; chosen by device and size if not given.
        seed: Seed of the draws; with None, each call takes one from the operating system.
        verbose: Whether to show a progress bar.
        summary_writer: As for ART's own attacks.

    Raises:
        InputError: If an argument has an impossible value, or ART would change images on their way to the model.
        EstimatorError: If the estimator is none of those.
    """

    attack_params = [  # noqa: RUF012  a plain list is what the host reads
        *("eps", "gamma", "init_norm", "levels", "confirm"),
        *SmoothedEvasion.attack_params,
    ]

    eps: Any
    gamma: float
    init_norm: Any
    levels: int | None
    confirm: float | None

    def __init__(
        self,
        estimator: Any = None,
        *,
        classifier: Any = None,
        eps: Any = None,
        max_iter: int = 100,
        gamma: float = 0.05,
        init_norm: Any = 1.0,
        levels: int | None = 256,
        targeted: bool = False,
        batch_size: int = 32,
        minimal: bool = True,
        sigma: float | None = None,
        samples: int = 16,
        noise: NoiseMode = "fixed",
        antithetic: bool = True,
        objective: ObjectiveName = "log-mean-softmax",
        gradient: GradientName = "backprop",
        confirm: float | None = None,
        chunk: int | None = None,
        seed: int | None = 0,
        verbose: bool = False,
        summary_writer: str | bool | SummaryWriter = False,
    ) -> None:
        super().__init__(
            estimator,
            classifier,
            summary_writer,
            eps=eps,
            max_iter=max_iter,
            gamma=gamma,
            init_norm=init_norm,
            levels=levels,
            targeted=targeted,
            batch_size=batch_size,
            minimal=minimal,
            sigma=sigma,
            samples=samples,
            noise=noise,
            antithetic=antithetic,
            objective=objective,
            gradient=gradient,
            confirm=confirm,
            chunk=chunk,
            seed=seed,
            verbose=verbose,
        )

    @classmethod
    def published(cls: type[DDN], estimator: Any = None, **settings: Any) -> DDN:
        """Return the attack with the settings of Salman et al. (2019), but for those in ``settings``."""
        return cls(estimator, **{**PUBLISHED_DDN, **settings})

    def _budgets(self, images: Tensor) -> dict[str, Tensor | None]:
        limit = None if self.eps is None else by_image(self.eps, images, "eps")
        return {"max_norm": limit, "init_norm": by_image(self.init_norm, images, "init_norm")}

    def _perturb(
        self, logits: Logits, images: Tensor, labels: Tensor, sigma: float, **how: Any
    ) -> tuple[Tensor, Tensor | None]:
        return smooth_adv_ddn(
            logits, images, labels, sigma, gamma=self.gamma, levels=self.levels, confirm=self.confirm, **how
        )

    def _check_params(self) -> None:
        super()._check_params()
        if self.eps is not None:
            budget(self.eps, "eps")
        if not bool((budget(self.init_norm, "init_norm") > 0).all()):
            raise InputError(f"init_norm: expected finite values > 0, got {self.init_norm}")
        check_probability(self.gamma, "gamma")
        if self.levels is not None:
            self.levels = check_count(self.levels, "levels", least=2)
        level_of_each(self.max_iter + 1, self.confirm, "confirm")
        if not check_flag(self.minimal, "minimal"):
            raise InputError("minimal: expected True, which DDN always is, got False")
