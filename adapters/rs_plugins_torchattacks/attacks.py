"""Attacks on smoothed classifiers for torchattacks."""

from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from rs_plugins.core.attacks.noisy_loss import GradientName, level_of_each
from rs_plugins.core.attacks.norms import L2, LINF, Norm
from rs_plugins.core.attacks.pgd import Rule
from rs_plugins.core.attacks.smoothadv import PUBLISHED, PUBLISHED_DDN, smooth_adv_ddn, smooth_adv_pgd
from rs_plugins.core.checks import check_count, check_flag, check_probability
from rs_plugins.core.objectives import ObjectiveName
from rs_plugins.core.smoothing import NoiseMode, SmoothedModel
from rs_plugins_torchattacks.base import SmoothedAttack
from rs_plugins_torchattacks.settings import check_choice, check_lengths, with_defaults

PGD = TypeVar("PGD", bound="SmoothAdvPGD")
DDN = TypeVar("DDN", bound="SmoothAdvDDN")


class SmoothAdvPGD(SmoothedAttack):
    """SmoothAdv by PGD in the l2 ball (Salman et al. 2019), with the strongest settings that we know.

    Climbs -log((1/m) Σ_i softmax(f(x + δ + e_i))_y), the loss of the smoothed classifier: the log is outside the mean.
    EOTPGD of torchattacks averages cross-entropies instead, which attacks the noisy base classifier. `published` makes
    the attack of the paper: one set of draws for all steps, not antithetic, and projected steps.

    All settings are read at each call, so ``eps`` and others may be assigned between calls. Differences from `PGDRSL2`
    of torchattacks: private noise, so that results can be repeated and do not depend on how images are batched; noisy
    images are never clipped; an image without gradient moves in a random direction.

    Args:
        model: (n, *input) to logits (n, classes), or a `SmoothedModel`, which brings its own sigma and noise family.
        eps: Budget in pixels, a number or a tensor of one per image, (n,) or (n, 1, …, 1).
        alpha: Length of a step in pixels, a number or a tensor of one per image. None: ``eps``, or 2·eps/steps with
            ``rule="projected"``.
        steps: Number of steps, >= 1.
        sigma: Standard deviation of the noise, in pixels. None: that of a `SmoothedModel`, 0.25 for any other model.
        samples: Noise draws per step (the paper's m), shared by all images.
        noise: ``"fresh"``: a new set of draws at each step. ``"fixed"``: one for all steps, as in the paper.
        antithetic: Whether half of the draws are the other half's negatives, so that what is odd in the noise cancels
            out of the gradient.
        rule: ``"dual-averaging"``: go to where the mean of all gradients so far is highest in box and ball, of which
            each step opens another ``alpha``. ``"projected"``: add a step of ``alpha`` and go back into box and ball,
            as in the paper.
        objective: The loss: ``"log-mean-softmax"``, the paper's; ``"mean-cross-entropy"`` or ``"mean-logits"``.
        gradient: ``"backprop"``, or estimated from the probabilities alone, for a model without a gradient and at
            least 2 draws of Gaussian noise: ``"stein"``, the paper's, or ``"centred-stein"``, which is less noisy; an
            even number of antithetic draws is centred anyway.
        random_start: Whether the first run starts uniformly at random in the ball, and not at the image.
        restarts: Number of runs, the later ones from random starts; for each image the strongest result is kept, as
            judged by draws that no step has seen.
        early_stop: Once a vote of draws that no step has seen says that the smoothed classifier is fooled, the image
            stays as it is, which saves passes. This is the probability, at most, that an image stops by mistake. None:
            no image stops early.
        chunk: At most this many noisy images per forward pass; chosen by device and size if not given.
        seed: Seed of the draws, starts and random targets; with None, each call takes one from the operating system.

    Raises:
        InputError: If an argument has an impossible value, or ``sigma`` is not that of the `SmoothedModel`.

    Examples:
        >>> attack = torchattacks.SmoothAdvPGD(model, eps=0.5, steps=20, sigma=0.25)
        >>> adversarial = attack(images, labels)
    """

    eps: float | Tensor
    alpha: float | Tensor | None
    steps: int
    rule: Rule
    random_start: bool
    restarts: int
    early_stop: float | None
    _norm: ClassVar[Norm] = L2

    def __init__(
        self,
        model: nn.Module,
        eps: float | Tensor = 1.0,
        alpha: float | Tensor | None = None,
        steps: int = 10,
        *,
        sigma: float | None = None,
        samples: int = 16,
        noise: NoiseMode = "fresh",
        antithetic: bool = True,
        rule: Rule = "dual-averaging",
        objective: ObjectiveName = "log-mean-softmax",
        gradient: GradientName = "backprop",
        random_start: bool = False,
        restarts: int = 1,
        early_stop: float | None = None,
        chunk: int | None = None,
        seed: int | None = 0,
    ) -> None:
        super().__init__(
            model,
            eps=eps,
            alpha=alpha,
            steps=steps,
            sigma=sigma,
            samples=samples,
            noise=noise,
            antithetic=antithetic,
            rule=rule,
            objective=objective,
            gradient=gradient,
            random_start=random_start,
            restarts=restarts,
            early_stop=early_stop,
            chunk=chunk,
            seed=seed,
        )

    @classmethod
    def published(cls: type[PGD], model: nn.Module, *lengths: Any, **settings: Any) -> PGD:
        """Return the attack with the settings of Salman et al. (2019): fixed noise, projected steps of 2·eps/steps.

        Args:
            model: As for the class.
            lengths: ``eps``, ``alpha`` and ``steps``, as for the class.
            settings: Any of the class's by name; these win over the published ones.
        """
        return cls(model, *lengths, **{**PUBLISHED, **settings})

    def check(self) -> None:
        """Look at the settings, without running the model.

        Raises:
            InputError: If one has an impossible value or does not fit the model.
        """
        super().check()
        check_lengths(self.eps, "eps")
        if self.alpha is not None:
            check_lengths(self.alpha, "alpha")
        check_count(self.steps, "steps")
        check_choice(self.rule, Rule, "rule")
        check_flag(self.random_start, "random_start")
        check_count(self.restarts, "restarts")
        level_of_each(self.steps * self.restarts, self.early_stop, "early_stop")

    def perturb(self, victim: SmoothedModel, images: Tensor, labels: Tensor) -> Tensor:
        """Return the perturbed ``images`` (n, *input), exactly in [0, 1], within ``eps`` up to rounding."""
        return smooth_adv_pgd(
            victim.base,
            images,
            labels,
            norm=self._norm,
            eps=self.eps,
            step=self.alpha,
            steps=self.steps,
            rule=self.rule,
            random_start=self.random_start,
            restarts=self.restarts,
            early_stop=self.early_stop,
            **self.aim(victim),
        )


