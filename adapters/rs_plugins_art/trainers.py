"""Training methods of smoothed classifiers as ART trainers."""

from typing import Any, Literal

from rs_plugins.core.checks import check_count, check_positive
from rs_plugins.core.training.consistency import Form
from rs_plugins.core.training.inner_attacks import DDN, PGD, Attack
from rs_plugins.errors import InputError
from rs_plugins_art.trainer_base import SmoothedTrainer


class GaussianTrainer(SmoothedTrainer):
    """Cross-entropy on noisy copies: (1/m) Σ_i CE(f(x + e_i), y) (Cohen et al. 2019).

    Args:
        classifier: A `SmoothedClassifier`; ART's `PyTorchRandomizedSmoothing` or one derived from it; any
            `PyTorchClassifier`, with ``sigma``; each without preprocessing and with an optimiser.
        sigma: Standard deviation of the noise, in pixels; needed unless the classifier is smoothed, whose own counts.
        samples: Noise draws per image and step (m).
        parts: Into how many parts a batch is cut, each with a step of the optimiser of its own.
        seed: Seed of noise and order; None: the classifier's own, 0 for one without.

    Raises:
        InputError: If an argument has an impossible value, or ART would change images on their way to the model.
    """

    method = "gaussian"

    def __init__(
        self,
        classifier: Any,
        *,
        sigma: float | None = None,
        samples: int = 1,
        parts: int = 1,
        seed: int | None = None,
    ) -> None:
        super().__init__(classifier, sigma=sigma, parts=parts, seed=seed, samples=samples)


class StabilityTrainer(SmoothedTrainer):
    """Stability training: CE(f(x), y) - lam · Σ_c F_c(x) log F_c(x + e) (Li et al. 2019).

    Two other losses go by that name; `SmoothedClassifier.fit` has them as ``method="stability-rs4a"`` and
    ``"stability-confseq"``.

    Args:
        classifier: A `SmoothedClassifier`; ART's `PyTorchRandomizedSmoothing` or one derived from it; any
            `PyTorchClassifier`, with ``sigma``; each without preprocessing and with an optimiser.
        sigma: Standard deviation of the noise, in pixels; needed unless the classifier is smoothed, whose own counts.
        lam: Weight of the second term.
        samples: Noise draws per image and step, over which the second term is averaged.
        parts: Into how many parts a batch is cut, each with a step of the optimiser of its own.
        seed: Seed of noise and order; None: the classifier's own, 0 for one without.

    Raises:
        InputError: If an argument has an impossible value, or ART would change images on their way to the model.
    """

    method = "stability"

    def __init__(
        self,
        classifier: Any,
        *,
        sigma: float | None = None,
        lam: float = 2.0,
        samples: int = 1,
        parts: int = 1,
        seed: int | None = None,
    ) -> None:
        super().__init__(classifier, sigma=sigma, parts=parts, seed=seed, lam=lam, samples=samples)


