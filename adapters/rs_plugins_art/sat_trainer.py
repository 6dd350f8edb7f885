"""Adversarial training, smooth if the network is, as an ART trainer with the words of ART's own."""

from typing import Any, NamedTuple

import numpy as np
from art.attacks.evasion.projected_gradient_descent.projected_gradient_descent_numpy import (
    ProjectedGradientDescentCommon,
)
from art.estimators.certification.randomized_smoothing.randomized_smoothing import RandomizedSmoothingMixin
from art.estimators.classification import PyTorchClassifier
from torch import nn

from rs_plugins.core.checks import check_count, check_positive, check_seed
from rs_plugins.core.models import NoisyModule
from rs_plugins.core.training.loop import Scheduler
from rs_plugins.core.training.sat import NormName, Sat
from rs_plugins.errors import InputError
from rs_plugins_art.arrays import Array
from rs_plugins_art.bounds_classifier import BoundsClassifier
from rs_plugins_art.loop_trainer import LoopTrainer, Validation
from rs_plugins_art.neutral import check_host_words, check_neutral, norm_name
from rs_plugins_art.pixel_estimator import PixelEstimator
from rs_plugins_art.plain_gradients import PlainGradients

EPS = 4 / 255  # Xie et al. on ImageNet, in l-infinity
_DEFAULTS: dict[str, Any] = {"norm": "linf", "eps_step": None, "max_iter": 1, "num_random_init": 1}
_OF_ATTACK = ("norm", "eps", "eps_step", "max_iter", "num_random_init")


class AdversarialEpoch(NamedTuple):
    """What is known of a finished pass over the data.

    Attributes:
        number: Its number.
        loss: The mean loss, on attacked images.
        validation_accuracy: Share of the validation images that are classified rightly; None without validation data.
        adversarial_accuracy: Share of them that are still so after 10 steps of a quarter of the radius.
    """

    number: int
    loss: float
    validation_accuracy: float | None = None
    adversarial_accuracy: float | None = None


