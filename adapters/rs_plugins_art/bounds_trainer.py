"""Certified training with relaxations as an ART trainer, with the words of ART's trainer for interval bounds."""

from dataclasses import fields
from typing import Any, NamedTuple, get_args

import numpy as np
from art.estimators.classification import PyTorchClassifier

from rs_plugins.core.checks import check_count, check_flag, check_nonnegative, check_positive, check_seed
from rs_plugins.core.relaxations.network import Method
from rs_plugins.core.training.eps_schedule import RampShape
from rs_plugins.core.training.gls import Gls, Gradient
from rs_plugins.core.training.loop import Scheduler
from rs_plugins.errors import InputError
from rs_plugins_art.arrays import Array
from rs_plugins_art.bounds_classifier import BoundsClassifier
from rs_plugins_art.loop_trainer import LoopTrainer, Validation
from rs_plugins_art.neutral import check_neutral

EPS, RAMP, WEIGHT = 0.1, 0.3, 0.5  # radius, share of the epochs, weight of the certified loss: as in ART
_OWN = ("eps", "bound", "gradient", "w_rob", "ramp", "ramp_shape")  # settings of Gls that have parameters here
_OPTIONS = tuple(field.name for field in fields(Gls) if field.init and field.name not in _OWN)


class CertifiedEpoch(NamedTuple):
    """What is known of a finished pass over the data.

    Attributes:
        number: Its number, from 0.
        loss: The mean loss.
        eps: The radius at its end, in pixels.
        validation_accuracy: Share of the validation images that are classified rightly; None without validation data.
        certified_accuracy: Share of them for which that is proved within the radius of the end of the ramp, by the
            bounds of the training.
    """

    number: int
    loss: float
    eps: float
    validation_accuracy: float | None = None
    certified_accuracy: float | None = None


