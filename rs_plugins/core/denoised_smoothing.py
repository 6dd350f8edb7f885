"""Denoised smoothing (Salman et al. 2020): a trainable denoiser before a classifier that stays as it is.

The denoiser learns by one of three objectives of a `DenoisedClassifier`. `DenoisingMSE` restores the image,
`DenoisingStability` restores what the classifier says of it. The third wants the true label: that is the cross-entropy
of the whole under noise, `rs_plugins.core.training.gaussian.Gaussian`, and needs no class of its own. The paper also
continues with the second after the first: train twice.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from rs_plugins.core.checks import check_count, check_flag, check_seed
from rs_plugins.core.frozen_copy import frozen_copy
from rs_plugins.core.global_randomness import torch_randomness
from rs_plugins.core.models import check_logits, check_noiseless, digest
from rs_plugins.core.objectives import noisy_logits
from rs_plugins.core.streams import stream
from rs_plugins.core.training.gaussian import Gaussian
from rs_plugins.core.training.losses import mean_cross_entropy
from rs_plugins.core.training.objective import Batch, Draws, Method, Objective
from rs_plugins.errors import InputError, ModelError

_EPS = 1e-4  # in batch normalisation, of the denoisers that Salman et al. (2020) published


class DnCNN(nn.Module):
    """The denoiser of Zhang et al. (2017), x - net(x): net says what is noise in (n, channels, height, width).

    net is convolution + ReLU, then ``depth`` - 2 times convolution + batch normalisation + ReLU, then a convolution,
    all 3x3 and padded, so an image may have any size. Convolutions have no bias, but for the first. Parameters are
    named as in the code of Salman et al. (2020), whose CIFAR-10 denoiser has the default settings. There a batch moves
    the running statistics by 0.95, so that they are almost those of the last batch; here by torch's 0.1.

    Args:
        channels: Of the images.
        depth: Number of convolutions, 17 in both papers.
        width: Channels between them, 64 in both papers.
        zero_init: Whether the last convolution is 0 at first. Then the denoiser begins as the identity, and a
            `DenoisedClassifier` as its classifier, to the bit; so it is in the code of Salman et al. (2020). False: it
            begins like the others, with the weights of He et al. (2015), as Zhang et al. (2017) do.
        seed: Of the initial weights, which are made on the CPU. The global generators are as before.

    Raises:
        InputError: If an argument has an impossible value.
    """

    def __init__(
        self, channels: int = 3, *, depth: int = 17, width: int = 64, zero_init: bool = True, seed: int = 0
    ) -> None:
        super().__init__()
        self.channels, width = check_count(channels, "channels"), check_count(width, "width")
        between = check_count(depth, "depth", least=2) - 2
        zero_init, source = check_flag(zero_init, "zero_init"), stream(check_seed(seed), "denoiser")
        with torch.device("cpu"), torch_randomness(source.initial_seed()):
            first = _conv(self.channels, width, bias=True)
            layers = [layer for _ in range(between) for layer in _block(width)]
            last = _conv(width, self.channels)
        if zero_init:
            nn.init.zeros_(last.weight)
        self.dncnn = nn.Sequential(first, nn.ReLU(inplace=True), *layers, last)

    def forward(self, x: Tensor) -> Tensor:
        """Return noisy images ``x`` (n, channels, height, width) without what is taken for noise; nothing is clipped.

        Raises:
            InputError: If they have another number of dimensions or channels.
        """
        if x.ndim != 4 or x.shape[1] != self.channels:
            expected = f"(n, {self.channels}, height, width)"
            raise InputError(f"x: expected images of shape {expected} to denoise, got shape {tuple(x.shape)}")
        clean: Tensor = x - self.dncnn(x)
        return clean


def _block(width: int) -> tuple[nn.Module, ...]:
    return _conv(width, width), nn.BatchNorm2d(width, eps=_EPS), nn.ReLU(inplace=True)


def _conv(inside: int, outside: int, *, bias: bool = False) -> nn.Conv2d:
    layer = nn.Conv2d(inside, outside, 3, padding=1, bias=bias)
    nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


class DenoisedClassifier(nn.Module):
    """A frozen classifier behind a denoiser: logits f(D(x)) of noisy images x (n, *input), which are never clipped.

    It is trained and certified like any other base classifier, but only the denoiser learns: the parameters of the
    classifier ask for no gradient, and it stays in eval mode whatever the whole is put into. Gradients in the image go
    through both.

    Attributes:
        denoiser: The module that was handed in; it follows the mode of the whole.
        classifier: A frozen copy of the module that was handed in, which stays as it was.

    Args:
        denoiser: (n, *input) to the same shape, in pixels.
        classifier: (n, *input) in pixels to logits (n, classes), with its normalisation inside. A
            `rs_plugins.core.black_box.BlackBox` will do, whose function is not copied; as no gradient flows through
            it, only `DenoisingMSE` can train a denoiser before it.

    Raises:
        InputError: If one of them is no module, or adds noise by itself.
        ModelError: If the classifier cannot be copied.
    """

    def __init__(self, denoiser: nn.Module, classifier: nn.Module) -> None:
        super().__init__()
        self.denoiser = check_noiseless(denoiser, "denoiser")
        self.classifier = frozen_copy(check_noiseless(classifier, "classifier"), own=True, name="classifier")

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits (n, classes) of noisy images ``x`` (n, *input)."""
        logits: Tensor = self.classifier(self.denoise(x))
        return logits

    def denoise(self, x: Tensor) -> Tensor:
        """Return what the classifier gets to see of noisy images ``x`` (n, *input), in the same shape.

        Raises:
            ModelError: If the denoiser returns something else.
        """
        clean = self.denoiser(x)
        if not isinstance(clean, Tensor) or clean.shape != x.shape:
            got = f"shape {tuple(clean.shape)}" if isinstance(clean, Tensor) else type(clean).__name__
            raise ModelError(f"denoiser: expected it to return images of shape {tuple(x.shape)}, got {got}")
        return clean

    def train(self, mode: bool = True) -> "DenoisedClassifier":
        """Put the denoiser into train mode, or eval mode, and leave the classifier in eval mode."""
        super().train(mode)
        self.classifier.eval()
        return self

    def trainable_parameters(self) -> list[nn.Parameter]:
        """Return the parameters of the denoiser that are to be trained."""
        return [parameter for parameter in self.denoiser.parameters() if parameter.requires_grad]

    def classifier_fingerprint(self) -> str:
        """Return `rs_plugins.core.models.digest` of the classifier, parameters and buffers: training never changes it.

        It differs from that of the module that was handed in if that one has changed meanwhile.
        """
        return digest(self.classifier)