class SATTrainer(LoopTrainer):
    """Smooth adversarial training (`Sat`; Xie et al. 2020).

    A script for ART's `AdversarialTrainerMadryPGD` runs with it, and one for `AdversarialTrainerTRADESPyTorch` or
    `AdversarialTrainerFBFPyTorch` that gives arguments by name, but for ``beta``. What makes the training smooth is the
    network: give it one with smooth activations, and an optimiser of that network:

        model = smooth_activations(network, "silu", (3, 32, 32)).model
        classifier = PyTorchClassifier(model, loss, (3, 32, 32), 10, optimizer=torch.optim.SGD(model.parameters(), 0.1))

    With ReLU it is adversarial training by PGD. As in the paper, and not in ART, the attack begins at the image itself
    in a part of the batches, and labels are smoothed in the loss. Batch normalisation is in eval mode for the attack
    and in train mode for the update. The network is trained in place, through core's loop, with the classifier's own
    optimiser, whose learning rate is left alone; the classifier's loss is not used. Each call of `fit` or
    `fit_generator` is a training of its own.

    Args:
        classifier: Any `PyTorchClassifier` without preprocessing and without noise, with an optimiser.
        nb_epochs: Passes over the data, if `fit` is not told.
        batch_size: Images per batch, if `fit` is not told.
        eps: Radius of the ball in pixels; 4/255 if not given.
        eps_step: Length of an attack step in pixels; it is at least eps/max_iter, which None stands for.
        max_iter: Number of attack steps; 1 if not given.
        num_random_init: 1, also if not given: the attack begins at a random point of the ball but for ``clean_start``;
            0: it always begins at the image.
        attack: An untargeted `ProjectedGradientDescent` of ART on ``classifier``, which brings the values of the five
            words before and of ``norm``; those that it has when `fit` is called.
        use_amp: False; FBF has the word.
        norm: ``"linf"``, also if not given, or ``"l2"``; or as ART has it, ``np.inf``, ``"inf"`` or 2.
        clean_start: For which share of the batches the attack begins at the image; 0.2 if not given.
        label_smoothing: Which share of each label is spread evenly over all classes.
        parts: Into how many parts a batch is cut, each with a step of the optimiser of its own.
        seed: Seed of starts and order; None: the classifier's own, 0 for one without.

    Attributes:
        history: An `AdversarialEpoch` for each finished pass over the data, of all calls, also of those that ended in
            an error.

    Raises:
        InputError: If an argument has an impossible value, or ART would change images on their way to the model.
    """

    def __init__(
        self,
        classifier: Any,
        nb_epochs: int = 20,
        batch_size: int = 128,
        eps: float | None = None,
        eps_step: float | None = None,
        max_iter: int | None = None,
        num_random_init: int | None = None,
        *,
        attack: Any = None,
        use_amp: bool = False,
        norm: NormName | float | None = None,
        clean_start: float | None = None,
        label_smoothing: float = 0.1,
        parts: int = 1,
        seed: int | None = None,
    ) -> None:
        check_host_words({"use_amp": use_amp}, "SATTrainer", {})
        super().__init__(classifier, _noiseless(classifier, seed), parts)
        self.nb_epochs = check_count(nb_epochs, "nb_epochs", least=0)
        self.batch_size = check_count(batch_size, "batch_size")
        words = zip(_OF_ATTACK, (norm, eps, eps_step, max_iter, num_random_init), strict=True)
        self._given: dict[str, Any] = {name: value for name, value in words if value is not None}
        self._attack, self._clean_start, self._label_smoothing = attack, clean_start, label_smoothing
        _ = self.objective  # which checks them

    @property
    def objective(self) -> Sat:
        """What is minimised: data that say with which settings."""
        given = self._given if self._attack is None else _merged(self._given, self._attack, self._classifier)
        words = _DEFAULTS | given
        norm = norm_name(words["norm"])
        if "eps" not in words and norm == "l2":
            raise InputError("eps: needed in l2, as its default is one of l-infinity; got none")
        if words["eps_step"] is not None and check_positive(words["eps_step"], "eps_step") > 1 and norm == "linf":
            raise InputError(f"eps_step: expected a length in pixels of [0, 1], got {words['eps_step']}; divide by 255")
        return Sat(
            words.get("eps", EPS),
            norm=norm,
            steps=check_count(words["max_iter"], "max_iter"),
            step=words["eps_step"],
            clean_start=_clean_start(self._clean_start, words["num_random_init"]),
            label_smoothing=self._label_smoothing,
        )

    def fit(
        self,
        x: Array,
        y: Array,
        validation_data: tuple[Array, Array] | None = None,
        batch_size: int | None = None,
        nb_epochs: int | None = None,
        scheduler: Scheduler | None = None,
        *,
        first_epoch: int = 0,
        training_mode: bool = True,
        drop_last: bool = False,
        verbose: bool = False,
    ) -> None:
        """Train on ``x``, ``y``.

        Args:
            x: (n, *input), pixels in [0, 1].
            y: Classes in any of ART's forms.
            validation_data: Images and labels by which each epoch is judged.
            batch_size: Images per batch; the trainer's if not given.
            nb_epochs: Passes over the data; the trainer's if not given.
            scheduler: Anything with a method ``step``, called after each epoch.
            first_epoch: The number of the first epoch in the history.
            training_mode: Whether the model is in train mode for the updates (batch normalisation, dropout).
            drop_last: Whether to leave out an incomplete last batch.
            verbose: Whether to show a progress bar.

        Raises:
            InputError: If an argument has an impossible value, or there is no optimiser.
            ModelError: If the loss becomes NaN or infinite, or no gradient flows through the model.
        """
        size = self.batch_size if batch_size is None else batch_size
        self._train(
            lambda **how: self._ours._fit(x, y, batch_size=size, drop_last=drop_last, **how),
            lambda: self.objective,
            validation_data,
            nb_epochs=self.nb_epochs if nb_epochs is None else nb_epochs,
            scheduler=scheduler,
            first_epoch=first_epoch,
            training_mode=training_mode,
            verbose=verbose,
        )

    def fit_generator(
        self,
        generator: Any,
        nb_epochs: int | None = None,
        scheduler: Scheduler | None = None,
        *,
        validation_data: tuple[Array, Array] | None = None,
        first_epoch: int = 0,
        training_mode: bool = True,
        verbose: bool = False,
    ) -> None:
        """Train on the batches of an ART data generator.

        Args:
            generator: An `art.data_generators.DataGenerator`; an epoch ends when it gave ``size`` images.
            nb_epochs: Passes over the data; the trainer's if not given.
            scheduler: Anything with a method ``step``, called after each epoch.
            validation_data: Images and labels by which each epoch is judged.
            first_epoch: The number of the first epoch in the history.
            training_mode: Whether the model is in train mode for the updates.
            verbose: Whether to show a progress bar.

        Raises:
            InputError: As `fit`, or if the generator does not say its size.
            ModelError: As `fit`.
        """
        self._train(
            lambda **how: self._ours._fit_generator(generator, **how),
            lambda: self.objective,
            validation_data,
            nb_epochs=self.nb_epochs if nb_epochs is None else nb_epochs,
            scheduler=scheduler,
            first_epoch=first_epoch,
            training_mode=training_mode,
            verbose=verbose,
        )

    def _refresh(self) -> None:
        check_neutral(self._classifier)
        if self._ours is not self._classifier:
            self._ours.set_params(optimizer=self._classifier.optimizer)

    def _epoch(self, number: int, loss: float, judged: Validation | None) -> AdversarialEpoch:
        if judged is None:
            return AdversarialEpoch(number, loss)
        robust = self._validated(self.objective.validate, judged, self.batch_size)
        return AdversarialEpoch(number, loss, self._accuracy(judged), robust)


