"""Which of ART's settings keep radii in pixels: those that change nothing between the image and the model."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from art.preprocessing.standardisation_mean_std.numpy import StandardisationMeanStd
from art.preprocessing.standardisation_mean_std.pytorch import StandardisationMeanStdPyTorch
from torch import nn

from rs_plugins.errors import InputError

_DEFENCES = ("preprocessing_defences", "postprocessing_defences")
_MIXED_PRECISION = ("opt_level", "loss_scale")  # without effect where use_amp is False


def check_host_words(words: Mapping[str, Any], kind: str, ours: Mapping[str, str]) -> None:
    """Check what ART's own constructor takes and the class ``kind`` of ours only at its neutral value.

    Args:
        words: What was given beyond the parameters of that class.
        kind: Its name, for messages.
        ours: For words of ART that have another name here, that name.

    Raises:
        InputError: If a value is not neutral.
        TypeError: If a word is not one of them.
    """
    for name, value in words.items():
        if name == "preprocessing":
            check_preprocessing(value)
        elif name in _DEFENCES:
            check_no_defence(name, value)
        elif name == "use_amp":
            if value:
                raise InputError("use_amp: expected False; give a model that does its own autocasting instead")
        elif name not in _MIXED_PRECISION:
            hint = f"; the name here is {ours[name]}" if name in ours else ""
            raise TypeError(f"{kind}() got an unexpected keyword argument {name!r}{hint}")


def check_preprocessing(preprocessing: object) -> None:
    """Check that ``preprocessing`` is None, (0, 1) or a standardisation with mean 0 and standard deviation 1.

    Raises:
        InputError: Otherwise.
    """
    mean: Any = 0
    std: Any = 1
    if isinstance(preprocessing, StandardisationMeanStd | StandardisationMeanStdPyTorch):
        mean, std = preprocessing.mean, preprocessing.std
    elif isinstance(preprocessing, tuple | list) and len(preprocessing) == 2:
        mean, std = preprocessing
    elif preprocessing is not None:
        mean = None
    if mean is None or not (np.all(np.asarray(mean) == 0) and np.all(np.asarray(std) == 1)):
        raise InputError(
            f"preprocessing: expected the identity, None or (0, 1), got {preprocessing!r}; noise and radii are in "
            "pixels, so put normalisation inside the model as a layer"
        )


def check_no_defence(name: str, defences: object) -> None:
    """Check that no ART preprocessor or postprocessor is given.

    Raises:
        InputError: If one is.
    """
    if defences is not None and not (isinstance(defences, list | tuple) and not defences):
        raise InputError(
            f"{name}: expected None, got {defences!r}; a certificate covers the model alone, so put what changes its "
            "inputs or outputs inside the model"
        )


def check_clip_values(clip_values: Any) -> None:
    """Check that ``clip_values`` is None or says that pixels lie in [0, 1].

    Raises:
        InputError: Otherwise.
    """
    if clip_values is None:
        return
    low, high = clip_values if isinstance(clip_values, tuple | list | np.ndarray) and len(clip_values) == 2 else (1, 0)
    if not (np.all(np.asarray(low) == 0) and np.all(np.asarray(high) == 1)):
        raise InputError(f"clip_values: expected (0, 1) or None, got {clip_values}; images are pixels in [0, 1]")


def check_loss(loss: object) -> None:
    """Check that ``loss`` is plain cross-entropy, which is what our classifiers are trained and attacked with.

    Raises:
        InputError: Otherwise.
    """
    if not isinstance(loss, nn.CrossEntropyLoss) or loss.weight is not None or loss.label_smoothing:
        raise InputError(
            f"loss: expected torch.nn.CrossEntropyLoss() without weights or label smoothing, or None, got {loss!r}"
        )


def check_optimizer(optimizer: object, model: nn.Module) -> None:
    """Check that ``optimizer`` is None or steps some of the parameters of ``model``.

    Raises:
        InputError: Otherwise.
    """
    if optimizer is None:
        return
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise InputError(f"optimizer: expected a torch.optim.Optimizer or None, got {type(optimizer).__name__}")
    own = {id(parameter) for parameter in model.parameters()}
    if not any(id(parameter) in own for group in optimizer.param_groups for parameter in group["params"]):
        raise InputError("optimizer: expected one over the model's parameters, got one that would leave them untouched")


def check_neutral(estimator: Any) -> None:
    """Check that ``estimator`` shows its model the pixels themselves.

    Raises:
        InputError: If it preprocesses, or clips to another range than [0, 1].
    """
    check_preprocessing(estimator.preprocessing)
    check_no_defence("preprocessing_defences", estimator.preprocessing_defences)
    check_clip_values(estimator.clip_values)


def refuse_training_mode(training_mode: bool) -> None:
    """Refuse what the host's estimators offer and our classifiers cannot mean.

    Raises:
        InputError: If ``training_mode`` is true.
    """
    if training_mode:
        raise InputError("training_mode: expected False; the classifier is defined by its model in eval mode")


def norm_name(norm: Any) -> Any:
    """Return a norm by its name here, of ART's ``np.inf``, ``"inf"`` and 2; what is none is left to those who check."""
    return {2: "l2", np.inf: "linf", "inf": "linf"}.get(norm, norm)
