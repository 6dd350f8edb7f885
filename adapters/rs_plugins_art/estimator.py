"""The part of the smoothed classifier that ART configures: construction, settings, checks of inputs, copies."""

import copy
import inspect
from collections.abc import Sequence
from typing import Any, Literal, TypeVar

import torch
from art.estimators.classification import PyTorchClassifier
from torch import Tensor, nn

from rs_plugins.core.checks import check_count
from rs_plugins.core.models import check_noiseless, device_and_dtype, probe
from rs_plugins.core.noise import Family, GaussianNoise
from rs_plugins.core.smoothing import NoiseMode, SmoothedModel, check_noise_mode
from rs_plugins.core.streams import stream
from rs_plugins.errors import InputError
from rs_plugins_art.arrays import to_images, to_targets
from rs_plugins_art.certifying import Certifying, of_module
from rs_plugins_art.neutral import (
    check_clip_values,
    check_host_words,
    check_loss,
    check_no_defence,
    check_optimizer,
    check_preprocessing,
)

E = TypeVar("E", bound="SmoothedEstimator")
Output = Literal["log_probs", "probs"]

_LEARNT = ("input_shape", "nb_classes")  # from the first batch, if not given


class SmoothedEstimator(Certifying, PyTorchClassifier):
    """What `SmoothedClassifier` is built on; see there."""

    preprocessing: Any
    preprocessing_defences: Any
    postprocessing_defences: Any

    estimator_params = [  # noqa: RUF012  a plain list is what the host extends and reads
        *(name for name in PyTorchClassifier.estimator_params if name not in ("use_amp", "opt_level", "loss_scale")),
        *("sigma", "samples", "noise", "output", "alpha", "seed", "chunk"),
    ]

    def __init__(
        self,
        model: nn.Module,
        sigma: float | None = None,
        *,
        loss: nn.Module | None = None,
        input_shape: Sequence[int] | None = None,
        nb_classes: int | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        samples: int = 32,
        noise: NoiseMode = "fixed",
        output: Output = "log_probs",
        family: Family = GaussianNoise,
        alpha: float = 0.001,
        seed: int | None = 0,
        chunk: int | None = None,
        channels_first: bool = True,
        clip_values: Any = (0.0, 1.0),
        device_type: str | None = None,
        **host: Any,
    ) -> None:
        check_host_words(host)
        check_noiseless(model, "model")
        if sigma is None:
            raise InputError("sigma: expected the standard deviation of the noise in pixels, what ART calls scale")
        smoothed = SmoothedModel(model, sigma, samples=samples, noise=noise, family=family, seed=seed, chunk=chunk)
        self._device_type = _device_type(model, device_type)
        self._fits = 0
        super().__init__(
            model=smoothed,
            loss=nn.CrossEntropyLoss() if loss is None else loss,
            input_shape=None,
            nb_classes=nb_classes,
            optimizer=optimizer,
            channels_first=channels_first,
            clip_values=clip_values,
            preprocessing=None,
            device_type=self._device_type,
        )
        self._layer_names = [name for name, _ in model.named_children()]
        self.output = output
        self.alpha = alpha
        self.input_shape = input_shape
        self._check_params()

    # ---- settings --------------------------------------------------------------------------------------------------

    noise = of_module("noise", check_noise_mode, "Which draws gradients see: fixed or fresh ones.")

    @property
    def output(self) -> Output:
        """What `predict` and `class_gradient` are of."""
        return self._output

    @output.setter
    def output(self, output: Output) -> None:
        if output not in ("log_probs", "probs"):
            raise InputError(f"output: expected 'log_probs' or 'probs', got {output!r}")
        self._output = output

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one image."""
        if self._input_shape is None:
            raise InputError("input_shape: not known before the first batch; pass input_shape=... to the constructor")
        return self._input_shape

    @input_shape.setter
    def input_shape(self, shape: Sequence[int] | None) -> None:
        if shape is not None and tuple(shape) != self._input_shape:
            sizes = [check_count(size, "input_shape") for size in shape]
            image = torch.rand(1, *sizes, generator=stream(0, "probe"))  # no constant: some models standardise
            self._meet(image.to(*self._place()))

    @property
    def nb_classes(self) -> int:
        """Number of classes; before the first batch what the last layer looks like, for attacks that ask so early."""
        classes = _guess_classes(self.base_model) if self._nb_classes is None else self._nb_classes
        if classes is None:
            raise InputError("nb_classes: not known before the first batch; pass nb_classes=... or input_shape=...")
        return classes

    @nb_classes.setter
    def nb_classes(self, classes: int | None) -> None:
        known = getattr(self, "_input_shape", None) is not None
        if classes is not None:
            classes = check_count(classes, "nb_classes", least=2)
        if known and classes not in (None, self._nb_classes):
            raise InputError(f"nb_classes: expected {self._nb_classes}, which the model returns, got {classes}")
        self._nb_classes: int | None = self._nb_classes if known else classes

    @property
    def layer_names(self) -> list[str]:
        """Names of the base model's top-level modules."""
        return self._layer_names

    @property
    def _device(self) -> torch.device:
        return self._place()[0]

    @_device.setter
    def _device(self, device: torch.device) -> None:
        """Ignore the device that the host's constructor chooses: the model stays where it is."""

    def _place(self) -> tuple[torch.device, torch.dtype]:
        """Return where the base model computes, and in which floating-point type."""
        base = self.base_model
        return device_and_dtype(base, None if _has_tensors(base) else self._device_type)

    def get_params(self) -> dict[str, Any]:
        """Return every setting by name; what is not known yet is None."""
        return {name: getattr(self, f"_{name}" if name in _LEARNT else name) for name in self.estimator_params}

    def set_params(self, **kwargs: Any) -> None:
        """Change settings, all of them or, if one is refused, none.

        Raises:
            InputError: If a name is unknown or a value impossible, or if ART would change images on their way to the
                model.
        """
        unknown = sorted(set(kwargs) - set(self.estimator_params))
        if unknown:
            raise InputError(f"set_params: expected names among {', '.join(self.estimator_params)}; got {unknown[0]!r}")
        if kwargs.pop("model", self.model) is not self.model:
            raise InputError("model: cannot be exchanged; make a new SmoothedClassifier")
        before, module_before = self.__dict__.copy(), self.model.__dict__.copy()
        try:
            super().set_params(**kwargs)
        except BaseException:
            self.__dict__.update(before)
            self.model.__dict__.update(module_before)
            self._update_preprocessing_operations()
            raise

    def _check_params(self) -> None:
        check_preprocessing(self.preprocessing)
        check_no_defence("preprocessing_defences", self.preprocessing_defences)
        check_no_defence("postprocessing_defences", self.postprocessing_defences)
        check_clip_values(self._clip_values)
        check_loss(self._loss)
        check_optimizer(self._optimizer, self.base_model)
        self._device_type = _device_type(self.base_model, self._device_type)
        self.preprocessing = self.preprocessing_defences = self.postprocessing_defences = None  # they are neutral
        self._update_preprocessing_operations()
        super()._check_params()

    # ---- inputs ----------------------------------------------------------------------------------------------------

    def _images(self, x: object) -> Tensor:
        """Return ``x`` as images (n, *input) in the model's floating-point type, after the checks.

        Raises:
            InputError: If they are no finite floating-point batch, or not of the known shape.
            ModelError: If this is the first batch and the model cannot classify it.
        """
        device, dtype = self._place()
        images = to_images(x, dtype)
        if self._input_shape is None and len(images):
            self._meet(images[:1].detach().to(device))
        elif self._input_shape is None:
            self.input_shape = images.shape[1:]
        elif tuple(images.shape[1:]) != self._input_shape:
            got, advice = tuple(images.shape), "; one image needs a batch axis, x[None]"
            raise InputError(
                f"x: expected a batch of images of shape {self._input_shape}, got shape {got}"
                f"{advice if got == self._input_shape else ''}"
            )
        return images

    def _meet(self, image: Tensor) -> None:
        """Learn the shape and the number of classes from ``image`` (1, *input)."""
        self._nb_classes = probe(self.base_model, image, self._nb_classes)
        self._input_shape = tuple(image.shape[1:])

    def _targets(self, y: object, n: int) -> Tensor:
        return to_targets(y, n=n, classes=self.nb_classes).to(self._device)

    # ---- copies ------------------------------------------------------------------------------------------------------

    def clone_for_refitting(self: E) -> E:
        """Return a copy with new weights, and a new optimiser of the same type and defaults."""
        clone = copy.deepcopy(self)
        clone.reset()
        clone._fits = 0
        if self._optimizer is not None:
            kind = type(self._optimizer)
            known = inspect.signature(kind).parameters
            defaults = {name: value for name, value in self._optimizer.defaults.items() if name in known}
            clone._optimizer = kind(clone.base_model.parameters(), **defaults)
        return clone

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        state.pop("_model_wrapper")  # a class made in a function: cannot be pickled
        return state | {"_model": self.model}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._model = self._make_model_wrapper(state["_model"])

    def __repr__(self) -> str:
        names = ("sigma", "samples", "noise", "output", "alpha", "seed", "chunk")
        settings = ", ".join(f"{name}={getattr(self, name)!r}" for name in names)
        return (
            f"{type(self).__name__}({self.base_model!r}, {settings}, input_shape={self._input_shape}, "
            f"nb_classes={self._nb_classes}, optimizer={self._optimizer!r})"
        )


def _has_tensors(model: nn.Module) -> bool:
    return any(True for _ in (*model.parameters(), *model.buffers()))


def _guess_classes(model: nn.Module) -> int | None:
    """Return the width of the last layer with parameters if it is linear; the first batch will tell for certain."""
    last = [module for module in model.modules() if next(module.parameters(recurse=False), None) is not None][-1:]
    return last[0].out_features if last and isinstance(last[0], nn.Linear) else None


def _device_type(model: nn.Module, device_type: str | None) -> str:
    """Return the type of the model's device, which must be the one named, if any; ART says "gpu" for "cuda"."""
    return device_and_dtype(model, "cuda" if device_type == "gpu" else device_type, "device_type")[0].type
