"""A classifier with a certifying adapter, under noise, as an ART estimator."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn

from rs_plugins.core.certifying_adapters.adapted import AdaptedClassifier
from rs_plugins.core.certifying_adapters.design import AdapterDesign, adapt
from rs_plugins.core.certifying_adapters.features import FeatureFunction
from rs_plugins.core.certifying_adapters.modules import CertifyingAdapter
from rs_plugins.core.checks import check_count, check_flag, check_positive, check_seed
from rs_plugins.core.models import check_noiseless
from rs_plugins.core.noise import Family, GaussianNoise
from rs_plugins.core.streams import fresh_seed
from rs_plugins.errors import InputError, ModelError
from rs_plugins_art.classifier import SmoothedClassifier, saved_settings
from rs_plugins_art.files import load_weights, stem

MakeOptimizer = Callable[[list[nn.Parameter]], torch.optim.Optimizer]

_LR = 1e-3
_OF_DESIGN = {field.name for field in fields(AdapterDesign)}


class CertifyingAdapterClassifier(SmoothedClassifier):
    """A classifier made certifiable by a certifying adapter (Deng et al. 2024), with all that `SmoothedClassifier` has.

    The classifier may have been trained on clean images alone. It stays as it is: beside its frozen copy, the
    extractor, there is a network that corrects its features under noise. `fit`, `fit_generator` and the trainers of
    smoothed classifiers train that network and the last layer. Before they do, predictions and certificates are those
    of a `SmoothedClassifier` of the same seed, but for a fresh head.

    Args:
        model: The classifier, (n, *input) in pixels to logits (n, classes), normalisation inside. Or an
            `AdaptedClassifier`, which has a certifying adapter and is trained in place.
        sigma: Standard deviation of the noise, in pixels.
        input_shape: Shape of one image, such as (3, 32, 32), for which the certifying adapter is made; learnt from the
            first batch if not given with an `AdaptedClassifier`.
        design: Which certifying adapter; by default `AdapterDesign` with its defaults. Instead, its settings may be
            given here one by one, such as ``kind="feature"`` and ``hidden=8``.
        feature_fn: What makes the features, as `adapt` takes it, for a model without a last linear layer.
        optimizer: A function that makes one of the list of parameters to train, such as
            ``functools.partial(torch.optim.SGD, lr=0.1)``. With an `AdaptedClassifier` it may be an optimiser over its
            ``trainable_parameters()``. By default Adam, as Deng et al. take.
        lr: Its learning rate, if no ``optimizer`` is given; 1e-3 by default.
        copied: Whether the extractor has weights of its own. Otherwise it shares those of ``model``, and whoever trains
            ``model`` later changes it; an `AdaptedClassifier` is copied as a whole.
        seed: Seed of every draw, and of the certifying adapter's initial weights; None takes one from the operating
            system.
        **settings: The settings of the design, and what else `SmoothedClassifier` takes.

    Raises:
        InputError: If an argument has an impossible value, the optimiser holds parameters that stay as they are, no
            layer is found that gives the logits, or ART would change images on their way to the model.
        ModelError: If the model does not return logits (n, classes) without NaN for ``input_shape``.
    """

    def __init__(
        self,
        model: nn.Module,
        sigma: float | None = None,
        *,
        input_shape: Sequence[int] | None = None,
        design: AdapterDesign | None = None,
        feature_fn: FeatureFunction | None = None,
        optimizer: MakeOptimizer | torch.optim.Optimizer | None = None,
        lr: float | None = None,
        copied: bool = False,
        seed: int | None = 0,
        **settings: Any,
    ) -> None:
        seed = fresh_seed() if seed is None else check_seed(seed)
        design = _design(design, {name: settings.pop(name) for name in sorted(_OF_DESIGN & settings.keys())})
        how: dict[str, Any] = {"feature_fn": feature_fn, "seed": seed, "copied": copied}
        adapted, self._design = _adapted(model, input_shape, design, **how)
        made = _optimizer(adapted, optimizer, lr)
        self._initial = {name: value.clone() for name, value in _trained(adapted).items()}
        self._watched = False
        super().__init__(adapted, sigma, input_shape=input_shape, optimizer=made, seed=seed, **settings)

    # ---- parts -----------------------------------------------------------------------------------------------------

    @property
    def extractor(self) -> nn.Module:
        """What makes the features; frozen."""
        return self._adapted.extractor

    @property
    def adapter(self) -> CertifyingAdapter:
        """The certifying adapter."""
        return self._adapted.adapter

    @property
    def design(self) -> AdapterDesign | None:
        """What the certifying adapter was made by; None for an `AdaptedClassifier` that was handed in."""
        return self._design

    @property
    def _adapted(self) -> AdaptedClassifier:
        adapted: AdaptedClassifier = self.model.base
        return adapted

    def _check_params(self) -> None:
        _check_optimizer(self._optimizer, self._adapted)
        super()._check_params()

    def __repr__(self) -> str:
        return f"{super().__repr__()[:-1]}, design={self._design!r})"

    # ---- training --------------------------------------------------------------------------------------------------

    def _fit(self, *args: Any, **how: Any) -> list[float]:
        with self._extractor_kept():
            return super()._fit(*args, **how)

    def _fit_generator(self, *args: Any, **how: Any) -> None:
        with self._extractor_kept():
            super()._fit_generator(*args, **how)

    @contextmanager
    def _extractor_kept(self) -> Iterator[None]:
        """Look whether the extractor is the same afterwards, once for blocks inside each other.

        Raises:
            ModelError: If it is not.
        """
        if self._watched:
            yield
            return
        before = self._adapted.extractor_fingerprint()
        self._watched = True
        try:
            yield
        finally:
            self._watched = False
        if self._adapted.extractor_fingerprint() != before:
            raise ModelError(
                "model: the extractor is not what it was before training; a part of it changes its own weights or "
                "buffers in eval mode, or another training changes them at the same time"
            )

    def reset(self) -> None:
        """Put certifying adapter and head back to what they were at first; the extractor stays as it is."""
        self._adapted.load_state_dict(self._initial, strict=False)

    def clone_for_refitting(self) -> "CertifyingAdapterClassifier":
        """Return a copy with the weights of the beginning, and a new optimiser of the same type and defaults."""
        clone = super().clone_for_refitting()
        for group in () if clone._optimizer is None else clone._optimizer.param_groups:
            group["params"] = list(clone._adapted.trainable_parameters())
        return clone

    # ---- files -------------------------------------------------------------------------------------------------------

    def _settings(self) -> dict[str, Any]:
        design = None if self._design is None else self._design.plain()
        return {**super()._settings(), "adam": _is_adam(self._optimizer, self._adapted), "design": design}

    @classmethod
    def load(
        cls,
        filename: str,
        path: str | None = None,
        *,
        model: nn.Module,
        feature_fn: FeatureFunction | None = None,
        optimizer: MakeOptimizer | torch.optim.Optimizer | None = None,
        family: Family = GaussianNoise,
        device_type: str | None = None,
    ) -> "CertifyingAdapterClassifier":
        """Return the classifier that `save` wrote; nothing in the files is executed.

        Args:
            filename: Name without ending.
            path: Folder; ART's data folder if not given.
            model: What the constructor took, or another classifier of that architecture; it stays as it is, whatever
                its weights. `reset` goes back to its last layer.
            feature_fn: The one that the constructor took, if any.
            optimizer: A function as the constructor takes it, to go on training with the saved state. Not needed if
                there was Adam over all trained parameters.
            family: The noise family, if it is not the Gaussian one.
            device_type: As in the constructor.

        Raises:
            InputError: If a file is missing, of another program, class or noise family.
            ModelError: If ``model`` has another architecture than the one saved.
        """
        where = stem(filename, path)
        settings = saved_settings(where, family)
        if "design" not in settings:
            raise InputError(f"filename: expected a file of {cls.__name__}, got one of SmoothedClassifier")
        design, fits, adam = (settings.pop(name) for name in ("design", "fits", "adam"))
        made = None if design is None or isinstance(model, AdaptedClassifier) else AdapterDesign(**design)
        settings |= {"optimizer": optimizer, "family": family, "device_type": device_type}
        classifier = cls(model, design=made, feature_fn=feature_fn, copied=True, **settings)
        if optimizer is None and not adam:
            classifier._optimizer = None
        load_weights(where, classifier.base_model, classifier._optimizer)
        classifier._fits = fits
        return classifier


def _design(design: AdapterDesign | None, settings: Mapping[str, Any]) -> AdapterDesign | None:
    """Return the design that is given as one or by its settings; None if neither is.

    Raises:
        InputError: If both are, or one is impossible.
    """
    if design is not None and not isinstance(design, AdapterDesign):
        raise InputError(f"design: expected an AdapterDesign or None, got {design!r}")
    if design is not None and settings:
        raise InputError(f"{min(settings)}: expected to be a part of the design, which is given, got it beside")
    return AdapterDesign(**settings) if settings else design


def _adapted(
    model: nn.Module,
    shape: Sequence[int] | None,
    design: AdapterDesign | None,
    *,
    feature_fn: FeatureFunction | None,
    copied: bool,
    seed: int,
) -> tuple[AdaptedClassifier, AdapterDesign | None]:
    """Return ``model`` with a certifying adapter, and the design by which it was made here."""
    check_noiseless(model, "model")
    check_flag(copied, "copied")
    if isinstance(model, AdaptedClassifier):
        for name, value in (("design", design), ("feature_fn", feature_fn)):
            if value is not None:
                raise InputError(f"{name}: expected None, as the model has a certifying adapter, got {value!r}")
        return (copy.deepcopy(model) if copied else model), None
    if shape is None:
        raise InputError(
            "input_shape: expected that of an image, such as (3, 32, 32), which the adapter is for, got none"
        )
    design = AdapterDesign() if design is None else design
    sizes = tuple(check_count(size, "input_shape") for size in shape)
    return adapt(model, sizes, design, feature_fn=feature_fn, seed=seed, copied=copied), design


def _optimizer(model: AdaptedClassifier, optimizer: Any, lr: float | None) -> torch.optim.Optimizer | None:
    """Return the optimiser that is given, that the function given makes, or Adam; None if nothing is to be trained."""
    parameters = list(model.trainable_parameters())
    if optimizer is None:
        rate = _LR if lr is None else check_positive(lr, "lr")
        return torch.optim.Adam(parameters, lr=rate) if parameters else None
    if lr is not None:
        raise InputError(f"lr: expected None, as the optimizer that is given has its own, got {lr!r}")
    made = optimizer(parameters) if callable(optimizer) else optimizer
    _check_optimizer(made, model)
    return made  # type: ignore[no-any-return]


def _check_optimizer(optimizer: Any, model: AdaptedClassifier) -> None:
    """Check that an optimiser steps parameters of certifying adapter and head alone.

    Raises:
        InputError: Otherwise.
    """
    if not isinstance(optimizer, torch.optim.Optimizer):
        return
    still = {id(parameter) for part in (model.extractor, model.normalise) for parameter in part.parameters()}
    trained = {id(parameter) for parameter in model.parameters()} - still
    if any(id(parameter) not in trained for group in optimizer.param_groups for parameter in group["params"]):
        raise InputError(
            "optimizer: expected one over parameters of the certifying adapter and the head alone, got one that holds "
            "others, which stay as they are; pass a function such as functools.partial(torch.optim.SGD, lr=0.1)"
        )


def _is_adam(optimizer: Any, model: AdaptedClassifier) -> bool:
    """Return whether ``optimizer`` is what is made by default, whatever its learning rate."""
    if type(optimizer) is not torch.optim.Adam:
        return False
    held = [[id(parameter) for parameter in group["params"]] for group in optimizer.param_groups]
    return held == [[id(parameter) for parameter in model.trainable_parameters()]]


def _trained(model: AdaptedClassifier) -> dict[str, Tensor]:
    """Return weights and buffers of certifying adapter, gate and head by name."""
    still = ("extractor.", "normalise.")
    return {name: value for name, value in model.state_dict().items() if not name.startswith(still)}