class SmoothAdvLinfPGD(SmoothAdvPGD):
    """SmoothAdv by PGD in the linf ball (Salman et al. 2019): `SmoothAdvPGD` with another norm and default ``eps``.

    The certificates of Gaussian noise are about l2: an attack within ``eps`` in linf is one within eps·√d in l2.

    Args:
        model: (n, *input) to logits (n, classes), or a `SmoothedModel`, which brings its own sigma and noise family.
        eps: Budget of each pixel, a number or a tensor of one per image, (n,) or (n, 1, …, 1).
        alpha: How far a step moves a pixel, likewise; None: as for `SmoothAdvPGD`, which has the other settings.

    Raises:
        InputError: If an argument has an impossible value, or ``sigma`` is not that of the `SmoothedModel`.

    Examples:
        >>> attack = torchattacks.SmoothAdvLinfPGD(model, eps=8/255, sigma=0.25)
        >>> adversarial = attack(images, labels)
    """

    _norm = LINF
    __init__ = with_defaults(SmoothAdvPGD.__init__, eps=8 / 255)


class SmoothAdvDDN(SmoothedAttack):
    """SmoothAdv by DDN (Rony et al. 2019; Salman et al. 2019): the smallest perturbation that fools, in l2.

    ``attack.success`` says after each call of which images something adversarial was found. That is by the vote of
    the attack's own ``samples`` draws, at the edge of which the search ends: fresh draws need not confirm it unless
    ``confirm`` asks for it, so judge by `rs_plugins.evaluate_attack`. An image for which nothing was found does not
    come back unchanged but where its search ended, perturbed by at most ``max_norm``.

    All settings are read at each call. `published` makes the attack of the paper, which is not antithetic. Differences
    from Salman et al.'s code, there too: box and ``max_norm`` hold for every image that is judged, and what is returned
    is the very image that was judged.

    Args:
        model: (n, *input) to logits (n, classes), or a `SmoothedModel`, which brings its own sigma and noise family.
        steps: Number of steps, >= 1; there is one pass more than steps, which judges the last image.
        gamma: By which share the norm changes at each step, in (0, 1).
        init_norm: l2 norm to begin with, in pixels, > 0, a number or a tensor of one per image, (n,) or (n, 1, …, 1).
        max_norm: No perturbation is longer than this, in pixels, likewise; None: no such bound.
        levels: Pixels are rounded to this many levels at each step, but where that would break ``max_norm``; None:
            never.
        sigma: Standard deviation of the noise, in pixels. None: that of a `SmoothedModel`, 0.25 for any other model.
        samples: Noise draws per step (the paper's m), which also vote. A tie is no success: an odd number asks for the
            smallest majority, an even one for two votes more than half, which fresh draws confirm more often.
        noise: ``"fixed"``: one set of draws for all steps, as in the paper. ``"fresh"``: a new set at each step. The
            luckiest of all steps is then kept, so that without ``confirm`` fewer of the claimed successes hold.
        antithetic: Whether half of the draws are the other half's negatives.
        objective: The loss: ``"log-mean-softmax"``, the paper's; ``"mean-cross-entropy"`` or ``"mean-logits"``.
        gradient: ``"backprop"``, or, as for `SmoothAdvPGD`, ``"stein"`` or ``"centred-stein"``.
        confirm: An image counts as adversarial at a step only if also a vote of draws that no step has seen says so,
            which takes a pass of 100 draws. This is the probability, at most, that `success` is a mistake. The search
            then ends where the smoothed classifier is clearly fooled. None: the step's draws decide alone, as in the
            paper.
        chunk: At most this many noisy images per forward pass; chosen by device and size if not given.
        seed: Seed of the draws and of random targets; with None, each call takes one from the operating system.

    Raises:
        InputError: If an argument has an impossible value, or ``sigma`` is not that of the `SmoothedModel`.

    Examples:
        >>> attack = torchattacks.SmoothAdvDDN(model, steps=50, max_norm=1.0, sigma=0.25)
        >>> adversarial = attack(images, labels)
        >>> adversarial[attack.success]
    """

    steps: int
    gamma: float
    init_norm: float | Tensor
    max_norm: float | Tensor | None
    levels: int | None
    confirm: float | None
    _success: Tensor | None = None

    def __init__(
        self,
        model: nn.Module,
        steps: int = 100,
        gamma: float = 0.05,
        init_norm: float | Tensor = 1.0,
        max_norm: float | Tensor | None = None,
        *,
        levels: int | None = 256,
        sigma: float | None = None,
        samples: int = 16,
        noise: NoiseMode = "fixed",
        antithetic: bool = True,
        objective: ObjectiveName = "log-mean-softmax",
        gradient: GradientName = "backprop",
        confirm: float | None = None,
        chunk: int | None = None,
        seed: int | None = 0,
    ) -> None:
        super().__init__(
            model,
            steps=steps,
            gamma=gamma,
            init_norm=init_norm,
            max_norm=max_norm,
            levels=levels,
            sigma=sigma,
            samples=samples,
            noise=noise,
            antithetic=antithetic,
            objective=objective,
            gradient=gradient,
            confirm=confirm,
            chunk=chunk,
            seed=seed,
        )

    @classmethod
    def published(cls: type[DDN], model: nn.Module, *lengths: Any, **settings: Any) -> DDN:
        """Return the attack with the settings of Salman et al. (2019): fixed noise, not antithetic, not confirmed.

        Args:
            model: As for the class.
            lengths: ``steps``, ``gamma``, ``init_norm`` and ``max_norm``, as for the class.
            settings: Any of the class's by name; these win over the published ones.
        """
        return cls(model, *lengths, **{**PUBLISHED_DDN, **settings})

    @property
    def success(self) -> Tensor | None:
        """Which images of the last call are adversarial by the vote of the attack's draws, (n,); None before it.

        With ``confirm``, by draws that no step has seen too. Also None if the last call raised.
        """
        return self._success

    def check(self) -> None:
        """Look at the settings, without running the model.

        Raises:
            InputError: If one has an impossible value or does not fit the model.
        """
        super().check()
        check_count(self.steps, "steps")
        check_probability(self.gamma, "gamma")
        check_lengths(self.init_norm, "init_norm", positive=True)
        if self.max_norm is not None:
            check_lengths(self.max_norm, "max_norm")
        if self.levels is not None:
            check_count(self.levels, "levels", least=2)
        level_of_each(self.steps + 1, self.confirm, "confirm")

    def forward(self, inputs: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return perturbed images for ``inputs`` (n, *input), pixels in [0, 1], and set `success`.

        The host calls this from `__call__`, which first puts the model into the right mode and undoes normalisation.

        Raises:
            InputError: If an argument has an impossible value.
            ModelError: If the model does not return logits (n, classes), or no gradient flows through it.
        """
        self._success = None
        images = super().forward(inputs, labels)
        if self._success is None:  # there was nothing to perturb
            self._success = torch.zeros(len(images), dtype=torch.bool, device=images.device)
        return images

    def perturb(self, victim: SmoothedModel, images: Tensor, labels: Tensor) -> Tensor:
        """Return the perturbed ``images`` (n, *input), exactly in [0, 1], within ``max_norm`` up to rounding."""
        adversarial, found = smooth_adv_ddn(
            victim.base,
            images,
            labels,
            steps=self.steps,
            gamma=self.gamma,
            init_norm=self.init_norm,
            max_norm=self.max_norm,
            levels=self.levels,
            confirm=self.confirm,
            **self.aim(victim),
        )
        with torch.inference_mode(False):  # the caller may want to change it
            self._success = found.clone()
        return adversarial