class _Trained(PlainGradients):
    """The classifier of ours around a guest's module."""

    def __init__(self, classifier: PyTorchClassifier, seed: int) -> None:
        super().__init__(
            classifier.model,
            classifier.model,
            loss=None,
            nb_classes=classifier.nb_classes,
            optimizer=classifier.optimizer,
            channels_first=classifier.channels_first,
            clip_values=(0, 1),
            device_type=None,
        )
        self.seed = seed
        self.input_shape = classifier.input_shape
        self._check_params()

    @property
    def base_model(self) -> nn.Module:
        """The guest's module."""
        model: nn.Module = self.model
        return model


def _noiseless(classifier: Any, seed: int | None) -> PixelEstimator:
    """Return ``classifier`` if it is a `BoundsClassifier`, else one of ours around its model with its optimiser.

    Raises:
        InputError: If it is no classifier of ART, its ``seed`` is another, it adds noise, or it changes images.
    """
    if not isinstance(classifier, PyTorchClassifier):
        raise InputError(f"classifier: expected a PyTorchClassifier, got {type(classifier).__name__}")
    noisy = any(isinstance(part, NoisyModule) for part in classifier.model.modules())
    if noisy or isinstance(classifier, RandomizedSmoothingMixin):
        got = type(classifier).__name__
        raise InputError(
            f"classifier: expected one without noise, got {got}; train its base model in a PyTorchClassifier and then "
            "smooth it, or train it by SmoothAdvTrainer, also with a smooth activation"
        )
    check_neutral(classifier)
    if not isinstance(classifier, BoundsClassifier):
        return _Trained(classifier, 0 if seed is None else check_seed(seed))
    if seed is not None and seed != classifier.seed:
        raise InputError(f"seed: expected {classifier.seed}, which the classifier brings, got {seed}")
    return classifier


def _merged(given: dict[str, Any], attack: Any, classifier: Any) -> dict[str, Any]:
    """Return ``given`` and the settings of an attack of ART.

    Raises:
        InputError: If the attack is of another kind than the one in `Sat`, or they contradict each other.
    """
    inner = getattr(attack, "_attack", attack)  # ART's class of that name chooses one for the framework
    if not isinstance(inner, ProjectedGradientDescentCommon) or inner.decay is not None:
        raise InputError(f"attack: expected ART's ProjectedGradientDescent or None, got {type(attack).__name__}")
    if attack.estimator is not classifier:
        raise InputError("attack: expected one on the classifier that is trained, got one on another")
    for name in ("targeted", "random_eps"):
        if getattr(attack, name):
            raise InputError(f"attack: expected one with {name}=False, got {name}={getattr(attack, name)}")
    brought = {name: getattr(attack, name) for name in _OF_ATTACK}
    for name in ("eps", "eps_step"):
        if isinstance(brought[name], np.ndarray):
            raise InputError(f"attack: expected one with the same {name} for all images, got an array")
    for name, value in given.items():
        same = norm_name(value) == norm_name(brought[name]) if name == "norm" else value == brought[name]
        if not same:
            raise InputError(f"{name}: expected {brought[name]}, which the attack brings, got {value}")
    return brought


def _clean_start(share: float | None, num_random_init: int) -> float:
    """Return for which share of the batches the attack begins at the images.

    Raises:
        InputError: If there would be several starts, or the two words contradict each other.
    """
    starts = check_count(num_random_init, "num_random_init", least=0)
    if starts > 1:
        raise InputError(f"num_random_init: expected 0 or 1, got {starts}; there is one start for each batch")
    if starts:
        return 0.2 if share is None else share
    if share not in (None, 1):
        raise InputError(f"clean_start: expected None or 1 with num_random_init=0, got {share}")
    return 1.0
