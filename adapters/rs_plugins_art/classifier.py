"""The smoothed classifier as an ART estimator."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.special import softmax
from torch import Tensor, nn

from rs_plugins.core.checks import check_count
from rs_plugins.core.models import evaluating
from rs_plugins.core.noise import Family, GaussianNoise
from rs_plugins.core.smoothing import soft_vote
from rs_plugins.core.training.loop import Scheduler
from rs_plugins.core.training.objective import Objective
from rs_plugins.errors import InputError, ModelError
from rs_plugins_art.arrays import Array, host_rows, set_aside_broken
from rs_plugins_art.files import load_weights, read_settings, stem
from rs_plugins_art.fitting import objective_for
from rs_plugins_art.gradients import SmoothedGradients
from rs_plugins_art.neutral import refuse_training_mode

_OF_FIT_GENERATOR = ("nb_epochs", "verbose", "training_mode", "scheduler", "method", "parts", "first_epoch")
_OF_FIT = ("batch_size", "drop_last", "validation_data", *_OF_FIT_GENERATOR)


class SmoothedClassifier(SmoothedGradients):
    """A classifier under Gaussian noise (Cohen et al. 2019) that ART's attacks and metrics take as it is.

    Smoothing is inside ``.model``, a `SmoothedModel`, so whatever ART does with the estimator or rebuilds from its
    module attacks the smoothed classifier. `predict` is its soft vote, `certify` its hard vote: they can differ.

    Args:
        model: The base classifier, (n, *input) in pixels to logits (n, classes), normalisation inside.
        sigma: Standard deviation of the noise, in pixels.
        loss: None or ``torch.nn.CrossEntropyLoss()``.
        input_shape: Shape of one image; learnt from the first batch if not given.
        nb_classes: Number of classes, >= 2; learnt with the shape, by running the model once, if not given.
        optimizer: Needed by `fit` only; over the parameters of ``model``.
        samples: Noise draws of the soft vote, shared by all images.
        noise: Draws that gradients see. ``"fixed"``: those of `predict`, made from ``seed``. ``"fresh"``: new ones at
            each call. `predict` and `compute_loss` always use the fixed ones: equal inputs give equal outputs.
        output: What `predict` and `class_gradient` are of: ``"log_probs"``, shifted as ART needs them, or ``"probs"``.
        family: The noise family.
        alpha: Failure probability of a certificate, and of a prediction that may abstain.
        seed: Seed of every draw; None takes one from the operating system.
        chunk: At most this many noisy images per forward pass; chosen by device and size if not given.
        channels_first: Where the colour channels are, for attacks that ask.
        clip_values: (0, 1), or None for attacks that may leave the box.
        device_type: The model's own device, where everything stays; only needed for a model without parameters.
        **host: What else ART's constructor takes, at its neutral value.

    Raises:
        InputError: If an argument has an impossible value, or ART would change images on their way to the model.
        ModelError: If the model does not return logits (n, classes) without NaN for ``input_shape``.
    """

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
        """Return the soft vote at ``x`` (n, *input) as float64 rows (n, classes), or hard votes on request.

        It is a function of each image alone: the same noise draws serve all images and all calls.

        Args:
            x: Floating point, pixels; values outside [0, 1] are taken as they are. An image with NaN or infinity gets a
                row of NaN, with a warning: some attacks try such images.
            batch_size: Images per pass; each has ``samples`` noisy copies, of which ``chunk`` go through at once.
            training_mode: False: predictions are defined in eval mode.
            y: Not used; some callers pass it.
            logits: Not used; some callers pass it.
            verbose: Not used; some callers pass it.
            is_abstain: Return one-hot hard votes under the same draws instead, and a row of zeros where they do not
                tell the two leading classes apart at ``alpha`` (PREDICT of Cohen et al. 2019).

        Raises:
            InputError: If an argument has an impossible value.
            ModelError: If the model does not return finite logits (n, classes).
        """
        refuse_training_mode(training_mode)
        batch_size = check_count(batch_size, "batch_size")
        if is_abstain:
            return self._hard_rows(self._images(x))
        x, broken = set_aside_broken(x)
        rows = self._log_probabilities(self._images(x), batch_size)
        rows[broken] = np.nan
        if self.output == "log_probs":
            return host_rows(rows)
        return softmax(rows, axis=1)  # type: ignore[no-any-return]

    def _log_probabilities(self, images: Tensor, batch_size: int) -> Array:
        """Return log mean softmax (n, classes), float64, under the draws of `predict`."""
        rows = np.empty((len(images), self.nb_classes))
        device = self._device
        draws = self.model.fixed_draws(images[:1].to(device))
        with evaluating(self.model), torch.no_grad():
            for start in range(0, len(images), batch_size):
                part = images[start : start + batch_size].to(device)
                vote = soft_vote(self.base_model, part, draws, chunk=self.chunk)
                rows[start : start + batch_size] = vote.double().cpu().numpy()
        if not np.isfinite(rows).all():
            raise ModelError("model: expected finite logits, got NaN or infinity on noisy images")
        return rows

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
        method: str | Objective = "gaussian",
        parts: int = 1,
        first_epoch: int = 0,
        **options: Any,
    ) -> None:
        """Train the base model under the classifier's own noise; by default on one fresh noisy copy per image and step.

        Noise and order go on from call to call, so that trainers which call this once per batch see new noise.

        Args:
            x: (n, *input), pixels in [0, 1].
            y: Labels in any form; class probabilities for ``"gaussian"`` alone.
            batch_size: Images per batch.
            nb_epochs: Passes over the data.
            training_mode: Whether the base model is in train mode meanwhile (batch normalisation, dropout).
            drop_last: Whether to leave out an incomplete last batch.
            scheduler: Anything with a method ``step``, called after each epoch.
            verbose: Whether to show a progress bar.
            validation_data: None; some trainers pass it.
            method: ``"gaussian"`` (Cohen et al. 2019), ``"smoothadv"``, ``"smoothmix"``, ``"consistency"``,
                ``"macer"``, ``"stability"``, ``"stability-rs4a"`` or ``"stability-confseq"``, described in
                `rs_plugins.core.training`; or an objective, any function of (model, batch, draws).
            parts: Into how many parts a batch is cut, each with a step of the optimiser of its own.
            first_epoch: The number of the first epoch, by which warm-up goes; 0 for a training that begins.
            **options: Those of the method of that name, such as ``samples``; not ``sigma`` and ``family``, which are
                the classifier's.

        Raises:
            InputError: If an argument has an impossible value, or there is no optimiser.
            ModelError: If the loss becomes NaN or infinite.
            TypeError: If a keyword is neither one of these nor an option of the method.
        """
        if validation_data is not None:
            raise InputError("validation_data: expected None; a smoothed classifier's fit does not validate")
        self._fit(
            x,
            y,
            objective_for(method, options, sigma=self.sigma, family=self.family, keywords=_OF_FIT),
            batch_size=batch_size,
            nb_epochs=nb_epochs,
            training_mode=training_mode,
            drop_last=drop_last,
            scheduler=scheduler,
            verbose=verbose,
            parts=parts,
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
        method: str | Objective = "gaussian",
        parts: int = 1,
        first_epoch: int = 0,
        **options: Any,
    ) -> None:
        """Train as `fit` does, on the batches of an ART data generator.

        Args:
            generator: An `art.data_generators.DataGenerator`; an epoch ends when it gave ``size`` images.
            nb_epochs: Passes over the data.
            verbose: Whether to show a progress bar.
            training_mode: Whether the base model is in train mode meanwhile.
            scheduler: Anything with a method ``step``, called after each epoch.
            method: As in `fit`.
            parts: Into how many parts a batch is cut, each with a step of the optimiser of its own.
            first_epoch: The number of the first epoch, by which warm-up goes.
            **options: Those of the method, as in `fit`.

        Raises:
            InputError: As `fit`, or if the generator does not say its size.
            ModelError: If the loss becomes NaN or infinite.
            TypeError: If a keyword is neither one of these nor an option of the method.
        """
        self._fit_generator(
            generator,
            objective_for(method, options, sigma=self.sigma, family=self.family, keywords=_OF_FIT_GENERATOR),
            nb_epochs=nb_epochs,
            first_epoch=first_epoch,
            scheduler=scheduler,
            verbose=verbose,
            training_mode=training_mode,
            parts=parts,
        )

    # ---- files -------------------------------------------------------------------------------------------------------

    def _settings(self) -> dict[str, Any]:
        return {**super()._settings(), "family": self.family(self.sigma).name}

    @classmethod
    def load(
        cls,
        filename: str,
        path: str | None = None,
        *,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None = None,
        family: Family = GaussianNoise,
        device_type: str | None = None,
    ) -> "SmoothedClassifier":
        """Return the classifier that `save` wrote; nothing in the files is executed.

        Args:
            filename: Name without ending.
            path: Folder; ART's data folder if not given.
            model: A base model of the same architecture, whose weights are overwritten.
            optimizer: One over its parameters, to go on training with the saved state.
            family: The noise family, if it is not the Gaussian one.
            device_type: Only needed for a model without parameters.

        Raises:
            InputError: If a file is missing, of another program, class or noise family.
            ModelError: If ``model`` has another architecture than the one saved.
        """
        where = stem(filename, path)
        settings = saved_settings(where, family)
        if "design" in settings:
            raise InputError("filename: expected a file of SmoothedClassifier, got one of CertifyingAdapterClassifier")
        fits = settings.pop("fits", 0)
        load_weights(where, model, optimizer)
        classifier = cls(model, optimizer=optimizer, family=family, device_type=device_type, **settings)
        classifier._fits = fits
        return classifier


def saved_settings(where: Path, family: Family) -> dict[str, Any]:
    """Return the settings that were saved at ``where``, as the constructor takes them, but for the noise family.

    Raises:
        InputError: If a file is missing, of another program, or of another noise family.
    """
    settings = read_settings(where)
    if "bound" in settings:
        raise InputError("filename: expected a file of SmoothedClassifier, got one of BoundsClassifier")
    settings["clip_values"] = (0.0, 1.0) if settings["clip_values"] else None
    saved, given = settings.pop("family"), family(settings["sigma"]).name
    if saved != given:
        raise InputError(f"family: expected the noise family {saved!r} that was saved, got {given!r}")
    return settings
