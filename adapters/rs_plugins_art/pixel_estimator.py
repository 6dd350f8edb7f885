"""An ART classifier that shows its model the pixels themselves: settings, checks of inputs, training, copies."""

import copy
import inspect
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, TypeVar

import torch
from art.estimators.classification import PyTorchClassifier
from torch import Tensor, nn
from tqdm.auto import tqdm

from rs_plugins.core.checks import check_count, check_images
from rs_plugins.core.models import device_and_dtype, probe
from rs_plugins.core.streams import stream
from rs_plugins.core.training.loop import Scheduler, train
from rs_plugins.core.training.objective import Objective
from rs_plugins.errors import InputError
from rs_plugins_art.arrays import to_images, to_targets, to_tensor
from rs_plugins_art.files import save_classifier, stem
from rs_plugins_art.fitting import gradients_kept, in_eval_mode, one_epoch
from rs_plugins_art.neutral import (
    check_clip_values,
    check_loss,
    check_no_defence,
    check_optimizer,
    check_preprocessing,
)

E = TypeVar("E", bound="PixelEstimator")

_LEARNT = ("input_shape", "nb_classes")  # from the first batch, if not given


class PixelEstimator(PyTorchClassifier):
    """A PyTorch classifier in ART whose ``model`` is a module of ours around the guest's, its ``base_model``.

    The guest's model stays on its device. Shape and number of classes are learnt from the first batch if not given.

    Args:
        model: The module of ours.
        base: The guest's.
        loss: None or ``torch.nn.CrossEntropyLoss()``.
        nb_classes: Number of classes, >= 2, or None.
        optimizer: Over parameters of ``base``, or None.
        channels_first: Where the colour channels are, for attacks that ask.
        clip_values: (0, 1), or None.
        device_type: The model's own device; only needed for a model without parameters.

    Raises:
        InputError: If an argument has an impossible value.
    """

    preprocessing: Any
    preprocessing_defences: Any
    postprocessing_defences: Any
    seed: Any
    _input_shape: tuple[int, ...] | None

    estimator_params = [  # noqa: RUF012  a plain list is what the host extends and reads
        name for name in PyTorchClassifier.estimator_params if name not in ("use_amp", "opt_level", "loss_scale")
    ]

    _saved: ClassVar[tuple[str, ...]] = ("input_shape", "nb_classes", "channels_first")  # settings in a file

    def __init__(
        self,
        model: nn.Module,
        base: nn.Module,
        *,
        loss: nn.Module | None,
        nb_classes: int | None,
        optimizer: torch.optim.Optimizer | None,
        channels_first: bool,
        clip_values: Any,
        device_type: str | None,
    ) -> None:
        self._device_type = _device_type(base, device_type)
        self._fits = 0
        super().__init__(
            model=model,
            loss=nn.CrossEntropyLoss() if loss is None else loss,
            input_shape=None,
            nb_classes=nb_classes,
            optimizer=optimizer,
            channels_first=channels_first,
            clip_values=clip_values,
            preprocessing=None,
            device_type=self._device_type,
        )
        self._layer_names = [name for name, _ in base.named_children()]

    # ---- settings --------------------------------------------------------------------------------------------------

    @property
    def base_model(self) -> nn.Module:
        """The guest's module."""
        raise NotImplementedError

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
            raise InputError(f"model: cannot be exchanged; make a new {type(self).__name__}")
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
        return self._checked(to_images(x, self._place()[1]))

    def _exact_images(self, x: object) -> Tensor:
        """Return ``x`` as `_images` does, but not rounded to half precision: a certificate is of the image as it is."""
        images = to_tensor(x, "x")
        return self._checked(to_images(images, torch.promote_types(images.dtype, torch.float32))).detach()

    def _checked(self, images: Tensor) -> Tensor:
        device, dtype = self._place()
        if self._input_shape is None and len(images):
            self._meet(images[:1].detach().to(device, dtype))
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

    # ---- training --------------------------------------------------------------------------------------------------

    def _fit(
        self,
        x: object,
        y: object,
        objective: Objective,
        *,
        nb_epochs: int,
        training_mode: bool,
        verbose: bool,
        **how: Any,
    ) -> list[float]:
        """Do what `fit` does and return the mean loss of each epoch."""
        if self._optimizer is None:
            raise InputError("optimizer: needed for training; pass one to the constructor")
        images = check_images(self._images(x), "x").detach()
        targets = to_targets(y, n=len(images), classes=self.nb_classes)
        self._fits += 1
        with gradients_kept(self.base_model):
            return train(
                self.base_model,
                images,
                targets.to(images.dtype) if targets.ndim == 2 else targets,
                objective if training_mode else in_eval_mode(objective),
                optimizer=self._optimizer,
                epochs=check_count(nb_epochs, "nb_epochs", least=0),
                seed=stream(self.seed, "fit", self._fits).initial_seed(),
                progress=verbose,
                **how,
            )

    def _fit_generator(
        self,
        generator: Any,
        objective: Objective,
        *,
        nb_epochs: int,
        first_epoch: int,
        scheduler: Scheduler | None,
        verbose: bool,
        after_epoch: Callable[[int, float], None] | None = None,
        **how: Any,
    ) -> None:
        """Do what `fit_generator` does; ``after_epoch`` is called with the number of each epoch and its mean loss."""
        first_epoch = check_count(first_epoch, "first_epoch", least=0)
        epochs = range(first_epoch, first_epoch + check_count(nb_epochs, "nb_epochs", least=0))
        for epoch in tqdm(epochs, desc="train", unit="epoch", disable=not verbose):
            total = seen = 0.0
            for x, y in one_epoch(generator):
                batch = {"batch_size": len(x), "nb_epochs": 1, "first_epoch": epoch, "verbose": False}
                (loss,) = self._fit(x, y, objective, **batch, **how)
                total, seen = total + loss * len(x), seen + len(x)
            if scheduler is not None:
                scheduler.step()
            if after_epoch is not None:
                after_epoch(epoch, total / seen)

    # ---- files and copies --------------------------------------------------------------------------------------------

    def save(self, filename: str, path: str | None = None) -> None:
        """Write ``<filename>.safetensors``, weights and settings, and ``<filename>.optimizer.pt`` if there is one.

        Args:
            filename: Name without ending.
            path: Folder; ART's data folder if not given.
        """
        save_classifier(stem(filename, path), self.base_model, self._settings(), self._optimizer)

    def _settings(self) -> dict[str, Any]:
        """Return what is saved beside the weights."""
        settings = {name: value for name, value in self.get_params().items() if name in self._saved}
        settings |= {"clip_values": self._clip_values is not None}
        return settings | {"fits": self._fits}  # so that a loaded classifier goes on with new noise

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


def _has_tensors(model: nn.Module) -> bool:
    return any(True for _ in (*model.parameters(), *model.buffers()))


def _guess_classes(model: nn.Module) -> int | None:
    """Return the width of the last layer with parameters if it is linear; the first batch will tell for certain."""
    last = [module for module in model.modules() if next(module.parameters(recurse=False), None) is not None][-1:]
    return last[0].out_features if last and isinstance(last[0], nn.Linear) else None


def _device_type(model: nn.Module, device_type: str | None) -> str:
    """Return the type of the model's device, which must be the one named, if any; ART says "gpu" for "cuda"."""
    return device_and_dtype(model, "cuda" if device_type == "gpu" else device_type, "device_type")[0].type
