"""What the trainers of smoothed classifiers share: ART's contract, the noise of the classifier, a history."""

from typing import Any, ClassVar, NamedTuple

from art.estimators.classification import PyTorchClassifier

from rs_plugins.core.checks import check_seed
from rs_plugins.core.training.loop import Scheduler
from rs_plugins.core.training.methods import make_objective
from rs_plugins.core.training.objective import Objective
from rs_plugins.errors import InputError
from rs_plugins_art.arrays import Array
from rs_plugins_art.attack_base import attacked
from rs_plugins_art.classifier import SmoothedClassifier
from rs_plugins_art.loop_trainer import LoopTrainer, Validation
from rs_plugins_art.neutral import check_neutral


class Epoch(NamedTuple):
    """What is known of a finished pass over the data.

    Attributes:
        number: Its number, from 0, by which warm-up goes.
        loss: The mean loss.
        validation_accuracy: Share of the validation images that the soft vote under noise gets right; None without
            validation data.
    """

    number: int
    loss: float
    validation_accuracy: float | None = None


class SmoothedTrainer(LoopTrainer):
    """An ART trainer of the base model of a smoothed classifier, in place, with the classifier's own optimiser.

    What is minimised is the objective of a subclass's method; a loss that the classifier has is not used. Each call of
    `fit` or `fit_generator` is a training of its own: warm-up begins anew, noise and order do not repeat. Who calls
    them once per epoch says ``first_epoch``.

    Attributes:
        parts: Into how many parts a batch is cut, each with a step of the optimiser of its own.
        history: An `Epoch` for each finished pass over the data, of all calls, also of those that ended in an error.
    """

    method: ClassVar[str]

    def __init__(self, classifier: Any, *, sigma: float | None, parts: int, seed: int | None, **options: Any) -> None:
        self._smoothed = _smoothed(classifier, sigma, seed)
        super().__init__(classifier, self._smoothed, parts)
        self._sigma, self._options = sigma, options
        make_objective(self.method, self._smoothed.sigma, **options)  # which checks the options

    @property
    def objective(self) -> Objective:
        """What is minimised: data that say with which settings."""
        smoothed = self._smoothed
        return make_objective(self.method, smoothed.sigma, **self._options, family=smoothed.family)

    def fit(
        self,
        x: Array,
        y: Array,
        validation_data: tuple[Array, Array] | None = None,
        batch_size: int = 128,
        nb_epochs: int = 20,
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
            y: Labels in any of ART's forms; class probabilities for Gaussian training alone.
            validation_data: Images and labels on which the soft vote is judged after each epoch.
            batch_size: Images per batch.
            nb_epochs: Passes over the data.
            scheduler: Anything with a method ``step``, called after each epoch.
            first_epoch: The number of the first epoch, by which warm-up goes; 0 for a training that begins.
            training_mode: Whether the base model is in train mode meanwhile (batch normalisation, dropout).
            drop_last: Whether to leave out an incomplete last batch.
            verbose: Whether to show a progress bar.

        Raises:
            InputError: If an argument has an impossible value, or there is no optimiser.
            ModelError: If the loss becomes NaN or infinite.
        """
        self._train(
            lambda **how: self._smoothed._fit(x, y, batch_size=batch_size, drop_last=drop_last, **how),
            lambda: self.objective,
            validation_data,
            scheduler=scheduler,
            first_epoch=first_epoch,
            nb_epochs=nb_epochs,
            training_mode=training_mode,
            verbose=verbose,
        )

    def fit_generator(
        self,
        generator: Any,
        nb_epochs: int = 20,
        *,
        validation_data: tuple[Array, Array] | None = None,
        scheduler: Scheduler | None = None,
        first_epoch: int = 0,
        training_mode: bool = True,
        verbose: bool = False,
    ) -> None:
        """Train on the batches of an ART data generator.

        Args:
            generator: An `art.data_generators.DataGenerator`; an epoch ends when it gave ``size`` images.
            nb_epochs: Passes over the data.
            validation_data: Images and labels on which the soft vote is judged after each epoch.
            scheduler: Anything with a method ``step``, called after each epoch.
            first_epoch: The number of the first epoch, by which warm-up goes; 0 for a training that begins.
            training_mode: Whether the base model is in train mode meanwhile.
            verbose: Whether to show a progress bar.

        Raises:
            InputError: As `fit`, or if the generator does not say its size.
            ModelError: If the loss becomes NaN or infinite.
        """
        self._train(
            lambda **how: self._smoothed._fit_generator(generator, **how),
            lambda: self.objective,
            validation_data,
            scheduler=scheduler,
            first_epoch=first_epoch,
            nb_epochs=nb_epochs,
            training_mode=training_mode,
            verbose=verbose,
        )

    def _epoch(self, number: int, loss: float, judged: Validation | None) -> Epoch:
        return Epoch(number, loss, None if judged is None else self._accuracy(judged))

    def _refresh(self) -> None:
        """Check the classifier again, whose settings may have changed, and take over what is the host's."""
        check_neutral(self._classifier)
        sigma = attacked(self._classifier, self._sigma, self._smoothed.seed).sigma
        if self._smoothed is not self._classifier:
            self._smoothed.set_params(sigma=sigma, optimizer=self._classifier.optimizer)


def _smoothed(classifier: Any, sigma: float | None, seed: int | None) -> SmoothedClassifier:
    """Return ``classifier`` if it is a `SmoothedClassifier`, else one around its model with its optimiser.

    Raises:
        InputError: If it is no classifier of ART, its ``sigma`` or ``seed`` is another, or it changes images.
    """
    if not isinstance(classifier, PyTorchClassifier):
        got = type(classifier).__name__
        raise InputError(f"classifier: expected a SmoothedClassifier or another PyTorchClassifier, got {got}")
    check_neutral(classifier)
    model = attacked(classifier, sigma, 0 if seed is None else check_seed(seed))
    if not isinstance(classifier, SmoothedClassifier):
        return SmoothedClassifier(
            model.base,
            model.sigma,
            family=model.family,
            seed=model.seed if seed is None else seed,
            input_shape=classifier.input_shape,
            nb_classes=classifier.nb_classes,
            optimizer=classifier.optimizer,
        )
    if seed is not None and seed != classifier.seed:
        raise InputError(f"seed: expected {classifier.seed}, which the smoothed classifier brings, got {seed}")
    return classifier