class SmoothAdvTrainer(SmoothedTrainer):
    """Adversarial training of the smoothed classifier (Salman et al. 2019).

    Images are attacked under the very noise on which the model is then trained, as in the paper; ART's
    `AdversarialTrainer` with a SmoothAdv attack adds other noise to the attacked images.

    Args:
        classifier: A `SmoothedClassifier`; ART's `PyTorchRandomizedSmoothing` or one derived from it; any
            `PyTorchClassifier`, with ``sigma``; each without preprocessing and with an optimiser.
        sigma: Standard deviation of the noise, in pixels; needed unless the classifier is smoothed, whose own counts.
        attack: ``"pgd"`` or ``"ddn"``; or one from `rs_plugins.core.training.inner_attacks`, which brings its own
            budget and steps.
        eps: l2 budget in pixels.
        eps_step: Length of a step of PGD in pixels; None: 2·eps/max_iter.
        max_iter: Number of steps.
        samples: Noise draws per image and step (m).
        multi_noise: Whether the loss is on all m copies; else on the first one alone, while the attack uses all.
        warmup: In epoch t, from 0, the attack has min(1, (t + 1)/warmup) of its budget; 1: all of it at once.
        parts: Into how many parts a batch is cut, each with a step of the optimiser of its own; ``samples`` in the
            paper.
        seed: Seed of noise and order; None: the classifier's own, 0 for one without.

    Raises:
        InputError: If an argument has an impossible value, or ART would change images on their way to the model.
    """

    method = "smoothadv"

    def __init__(
        self,
        classifier: Any,
        *,
        sigma: float | None = None,
        attack: Literal["pgd", "ddn"] | Attack = "pgd",
        eps: float = 1.0,
        eps_step: float | None = None,
        max_iter: int = 10,
        samples: int = 4,
        multi_noise: bool = True,
        warmup: int = 10,
        parts: int = 1,
        seed: int | None = None,
    ) -> None:
        super().__init__(
            classifier,
            sigma=sigma,
            parts=parts,
            seed=seed,
            attack=_inner_attack(attack, eps=eps, eps_step=eps_step, max_iter=max_iter),
            samples=samples,
            multi_noise=multi_noise,
            warmup=warmup,
        )


class SmoothMixTrainer(SmoothedTrainer):
    """Training on mixtures of images with where an unrestricted attack ends (Jeong et al. 2021).

    Args:
        classifier: A `SmoothedClassifier`; ART's `PyTorchRandomizedSmoothing` or one derived from it; any
            `PyTorchClassifier`, with ``sigma``; each without preprocessing and with an optimiser.
        sigma: Standard deviation of the noise, in pixels; needed unless the classifier is smoothed, whose own counts.
        eps_step: Length of an attack step, in pixels (the paper's alpha).
        max_iter: Number of attack steps (T).
        mix_step: The clean side of a mixture is the image after this many steps: 0: the image itself, 1: the "one-step
            adversary".
        max_norm: Radius of a ball for the attack, in pixels; None: no ball.
        max_norm_s: The radius around the image in which the clean side must lie, in pixels, once warm-up is over; None:
            eps_step · mix_step.
        w_mix: Weight of the loss of mixtures (the paper's eta).
        warmup: Epochs over which that weight rises to ``w_mix``; 1: at once.
        samples: Noise draws per image and step (m).
        parts: Into how many parts a batch is cut, each with a step of the optimiser of its own; ``samples`` in the
            paper.
        seed: Seed of noise, mixtures and order; None: the classifier's own, 0 for one without.

    Raises:
        InputError: If an argument has an impossible value, or ART would change images on their way to the model.
    """

    method = "smoothmix"

    def __init__(
        self,
        classifier: Any,
        *,
        sigma: float | None = None,
        eps_step: float = 1.0,
        max_iter: int = 8,
        mix_step: int = 0,
        max_norm: float | None = None,
        max_norm_s: float | None = None,
        w_mix: float = 1.0,
        warmup: int = 10,
        samples: int = 4,
        parts: int = 1,
        seed: int | None = None,
    ) -> None:
        super().__init__(
            classifier,
            sigma=sigma,
            parts=parts,
            seed=seed,
            step=check_positive(eps_step, "eps_step"),
            steps=check_count(max_iter, "max_iter"),
            mix_step=mix_step,
            max_norm=max_norm,
            max_norm_s=max_norm_s,
            w_mix=w_mix,
            warmup=warmup,
            samples=samples,
        )