@dataclass(frozen=True, kw_only=True)
class _OfADenoiser(Method):
    """What the objectives for a `DenoisedClassifier` have."""

    samples: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("samples", check_count)


@dataclass(frozen=True, kw_only=True)
class DenoisingMSE(_OfADenoiser):
    """The mean over images, draws, channels and pixels of (D(x + e_i) - x)², e_i ~ N(0, sigma² I).

    Salman et al. (2020) write the squared norm, a sum over channels and pixels; their code takes this mean. For the sum
    multiply by their number (`rs_plugins.core.training.objective.weighted`). The classifier is not called, and labels
    are not used.

    Args:
        sigma: Standard deviation of the noise, in pixels.
        samples: Noise draws per image and step (m); 1 in the paper's code.
        family: The noise family.

    Raises:
        InputError: If a setting has an impossible value.
    """

    def __call__(self, model: nn.Module, batch: Batch, draws: Draws) -> Tensor:
        """Return the loss of ``batch``.

        Raises:
            InputError: If ``model`` is no `DenoisedClassifier`.
        """
        model, x = _denoised(model), batch.x.unsqueeze(1)
        noisy = x + draws.noise(self.noise, batch.x, self.samples)
        error = model.denoise(noisy.flatten(0, 1)).reshape(noisy.shape) - x
        return error.to(torch.promote_types(error.dtype, torch.float32)).square().mean()


@dataclass(frozen=True, kw_only=True)
class DenoisingStability(_OfADenoiser):
    """(1/m) Σ_i CE(f(D(x + e_i)), argmax f(x)), e_i ~ N(0, sigma² I), a mean over images (Salman et al. 2020).

    What the classifier f says of the clean image takes the place of the label, so labels are not used.

    Args:
        sigma: Standard deviation of the noise, in pixels.
        samples: Noise draws per image and step (m); 1 in the paper's code.
        family: The noise family.

    Raises:
        InputError: If a setting has an impossible value.
    """

    def __call__(self, model: nn.Module, batch: Batch, draws: Draws) -> Tensor:
        """Return the loss of ``batch``.

        Raises:
            InputError: If ``model`` is no `DenoisedClassifier`.
        """
        model, x = _denoised(model), batch.x
        e = draws.noise(self.noise, x, self.samples)
        with torch.no_grad():
            said = check_logits(model.classifier(x), len(x)).argmax(dim=1)
        return mean_cross_entropy(noisy_logits(model, x, e), said)


def _denoised(model: nn.Module) -> DenoisedClassifier:
    if not isinstance(model, DenoisedClassifier):
        raise InputError(f"model: expected a DenoisedClassifier, got {type(model).__name__}")
    return model


DENOISING: Mapping[str, Any] = MappingProxyType(
    {"classification": Gaussian, "mse": DenoisingMSE, "stability": DenoisingStability}
)


def denoising_objective(name: str, sigma: float, **options: Any) -> Objective:
    """Return an objective that trains the denoiser of a `DenoisedClassifier`.

    Args:
        name: ``"mse"``, ``"stability"`` or ``"classification"``.
        sigma: Standard deviation of the noise, in pixels.
        options: Its options, such as ``samples``.

    Raises:
        InputError: If there is no such objective, it has no such option, or a value is impossible.
    """
    if name not in DENOISING:
        raise InputError(f"name: expected one of {', '.join(map(repr, DENOISING))}, got {name!r}")
    known = [option.name for option in fields(DENOISING[name]) if option.name != "sigma"]
    if unknown := options.keys() - set(known):
        raise InputError(f"{min(unknown)}: {name!r} has no such option, expected one of {', '.join(known)}")
    return DENOISING[name](sigma, **options)  # type: ignore[no-any-return]
