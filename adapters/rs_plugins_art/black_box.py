"""Any ART classifier under noise, of whatever framework: what ART's `NumpyRandomizedSmoothing` is for."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from art.estimators import BaseEstimator
from art.estimators.certification.randomized_smoothing.randomized_smoothing import RandomizedSmoothingMixin
from art.estimators.classification.classifier import ClassifierMixin
from art.estimators.estimator import NeuralNetworkMixin
from torch import Tensor, nn
from torch.nn.functional import one_hot

from rs_plugins.core.black_box import BlackBox
from rs_plugins.core.checks import check_count, check_images
from rs_plugins.core.decisions import Decider
from rs_plugins.core.models import NoisyModule, modes_restored
from rs_plugins.core.noise import Family, GaussianNoise
from rs_plugins.core.noise_promises import draw_into
from rs_plugins.core.smoothing import SmoothedModel
from rs_plugins.core.streams import stream
from rs_plugins.errors import InputError
from rs_plugins_art.arrays import Array, set_aside_broken, to_images, to_targets
from rs_plugins_art.certifying import Certifying
from rs_plugins_art.neutral import check_clip_values, refuse_training_mode

_SETTINGS = ("sigma", "samples", "alpha", "seed", "chunk")


class SmoothedBlackBox(Certifying, ClassifierMixin, NeuralNetworkMixin, BaseEstimator):
    """An ART classifier of any framework under Gaussian noise (Cohen et al. 2019), itself an ART classifier.

    It asks ``classifier.predict`` and nothing else, so it serves scikit-learn, TensorFlow, XGBoost, a remote service in
    a `BlackBoxClassifier`; ART's decision-based attacks run on it. For a PyTorch network `SmoothedClassifier` is faster
    and has gradients.

    What the classifier does inside ``predict``, preprocessing and defences included, is the base classifier that is
    certified: noise is added before all of it, to pixels in [0, 1], and radii are in these pixels. A classifier that
    wants pixels in [0, 255] can bring ``preprocessing=(0.0, 1 / 255)``.

    Args:
        classifier: The base classifier.
        sigma: Standard deviation of the noise, in pixels; what ART calls ``scale``.
        samples: Noise draws of `predict`, shared by all images.
        family: The noise family.
        alpha: Failure probability of a certificate, and of a prediction that may abstain.
        seed: Seed of every draw; None takes one from the operating system.
        chunk: At most this many noisy images per call of ``classifier.predict``; chosen by size if not given.
        name: What certificates call the classifier, of which they can record no more; its classes' names if not given.

    Raises:
        InputError: If an argument has an impossible value, or the classifier is smoothed already.
    """

    estimator_params = ["classifier", *_SETTINGS]  # noqa: RUF012  a plain list is what the host reads

    def __init__(
        self,
        classifier: Any,
        sigma: float,
        *,
        samples: int = 32,
        family: Family = GaussianNoise,
        alpha: float = 0.001,
        seed: int | None = 0,
        chunk: int | None = None,
        name: str | None = None,
    ) -> None:
        _check_classifier(classifier)
        base = BlackBox(partial(_ask, classifier), name=_name(classifier) if name is None else name)
        model = SmoothedModel(base, sigma, samples=samples, family=family, seed=seed, chunk=chunk)
        self.classifier = classifier
        super().__init__(
            model=model.eval(),
            channels_first=getattr(classifier, "channels_first", True),
            clip_values=classifier.clip_values,
            preprocessing=None,
        )
        self.alpha = alpha
        self._layer_names: list[str] = []
        self._device = torch.device("cpu")
        self._fits = 0

    # ---- settings --------------------------------------------------------------------------------------------------

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one image, as the base classifier says; some know it only after `fit`."""
        shape: tuple[int, ...] = self.classifier.input_shape
        return shape

    @property
    def nb_classes(self) -> int:
        """Number of classes, as the base classifier says; some know it only after `fit`."""
        if self._nb_classes is None:
            raise InputError("classifier: it does not know its number of classes yet; fit it first")
        return int(self._nb_classes)

    @property
    def _nb_classes(self) -> int | None:
        classes = getattr(self.classifier, "nb_classes", None)
        return classes if classes is not None and classes >= 2 else None

    @_nb_classes.setter
    def _nb_classes(self, classes: object) -> None:
        """Ignore what the host's constructor sets: the base classifier knows."""

    def set_params(self, **kwargs: Any) -> None:
        """Change settings, all of them or, if one is refused, none.

        Raises:
            InputError: If a name is unknown or a value impossible.
        """
        unknown = sorted(set(kwargs) - set(_SETTINGS))
        if unknown:
            raise InputError(f"set_params: expected names among {', '.join(_SETTINGS)}; got {unknown[0]!r}")
        before = {name: getattr(self, name) for name in _SETTINGS}
        try:
            for name, value in kwargs.items():
                setattr(self, name, value)
        except BaseException:
            for name, value in before.items():
                setattr(self, name, value)
            raise

    def clone_for_refitting(self) -> "SmoothedBlackBox":
        """Return a copy around a copy of the base classifier that is not fitted."""
        settings = {name: getattr(self, name) for name in _SETTINGS}
        name = str(self.base_model.name)
        return SmoothedBlackBox(self.classifier.clone_for_refitting(), family=self.family, name=name, **settings)

    def __repr__(self) -> str:
        settings = ", ".join(f"{name}={getattr(self, name)!r}" for name in _SETTINGS)
        return f"{type(self).__name__}({self.base_model.name}, {settings})"

    # ---- predictions -----------------------------------------------------------------------------------------------

    def predict(
        self,
        x: Any,
        batch_size: int = 128,
        training_mode: bool = False,
        *,
        y: object = None,
        logits: object = None,
        verbose: object = None,
        is_abstain: bool = False,
    ) -> Array:
        """Return the share of the hard votes that each class has at ``x`` (n, *input), float64 rows (n, classes).

        It is a function of each image alone: the same noise draws serve all images and all calls.

        Args:
            x: Floating point, pixels; values outside [0, 1] are taken as they are. An image with NaN or infinity gets a
                row of NaN, with a warning: some attacks try such images.
            batch_size: Taken for ART's sake; ``chunk`` says how many noisy images go through at once.
            training_mode: False: predictions are defined without training.
            y: Not used; some callers pass it.
            logits: Not used; some callers pass it.
            verbose: Not used; some callers pass it.
            is_abstain: Return one-hot rows instead, and a row of zeros where the votes do not tell the two leading
                classes apart at ``alpha`` (PREDICT of Cohen et al. 2019).

        Raises:
            InputError: If an argument has an impossible value.
            ModelError: If the classifier fails, or gives no scores (n, classes).
        """
        refuse_training_mode(training_mode)
        check_count(batch_size, "batch_size")
        if is_abstain:
            return self._hard_rows(self._images(x))
        x, broken = set_aside_broken(x)
        rows: Array = self._fixed_votes(self._images(x)) / self.samples
        rows[broken] = np.nan
        return rows

    def _decider(self, copies: Tensor) -> Decider:
        # An image's copies always share a batch of the same composition, so there is no rounding to be measured.
        return Decider(self.base_model, self.nb_classes, rounding=0.0)

    def _images(self, x: object) -> Tensor:
        """Return ``x`` as images (n, *input), float32, after the checks.

        Raises:
            InputError: If they are no finite floating-point batch, or not of the known shape.
        """
        images = to_images(x, torch.float32).detach()
        known, got = self.input_shape, tuple(images.shape)
        if known is not None and got[1:] != tuple(known):
            advice = "; one image needs a batch axis, x[None]" if got == tuple(known) else ""
            raise InputError(f"x: expected a batch of images of shape {tuple(known)}, got shape {got}{advice}")
        return images

    _exact_images = _images  # a black box takes single precision

    def get_activations(self, x: Any, layer: object, batch_size: int = 128, framework: bool = False) -> Array:
        """Raise InputError: nothing inside a black box can be seen."""
        raise InputError(f"layer: a black box has no layers to look at, got {layer!r}; ask the base classifier")

    # ---- training --------------------------------------------------------------------------------------------------

    def fit(self, x: Array, y: Any, batch_size: int = 128, nb_epochs: int = 10, **kwargs: Any) -> None:
        """Train the base classifier on images under fresh Gaussian noise (Cohen et al. 2019).

        A neural network is trained ``nb_epochs`` times on one noisy copy of each image. Any other classifier begins
        anew whenever it is fitted, so it is fitted once, on ``nb_epochs`` noisy copies of each image together.

        Args:
            x: (n, *input), pixels in [0, 1].
            y: Labels in any form.
            batch_size: Images per step, for those that train in steps.
            nb_epochs: Noisy copies of each image.
            **kwargs: What else the classifier's own ``fit`` takes.

        Raises:
            InputError: If an argument has an impossible value.
        """
        images = check_images(to_images(x, torch.float32), "x").detach()
        batch_size = check_count(batch_size, "batch_size")
        copies = check_count(nb_epochs, "nb_epochs")
        rows = _rows(y, len(images), self._nb_classes)
        self._fits += 1
        source = stream(self.seed, "fit", self._fits)
        noise = self.family(self.sigma)
        noisy = ((images + draw_into(noise, torch.empty_like(images), source)).numpy() for _ in range(copies))
        if isinstance(self.classifier, NeuralNetworkMixin):
            for batch in noisy:
                self.classifier.fit(batch, rows, batch_size=batch_size, nb_epochs=1, **kwargs)
        else:
            self.classifier.fit(np.concatenate(list(noisy)), np.concatenate([rows] * copies), **kwargs)