class ConsistencyTrainer(SmoothedTrainer):
    """Consistency of the predictions under noise as a regularisation (Jeong and Shin 2020).

    Args:
        classifier: A `SmoothedClassifier`; ART's `PyTorchRandomizedSmoothing` or one derived from it; any
            `PyTorchClassifier`, with ``sigma``; each without preprocessing and with an optimiser.
        sigma: Standard deviation of the noise, in pixels; needed unless the classifier is smoothed, whose own counts.
        lam: Weight of the regularisation.
        w_ent: Weight of the entropy (the paper's eta), 0.5 if None; for ``form="default"`` only.
        form: ``"default"``, ``"xent"``, ``"kl"`` or ``"mse"``, see `rs_plugins.core.training.consistency.Consistency`.
        samples: Noise draws per image and step (m), at least 2.
        attack: Perturbs the images first, one from `rs_plugins.core.training.inner_attacks`; None: no attack.
        warmup: In epoch t, from 0, the attack has min(1, (t + 1)/warmup) of its budget.
        parts: Into how many parts a batch is cut, each with a step of the optimiser of its own; ``samples`` in the
            paper.
        seed: Seed of noise and order; None: the classifier's own, 0 for one without.

    Raises:
        InputError: If an argument has an impossible value, or ART would change images on their way to the model.
    """

    method = "consistency"

    def __init__(
        self,
        classifier: Any,
        *,
        sigma: float | None = None,
        lam: float = 10.0,
        w_ent: float | None = None,
        form: Form = "default",
        samples: int = 2,
        attack: Attack | None = None,
        warmup: int = 10,
        parts: int = 1,
        seed: int | None = None,
    ) -> None:
        super().__init__(
            classifier,
            sigma=sigma,
            parts=parts,
            seed=seed,
            lam=lam,
            w_ent=w_ent,
            form=form,
            samples=samples,
            attack=attack,
            warmup=warmup,
        )


class MacerTrainer(SmoothedTrainer):
    """MACER: the certified radius is maximised, without an attack (Zhai et al. 2020).

    Args:
        classifier: A `SmoothedClassifier`; ART's `PyTorchRandomizedSmoothing` or one derived from it; any
            `PyTorchClassifier`, with ``sigma``; each without preprocessing and with an optimiser.
        sigma: Standard deviation of the noise, in pixels; needed unless the classifier is smoothed, whose own counts.
        lam: Weight of the robustness term.
        margin: Where its hinge ends (the paper's gamma).
        inv_temp: Inverse temperature of the softmax in it (the paper's beta).
        deferred: There is no robustness term up to and with this epoch, counted from 0; None: it is there from the
            beginning.
        samples: Noise draws per image and step (m).
        parts: Into how many parts a batch is cut, each with a step of the optimiser of its own.
        seed: Seed of noise and order; None: the classifier's own, 0 for one without.

    Raises:
        InputError: If an argument has an impossible value, or ART would change images on their way to the model.
    """

    method = "macer"

    def __init__(
        self,
        classifier: Any,
        *,
        sigma: float | None = None,
        lam: float = 16.0,
        margin: float = 8.0,
        inv_temp: float = 16.0,
        deferred: int | None = None,
        samples: int = 16,
        parts: int = 1,
        seed: int | None = None,
    ) -> None:
        super().__init__(
            classifier,
            sigma=sigma,
            parts=parts,
            seed=seed,
            lam=lam,
            margin=margin,
            inv_temp=inv_temp,
            deferred=deferred,
            samples=samples,
        )


def _inner_attack(attack: str | Attack, *, eps: float, eps_step: float | None, max_iter: int) -> Attack:
    """Return the inner attack that the host's words describe.

    Raises:
        InputError: If a value is impossible, or would have no effect.
    """
    if not isinstance(attack, str):
        if (eps, eps_step, max_iter) != (1.0, None, 10):
            raise InputError(f"attack: expected 'pgd' or 'ddn' with eps, eps_step or max_iter, got {attack!r}")
        return attack
    if eps_step is not None:
        check_positive(eps_step, "eps_step")
    check_count(max_iter, "max_iter")
    if attack == "pgd":
        return PGD(eps=eps, steps=max_iter, step=eps_step)
    if attack != "ddn":
        raise InputError(f"attack: expected 'pgd', 'ddn' or an inner attack, got {attack!r}")
    if eps_step is not None:
        raise InputError(f"eps_step: expected None with attack='ddn', which chooses its own, got {eps_step}")
    return DDN(eps=eps, steps=max_iter)
