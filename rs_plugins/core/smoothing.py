"""The smoothed classifier: its soft vote, which can be differentiated and attacked, and its hard votes.

An attack or a prediction has no image index to key noise streams by. There one set of draws, made from the seed, serves
all images, so that results do not depend on how images are batched.
"""

import math
from collections.abc import Sequence
from functools import reduce
from typing import Literal

import torch
from torch import Tensor, nn

from rs_plugins.core.checks import check_count, check_seed
from rs_plugins.core.models import NoisyModule, check_logits, check_noiseless
from rs_plugins.core.noise import Family, GaussianNoise, Noise, make_noise
from rs_plugins.core.noise_promises import draw_into
from rs_plugins.core.objectives import LOG_MEAN_SOFTMAX, Logits, log_probabilities, noisy_logits, passes
from rs_plugins.core.procedures import Counts
from rs_plugins.core.streams import fresh_seed, stream
from rs_plugins.core.votes import Poll
from rs_plugins.errors import InputError

NoiseMode = Literal["fixed", "fresh"]


class SmoothedModel(NoisyModule):
    """A base classifier under noise: returns log((1/m) Σ_i softmax(f(x + e_i))), shape (n, classes).

    Cross-entropy of that output is the SmoothAdv objective (Salman et al. 2019), so an attack on this module attacks
    the smoothed classifier. In train mode each image gets one fresh draw instead, as in Gaussian training.

    Args:
        base: (n, *input) in pixels to logits (n, classes), normalisation inside.
        sigma: Standard deviation of the noise, in pixels.
        samples: Noise draws m, shared by all images.
        noise: ``"fixed"``: the same draws at every call. ``"fresh"``: new ones at every call.
        family: The noise family.
        seed: Seed of the draws; None takes one from the operating system.
        chunk: At most this many noisy images per forward pass of ``base``; chosen by device and size if not given.

    Raises:
        InputError: If an argument has an impossible value.
    """

    def __init__(
        self,
        base: nn.Module,
        sigma: float,
        *,
        samples: int = 32,
        noise: NoiseMode = "fixed",
        family: Family = GaussianNoise,
        seed: int | None = 0,
        chunk: int | None = None,
    ) -> None:
        super().__init__()
        self.base = check_noiseless(base, "base")
        self.family = family
        self._noise = make_noise(family, sigma)
        self.samples = check_count(samples, "samples")
        self.noise = check_noise_mode(noise)
        self.seed = fresh_seed() if seed is None else check_seed(seed)
        self.chunk = None if chunk is None else check_count(chunk, "chunk")
        self._calls = 0

    @property
    def sigma(self) -> float:
        """Standard deviation of the noise, in pixels."""
        return self._noise.sigma

    @sigma.setter
    def sigma(self, sigma: float) -> None:
        self._noise = make_noise(self.family, sigma)

    def forward(self, x: Tensor) -> Tensor:
        """Return the log-probabilities (n, classes) of the soft vote at ``x`` (n, *input)."""
        if self.training:
            self._calls += 1
            source = stream(self.seed, "training", self._calls, device=x.device)
            noisy = x + shared_draws(self._noise, len(x), x, source)
            return check_logits(self.base(noisy), len(x)).log_softmax(dim=1)
        return soft_vote(self.base, x, self.draws(x), chunk=self.chunk)

    def draws(self, x: Tensor) -> Tensor:
        """Return draws (samples, *input) to add to each image of ``x`` (n, *input).

        With ``noise="fixed"`` they are the same at every call, with ``"fresh"`` new ones.
        """
        if self.noise == "fixed":
            return self.fixed_draws(x)
        self._calls += 1
        source = stream(self.seed, "soft vote", self._calls, device=x.device)
        return shared_draws(self._noise, self.samples, x, source)

    def fixed_draws(self, x: Tensor) -> Tensor:
        """Return the draws (samples, *input) that the seed stands for, whatever ``noise`` says."""
        return shared_draws(self._noise, self.samples, x, stream(self.seed, "soft vote", device=x.device))

    def votes(self, x: Tensor, n: int, *, seed: int | None = 0, indices: Sequence[int] | None = None) -> Counts:
        """Return how many of ``n`` noisy copies of each image the base classifier puts into each class.

        Args:
            x: (images, *input), pixels in [0, 1].
            n: Noisy copies of each image, drawn from streams of their own, not from `draws`.
            seed: Seed of these streams; None takes one from the operating system.
            indices: Position of each image in its data set, on which its noise depends; 0, 1, … by default.
        """
        poll = Poll(self.base, x, self.sigma, family=self.family, seed=seed, indices=indices, chunk=self.chunk)
        return poll.votes(n)

    def extra_repr(self) -> str:
        """Return the settings for `repr`."""
        return f"{self._noise}, samples={self.samples}, noise={self.noise!r}, seed={self.seed}"


def check_noise_mode(noise: str) -> NoiseMode:
    """Return ``noise`` if it is ``"fixed"`` or ``"fresh"``.

    Raises:
        InputError: Otherwise.
    """
    if not isinstance(noise, str) or noise not in ("fixed", "fresh"):
        raise InputError(f"noise: expected 'fixed' or 'fresh', got {noise!r}")
    return noise  # type: ignore[return-value]


def shared_draws(noise: Noise, samples: int, x: Tensor, source: torch.Generator) -> Tensor:
    """Return ``samples`` draws (samples, *input) for images like those of ``x`` (n, *input)."""
    exact = torch.promote_types(x.dtype, torch.float32)
    out = torch.empty(samples, *x.shape[1:], dtype=exact, device=x.device)
    return draw_into(noise, out, source).to(x.dtype)


def soft_vote(logits: Logits, x: Tensor, draws: Tensor, *, chunk: int | None = None) -> Tensor:
    """Return log((1/m) Σ_i softmax(f(x + e_i))), (n, classes), by logsumexp: no clamp, no underflow.

    Args:
        logits: The base classifier f, (k, *input) to (k, classes).
        x: (n, *input), pixels.
        draws: The e_i, (m, *input).
        chunk: At most this many noisy images per forward pass.
    """
    images, parts = passes(x, draws, chunk)

    def log_sum(xs: Tensor) -> Tensor:
        shares = (log_probabilities(noisy_logits(logits, xs, part)).logsumexp(dim=1) for part in parts)
        return reduce(torch.logaddexp, shares)

    total = torch.cat([log_sum(xs) for xs in x.split(images)]) - math.log(len(draws))
    return total.masked_fill(total < torch.finfo(total.dtype).min / 2, -math.inf)


def soft_vote_gradient(
    logits: Logits, x: Tensor, y: Tensor, draws: Tensor, *, chunk: int | None = None
) -> tuple[Tensor, Tensor]:
    """Return J(x) = -log((1/m) Σ_i softmax(f(x + e_i))_y), (n,), and its gradient in x, (n, *input).

    `rs_plugins.core.objectives` has this loss and others.

    Works under `torch.no_grad` and `torch.inference_mode`, leaves the gradients of the parameters alone, and needs no
    more memory for more draws.

    Raises:
        ModelError: If no gradient flows from the logits to the input.
    """
    loss, gradient, _ = LOG_MEAN_SOFTMAX.look(logits, x, y, draws, chunk=chunk)
    return loss, gradient