class GlsTrainer(LoopTrainer):
    """Certified training, with Gaussian loss smoothing if wanted (`Gls`; Balauca et al. 2024).

    A script for ART's `AdversarialTrainerCertifiedIBPPyTorch` runs with it. The loss is the cross-entropy of clean
    images and of the worst that bounds leave possible. As there, radius and weight of the second grow from 0 over the
    first 30 % of the epochs; here from step to step, and margins are bounded, not one logit at a time. The network is
    trained in place, through core's loop, with the classifier's own optimiser. Each call of `fit` or `fit_generator` is
    a training of its own.

    Args:
        classifier: A `BoundsClassifier` or any other `PyTorchClassifier` without preprocessing, with an optimiser.
        nb_epochs: Passes over the data, if `fit` is not told.
        bound: The radius in l-infinity that is trained for, in pixels: ART's name for ``eps``.
        batch_size: Images per batch, if `fit` is not told.
        loss_weighting: Weight of the certified loss at the end of the ramp, in [0, 1]; 0.5 if not given.
        use_certification_schedule: Whether there is a ramp.
        certification_schedule: None: the ramp is given by ``ramp`` and ``ramp_shape``.
        use_loss_weighting_schedule: Whether the weight grows too; like ``use_certification_schedule``, as both grow in
            proportion.
        loss_weighting_schedule: None.
        augment_with_pgd: False: bounds cover what an attack can find.
        pgd_params: None.
        eps: The radius, by our name; 0.1 if neither is given.
        method: ``"ibp"``, ``"crown-ibp"`` or ``"crown"``: the bounds of the training.
        gradient: ``"plain"``, ``"rgs"`` or ``"pgpe"``.
        ramp: Length of the ramp in epochs; 30 % of the epochs if not given.
        ramp_shape: ``"linear"`` or ``"smooth"``.
        parts: Into how many parts a batch is cut, each with a step of the optimiser of its own.
        seed: Seed of noise and order; None: the classifier's own, 0 for one without.
        **options: The other settings of `Gls`, such as ``draws``, ``sigma_w``, ``population``, ``l1``, ``regulariser``
            and ``lower_slope``.

    Attributes:
        history: A `CertifiedEpoch` for each finished pass over the data, of all calls, also of those that ended in an
            error.

    Raises:
        InputError: If an argument has an impossible value, or ART would change images on their way to the model.
        ModelError: If the model has a module that bounds do not know.
        TypeError: If `Gls` has no such setting.
    """

    def __init__(
        self,
        classifier: Any,
        nb_epochs: int = 20,
        bound: float | None = None,
        batch_size: int = 32,
        loss_weighting: float | None = None,
        use_certification_schedule: bool = True,
        certification_schedule: None = None,
        use_loss_weighting_schedule: bool | None = None,
        loss_weighting_schedule: None = None,
        augment_with_pgd: bool = False,
        pgd_params: None = None,
        *,
        eps: float | None = None,
        method: Method = "crown-ibp",
        gradient: Gradient = "rgs",
        ramp: float | None = None,
        ramp_shape: RampShape = "linear",
        parts: int = 1,
        seed: int | None = None,
        **options: Any,
    ) -> None:
        for name in sorted(options.keys() - set(_OPTIONS)):
            raise TypeError(f"GlsTrainer() got an unexpected keyword argument {name!r}; Gls has {', '.join(_OPTIONS)}")
        _refuse(
            certification_schedule=(certification_schedule, "the ramp is given by ramp and ramp_shape"),
            loss_weighting_schedule=(loss_weighting_schedule, "the weight grows with the radius, up to loss_weighting"),
            augment_with_pgd=(augment_with_pgd or None, "bounds cover what an attack can find"),
            pgd_params=(pgd_params, "bounds cover what an attack can find"),
        )
        self._ours: BoundsClassifier
        super().__init__(classifier, _bounded(classifier, seed), parts)
        self.nb_epochs = check_count(nb_epochs, "nb_epochs", least=0)
        self.batch_size = check_count(batch_size, "batch_size")
        self.loss_weighting = WEIGHT if loss_weighting is None else _weight(loss_weighting)
        self._ramp = _ramp(ramp, use_certification_schedule, use_loss_weighting_schedule)
        if method not in get_args(Method):  # which Gls would call bound, and that is the radius here
            raise InputError(f"method: expected one of {', '.join(map(repr, get_args(Method)))}, got {method!r}")
        own = {"eps": _radius(bound, eps), "bound": method, "gradient": gradient, "ramp_shape": ramp_shape}
        self._options: dict[str, Any] = options | own
        self._objective = self._make(self.nb_epochs)  # which checks the options

    @property
    def objective(self) -> Gls:
        """What is minimised, or was in the last training: data that say with which settings."""
        return self._objective

    @property
    def eps(self) -> float:
        """The radius that is trained for, in pixels."""
        return self._objective.eps

    def fit(
        self,
        x: Array,
        y: Array,
        limits: Any = None,
        certification_loss: str = "interval_loss_cce",
        batch_size: int | None = None,
        nb_epochs: int | None = None,
        training_mode: bool = True,
        scheduler: Scheduler | None = None,
        verbose: bool = False,
        *,
        validation_data: tuple[Array, Array] | None = None,
        drop_last: bool = False,
        first_epoch: int = 0,
    ) -> None:
        """Train on ``x``, ``y``.

        Args:
            x: (n, *input), pixels in [0, 1].
            y: Classes in any of ART's forms.
            limits: [0, 1] or None: pixels are in [0, 1] anyway.
            certification_loss: ``"interval_loss_cce"``: the cross-entropy of the worst that bounds leave possible.
            batch_size: Images per batch; the trainer's if not given.
            nb_epochs: Passes over the data; the trainer's if not given.
            training_mode: Whether the model is in train mode meanwhile (batch normalisation, dropout).
            scheduler: Anything with a method ``step``, called after each epoch.
            verbose: Whether to show a progress bar.
            validation_data: Images and labels by which each epoch is judged.
            drop_last: Whether to leave out an incomplete last batch.
            first_epoch: The number of the first epoch, by which the ramp goes; 0 for a training that begins. Who
                trains epoch by epoch gives the trainer a ``ramp``, as 30 % are of ``first_epoch`` + ``nb_epochs``.

        Raises:
            InputError: If an argument has an impossible value, or there is no optimiser.
            ModelError: If the loss becomes NaN or infinite, or the model has a module that bounds do not know.
        """
        _check_limits(limits)
        if certification_loss != "interval_loss_cce":
            got = getattr(certification_loss, "__name__", repr(certification_loss))
            raise InputError(f"certification_loss: expected 'interval_loss_cce', the loss of Gls, got {got}")
        size = self.batch_size if batch_size is None else batch_size
        self._run(
            lambda **how: self._ours._fit(x, y, batch_size=size, drop_last=drop_last, **how),
            nb_epochs,
            validation_data,
            scheduler=scheduler,
            first_epoch=first_epoch,
            training_mode=training_mode,
            verbose=verbose,
        )

    def fit_generator(
        self,
        generator: Any,
        nb_epochs: int | None = None,
        *,
        validation_data: tuple[Array, Array] | None = None,
        scheduler: Scheduler | None = None,
        first_epoch: int = 0,
        training_mode: bool = True,
        verbose: bool = False,
    ) -> None:
        """Train on the batches of an ART data generator; the radius then grows from epoch to epoch.

        Args:
            generator: An `art.data_generators.DataGenerator`; an epoch ends when it gave ``size`` images.
            nb_epochs: Passes over the data; the trainer's if not given.
            validation_data: Images and labels by which each epoch is judged.
            scheduler: Anything with a method ``step``, called after each epoch.
            first_epoch: The number of the first epoch, by which the ramp goes; 0 for a training that begins. Who
                trains epoch by epoch gives the trainer a ``ramp``, as 30 % are of ``first_epoch`` + ``nb_epochs``.
            training_mode: Whether the model is in train mode meanwhile.
            verbose: Whether to show a progress bar.

        Raises:
            InputError: As `fit`, or if the generator does not say its size.
            ModelError: As `fit`.
        """
        self._run(
            lambda **how: self._ours._fit_generator(generator, **how),
            nb_epochs,
            validation_data,
            scheduler=scheduler,
            first_epoch=first_epoch,
            training_mode=training_mode,
            verbose=verbose,
        )

    def predict_intervals(self, x: Any, *args: Any, **kwargs: Any) -> Array:
        """Return what `BoundsClassifier.predict_intervals` returns."""
        return self._ours.predict_intervals(x, *args, **kwargs)

    def set_forward_mode(self, mode: str) -> None:
        """Set the mode of the classifier's module, as `BoundedModel.set_forward_mode` does."""
        self._ours.model.set_forward_mode(mode)

    def _run(self, fit: Any, nb_epochs: int | None, validation_data: Any, *, first_epoch: int, **how: Any) -> None:
        epochs = self.nb_epochs if nb_epochs is None else check_count(nb_epochs, "nb_epochs", least=0)
        first = check_count(first_epoch, "first_epoch", least=0)
        self._objective = self._make(first + epochs)
        self._train(fit, lambda: self._objective, validation_data, nb_epochs=epochs, first_epoch=first, **how)

    def _make(self, epochs: int) -> Gls:
        """Return the objective for a training of so many epochs."""
        ramp = RAMP * epochs if self._ramp is None else self._ramp
        return Gls(w_rob=self.loss_weighting, ramp=ramp, **self._options)

    def _refresh(self) -> None:
        check_neutral(self._classifier)
        if self._ours is not self._classifier:
            self._ours.set_params(optimizer=self._classifier.optimizer)

    def _epoch(self, number: int, loss: float, judged: Validation | None) -> CertifiedEpoch:
        eps = self._objective.schedule(number + 1)
        if judged is None:
            return CertifiedEpoch(number, loss, eps)
        proved = self._validated(self._objective.validate, judged, self.batch_size)
        return CertifiedEpoch(number, loss, eps, self._accuracy(judged), proved)