def _rows(y: object, n: int, classes: int | None) -> Array:
    """Return labels in any of ART's forms as one-hot or soft rows (n, classes), float32."""
    if classes is None:
        labels = np.asarray(y)
        classes = labels.shape[1] if labels.ndim == 2 and labels.shape[1] > 1 else int(labels.max(initial=1)) + 1
    targets = to_targets(y, n=n, classes=classes)
    return (one_hot(targets, classes) if targets.ndim == 1 else targets).numpy().astype(np.float32)


def _check_classifier(classifier: Any) -> None:
    """Check that ``classifier`` is an ART classifier of pixels in [0, 1] that adds no noise.

    Raises:
        InputError: Otherwise.
    """
    if not isinstance(classifier, ClassifierMixin) or not isinstance(classifier, BaseEstimator):
        got = type(classifier).__name__
        raise InputError(f"classifier: expected an ART classifier, such as SklearnClassifier(model), got {got}")
    parts = classifier.model.modules() if isinstance(classifier.model, nn.Module) else ()
    if isinstance(classifier, RandomizedSmoothingMixin) or any(isinstance(part, NoisyModule) for part in parts):
        got = type(classifier).__name__
        raise InputError(f"classifier: expected a base classifier, got a {got}; noise would be added twice")
    try:
        check_clip_values(classifier.clip_values)
    except InputError as error:
        message = f"classifier: {error}, as are sigma and radii; preprocessing=(0.0, 1 / 255) can bring the classifier"
        raise InputError(f"{message} those of [0, 255]") from None


def _name(classifier: Any) -> str:
    inside = f" of {type(classifier.model).__name__}" if classifier.model is not None else ""
    return f"{type(classifier).__name__}{inside}"


def _ask(classifier: Any, batch: Array) -> Array:
    """Return the scores (n, classes) of ``classifier`` for ``batch`` (n, *input)."""
    with _left_alone(classifier.model):
        scores: Array = classifier.predict(batch, batch_size=len(batch))
        return scores


@contextmanager
def _left_alone(model: object) -> Iterator[None]:
    """Undo what ART's `PyTorchClassifier` does when it predicts: it changes modes and draws from torch's generator."""
    if not isinstance(model, nn.Module):
        yield
        return
    with modes_restored(model), torch.random.fork_rng(devices=[]):
        yield
