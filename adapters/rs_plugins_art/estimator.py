"""The part of the smoothed classifier that ART configures: construction and settings."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import nn

from rs_plugins.core.models import check_noiseless
from rs_plugins.core.noise import Family, GaussianNoise
from rs_plugins.core.smoothing import NoiseMode, SmoothedModel, check_noise_mode
from rs_plugins.errors import InputError
from rs_plugins_art.certifying import Certifying, of_module
from rs_plugins_art.neutral import check_host_words
from rs_plugins_art.pixel_estimator import PixelEstimator

Output = Literal["log_probs", "probs"]

_WORDS = {"scale": "sigma", "sample_size": "samples (for predict) and n0 (for certify)"}  # ART's, and ours


class SmoothedEstimator(Certifying, PixelEstimator):
    """What `SmoothedClassifier` is built on; see there."""

    estimator_params = [  # noqa: RUF012  a plain list is what the host extends and reads
        *PixelEstimator.estimator_params,
        *("sigma", "samples", "noise", "output", "alpha", "seed", "chunk"),
    ]
    _saved = (
        *PixelEstimator._saved,
        *("sigma", "samples", "noise", "output", "alpha", "seed", "chunk"),
    )

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
        check_host_words(host, "SmoothedClassifier", _WORDS)
        check_noiseless(model, "model")
        if sigma is None:
            raise InputError("sigma: expected the standard deviation of the noise in pixels, what ART calls scale")
        smoothed = SmoothedModel(model, sigma, samples=samples, noise=noise, family=family, seed=seed, chunk=chunk)
        super().__init__(
            smoothed,
            model,
            loss=loss,
            nb_classes=nb_classes,
            optimizer=optimizer,
            channels_first=channels_first,
            clip_values=clip_values,
            device_type=device_type,
        )
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

    def __repr__(self) -> str:
        names = ("sigma", "samples", "noise", "output", "alpha", "seed", "chunk")
        settings = ", ".join(f"{name}={getattr(self, name)!r}" for name in names)
        return (
            f"{type(self).__name__}({self.base_model!r}, {settings}, input_shape={self._input_shape}, "
            f"nb_classes={self._nb_classes}, optimizer={self._optimizer!r})"
        )