def _radius(bound: float | None, eps: float | None) -> float:
    """Return the radius by either of its names.

    Raises:
        InputError: If both are given, or it is impossible.
    """
    if bound is not None and eps is not None:
        raise InputError(f"bound, eps: expected one of them, as they are the same, got {bound} and {eps}")
    if bound is not None:
        return check_positive(bound, "bound")
    return EPS if eps is None else check_positive(eps, "eps")


def _weight(loss_weighting: float) -> float:
    """Return the weight of the certified loss.

    Raises:
        InputError: If it is not in [0, 1].
    """
    if check_nonnegative(loss_weighting, "loss_weighting") > 1:
        raise InputError(f"loss_weighting: expected a number in [0, 1], got {loss_weighting}")
    return loss_weighting


def _ramp(ramp: float | None, radius_grows: bool, weight_grows: bool | None) -> float | None:
    """Return the length of the ramp in epochs; None: a share of them.

    Raises:
        InputError: If ART's words contradict each other, or ask for what `Gls` does not do.
    """
    if check_flag(radius_grows, "use_certification_schedule"):
        radius = None if ramp is None else check_nonnegative(ramp, "ramp")
    elif ramp is None:
        radius = 0.0
    else:
        raise InputError(f"ramp: expected None without a certification schedule, got {ramp}")
    if weight_grows is not None and check_flag(weight_grows, "use_loss_weighting_schedule") is not bool(radius_grows):
        raise InputError(
            f"use_loss_weighting_schedule: expected {radius_grows} like use_certification_schedule, as the weight "
            f"grows in proportion to the radius, got {weight_grows}; loss_weighting alone says what it grows to"
        )
    return radius


