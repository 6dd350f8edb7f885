"""A classifier with deterministic certificates by bounds on its logits, as an ART estimator."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from rs_plugins.core.checks import check_seed
from rs_plugins.core.models import check_noiseless
from rs_plugins.core.relaxations.network import Method
from rs_plugins.core.streams import fresh_seed
from rs_plugins.core.training.loop import Scheduler
from rs_plugins.core.training.objective import Batch, Draws
from rs_plugins.errors import InputError
from rs_plugins_art.arrays import Array
from rs_plugins_art.bounds_certifying import BoundsCertifying, ToBoxes
from rs_plugins_art.bounds_module import BoundedModel
from rs_plugins_art.files import load_weights, read_settings, stem
from rs_plugins_art.neutral import check_host_words


class BoundsClassifier(BoundsCertifying):
    """A network whose robustness is proved by bounds on its logits: IBP, CROWN-IBP or CROWN (Zhang et al. 2018).

    A script for ART's `PyTorchIBPClassifier` runs with it, by tighter bounds and on more networks. The network is not
    converted: the weights are those of ``model``, convolutions stay convolutions. Bounds are in eval mode.

    Its ``model`` is a `BoundedModel`, which has the modes of ART's; `predict`, gradients, `fit` and `predict_intervals`
    are the same in each of them.

    Args:
        model: The network, (n, *input) in pixels to logits (n, classes), normalisation inside.
        loss: None or ``torch.nn.CrossEntropyLoss()``.
        input_shape: Shape of one image; learnt from the first batch if not given.
        nb_classes: Number of classes, >= 2; learnt with the shape, by running the model once, if not given.
        optimizer: Needed for training only; over the parameters of ``model``.
        channels_first: Where the colour channels are, for attacks that ask.
        clip_values: (0, 1), or None for attacks that may leave the box.
        device_type: The model's own device, where everything stays; only needed for a model without parameters.
        concrete_to_interval: Makes boxes (n, 2, *input) of images, ``bounds`` and ``limits`` for `predict_intervals`;
            by default the method of that name.
        bound: ``"ibp"``, ``"crown-ibp"`` or ``"crown"``: by what intervals and margins are found, and up to which bound
            `certify` goes.
        seed: Seed of the order of images in training and of the attack in `certify`; None takes one from the operating
            system.
        **host: What else ART's constructor takes, at its neutral value.

    Raises:
        InputError: If an argument has an impossible value, or ART would change images on their way to the model.
        ModelError: If the model does not return logits (n, classes) without NaN for ``input_shape``, or has a module
            that bounds do not know.
    """

    estimator_params = [  # noqa: RUF012  a plain list is what the host extends and reads
        *BoundsCertifying.estimator_params,
        *("bound", "seed"),
    ]
    _saved = (*BoundsCertifying._saved, "bound", "seed")

    def __init__(
        self,
        model: nn.Module,
        loss: nn.Module | None = None,
        input_shape: Sequence[int] | None = None,
        nb_classes: int | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        channels_first: bool = True,
        clip_values: Any = (0.0, 1.0),
        *,
        device_type: str | None = None,
        concrete_to_interval: ToBoxes | None = None,
        bound: Method = "crown",
        seed: int | None = 0,
        **host: Any,
    ) -> None:
        check_host_words(host, "BoundsClassifier", {})
        check_noiseless(model, "model")
        super().__init__(
            BoundedModel(model, bound),
            model,
            loss=loss,
            nb_classes=nb_classes,
            optimizer=optimizer,
            channels_first=channels_first,
            clip_values=clip_values,
            device_type=None if device_type == "gpu" else device_type,  # ART's default: wherever the model is
        )
        self.seed = seed
        self.provided_concrete_to_interval = concrete_to_interval
        self.input_shape = input_shape
        self._check_params()

    # ---- settings --------------------------------------------------------------------------------------------------

    @property
    def base_model(self) -> nn.Module:
        """The network that was handed in."""
        base: nn.Module = self.model.module
        return base

    @property
    def seed(self) -> int:
        """Seed of the order of images and of the attack in `certify`."""
        return self._seed

    @seed.setter
    def seed(self, seed: int | None) -> None:
        self._seed = fresh_seed() if seed is None else check_seed(seed)

    def _meet(self, image: Tensor) -> None:
        super()._meet(image)
        try:
            self.model.meet(tuple(image.shape[1:]))
        except BaseException:
            self._input_shape = None
            raise

    # ---- training --------------------------------------------------------------------------------------------------

    def fit(
        self,
        x: Array,
        y: Array,
        batch_size: int = 128,
        nb_epochs: int = 10,
        training_mode: bool = True,
        drop_last: bool = False,
        scheduler: Scheduler | None = None,
        verbose: bool = False,
        validation_data: None = None,
        *,
        first_epoch: int = 0,
    ) -> None:
        """Train on the images themselves, by cross-entropy; `GlsTrainer` trains for certificates.

        Args:
            x: (n, *input), pixels in [0, 1].
            y: Labels in any form.
            batch_size: Images per batch.
            nb_epochs: Passes over the data.
            training_mode: Whether the model is in train mode meanwhile (batch normalisation, dropout).
            drop_last: Whether to leave out an incomplete last batch.
            scheduler: Anything with a method ``step``, called after each epoch.
            verbose: Whether to show a progress bar.
            validation_data: None; some trainers pass it.
            first_epoch: The number of the first epoch.

        Raises:
            InputError: If an argument has an impossible value, or there is no optimiser.
            ModelError: If the loss becomes NaN or infinite.
        """
        if validation_data is not None:
            raise InputError("validation_data: expected None; the classifier's fit does not validate")
        self._fit(
            x,
            y,
            _clean,
            batch_size=batch_size,
            nb_epochs=nb_epochs,
            training_mode=training_mode,
            drop_last=drop_last,
            scheduler=scheduler,
            verbose=verbose,
            first_epoch=first_epoch,
        )

    def fit_generator(
        self,
        generator: Any,
        nb_epochs: int = 20,
        verbose: bool = False,
        *,
        training_mode: bool = True,
        scheduler: Scheduler | None = None,
        first_epoch: int = 0,
    ) -> None:
        """Train as `fit` does, on the batches of an ART data generator.

        Args:
            generator: An `art.data_generators.DataGenerator`; an epoch ends when it gave ``size`` images.
            nb_epochs: Passes over the data.
            verbose: Whether to show a progress bar.
            training_mode: Whether the model is in train mode meanwhile.
            scheduler: Anything with a method ``step``, called after each epoch.
            first_epoch: The number of the first epoch.

        Raises:
            InputError: As `fit`, or if the generator does not say its size.
            ModelError: If the loss becomes NaN or infinite.
        """
        self._fit_generator(
            generator,
            _clean,
            nb_epochs=nb_epochs,
            first_epoch=first_epoch,
            scheduler=scheduler,
            verbose=verbose,
            training_mode=training_mode,
        )

    # ---- files -------------------------------------------------------------------------------------------------------

    @classmethod
    def load(
        cls,
        filename: str,
        path: str | None = None,
        *,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None = None,
        device_type: str | None = None,
        concrete_to_interval: ToBoxes | None = None,
    ) -> "BoundsClassifier":
        """Return the classifier that `save` wrote; nothing in the files is executed.

        Args:
            filename: Name without ending.
            path: Folder; ART's data folder if not given.
            model: A network of the same architecture, whose weights are overwritten.
            optimizer: One over its parameters, to go on training with the saved state.
            device_type: Only needed for a model without parameters.
            concrete_to_interval: As the constructor takes it.

        Raises:
            InputError: If a file is missing, or of another program or class.
            ModelError: If ``model`` has another architecture than the one saved.
        """
        where = stem(filename, path)
        settings = read_settings(where)
        if "bound" not in settings:
            raise InputError(f"filename: expected a file of {cls.__name__}, got one of a smoothed classifier")
        fits = settings.pop("fits")
        settings["clip_values"] = (0.0, 1.0) if settings["clip_values"] else None
        load_weights(where, model, optimizer)
        how: dict[str, Any] = {"device_type": device_type, "concrete_to_interval": concrete_to_interval}
        classifier = cls(model, optimizer=optimizer, **how, **settings)
        classifier._fits = fits
        return classifier

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({self.base_model!r}, bound={self.bound!r}, seed={self.seed!r}, "
            f"input_shape={self._input_shape}, nb_classes={self._nb_classes}, optimizer={self._optimizer!r})"
        )


def _clean(model: nn.Module, batch: Batch, draws: Draws) -> Tensor:
    """Return the cross-entropy of the images themselves."""
    return cross_entropy(model(batch.x), batch.y)