def _refuse(**words: tuple[object, str]) -> None:
    """Refuse what ART's trainer takes and has no meaning here.

    Raises:
        InputError: If one of the words has a value.
    """
    for name, (value, reason) in words.items():
        if value is not None:
            raise InputError(f"{name}: expected {'False' if value is True else None}, got {value!r}; {reason}")


def _check_limits(limits: Any) -> None:
    """Check that ``limits`` of pixels, if any, are 0 and 1.

    Raises:
        InputError: Otherwise.
    """
    low, high = (0, 1) if limits is None else limits if np.ndim(limits) and len(limits) == 2 else (1, 0)
    if not (np.all(np.asarray(low) == 0) and np.all(np.asarray(high) == 1)):
        raise InputError(f"limits: expected [0, 1] or None, got {limits}; images are pixels in [0, 1]")


def _bounded(classifier: Any, seed: int | None) -> BoundsClassifier:
    """Return ``classifier`` if it is a `BoundsClassifier`, else one around its model with its optimiser.

    Raises:
        InputError: If it is no classifier of ART, its ``seed`` is another, or it changes images.
        ModelError: If the model has a module that bounds do not know.
    """
    if not isinstance(classifier, PyTorchClassifier):
        got = type(classifier).__name__
        raise InputError(f"classifier: expected a BoundsClassifier or another PyTorchClassifier, got {got}")
    check_neutral(classifier)
    if not isinstance(classifier, BoundsClassifier):
        return BoundsClassifier(
            classifier.model,
            input_shape=classifier.input_shape,
            nb_classes=classifier.nb_classes,
            optimizer=classifier.optimizer,
            seed=0 if seed is None else check_seed(seed),
        )
    if seed is not None and seed != classifier.seed:
        raise InputError(f"seed: expected {classifier.seed}, which the classifier brings, got {seed}")
    return classifier
