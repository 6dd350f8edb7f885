"""The certifying adapters: small networks that correct the features of a frozen extractor (Deng et al. 2024)."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from threading import get_ident
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu

from rs_plugins.core.checks import check_count
from rs_plugins.errors import InputError, ModelError


class CertifyingAdapter(nn.Module):
    """Corrects the features of a frozen extractor; the correction is 0 at the start, unless told otherwise.

    Attributes:
        kind: Its name among the kinds.
        reads_features: Whether it corrects the features that the extractor gives, so that several certifying adapters
            can share one pass through it. Otherwise it changes what happens inside the extractor.
        feature_dim: Number of features (p).
    """

    kind: ClassVar[str]
    reads_features: ClassVar[bool] = True
    feature_dim: int

    def __init__(self, feature_dim: int) -> None:
        super().__init__()
        self.feature_dim = check_count(feature_dim, "feature_dim")

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        """Return what is to be added to the features.

        Args:
            x: What the extractor was given, (n, *input).
            z: Its features, (n, p).
        """
        raise NotImplementedError


class ImageCertifyingAdapter(CertifyingAdapter):
    """A network beside the extractor that reads the image: z + W·B(x) (the layout of Deng et al. 2024).

    Args:
        backbone: B, a network from what the extractor is given, (n, *input), to (n, backbone_dim).
        feature_dim: Number of features of the extractor (p).
        backbone_dim: Number of features of the backbone; None: as many as the extractor has.
        zero_init: Whether W begins as 0, so that the classifier begins as it was; False: as in PyTorch's layers.

    Raises:
        InputError: If an argument has an impossible value.
    """

    kind = "image"

    def __init__(
        self, backbone: nn.Module, feature_dim: int, *, backbone_dim: int | None = None, zero_init: bool = True
    ) -> None:
        super().__init__(feature_dim)
        self.backbone = backbone
        inside = feature_dim if backbone_dim is None else check_count(backbone_dim, "backbone_dim")
        self.last = _last(inside, feature_dim, zero_init)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        """Return W·B(x), (n, p), of images ``x`` (n, *input); the features ``z`` are not looked at.

        Raises:
            ModelError: If the backbone does not return features of the width that was promised.
        """
        found = self.backbone(x)
        if found.shape != (len(x), self.last.in_features):
            expected, got = (len(x), self.last.in_features), tuple(found.shape)
            raise ModelError(f"backbone: expected features of shape {expected}, got {got}")
        correction: Tensor = self.last(found)
        return correction


class FeatureCertifyingAdapter(CertifyingAdapter):
    """A bottleneck on the features: z + W2·GELU(W1·z).

    Args:
        feature_dim: Number of features of the extractor (p).
        hidden: Width between W1 and W2; None: p/2.
        zero_init: Whether W2 begins as 0, so that the classifier begins as it was; False: as in PyTorch's layers.

    Raises:
        InputError: If an argument has an impossible value.
    """

    kind = "feature"

    def __init__(self, feature_dim: int, *, hidden: int | None = None, zero_init: bool = True) -> None:
        super().__init__(feature_dim)
        width = max(1, feature_dim // 2) if hidden is None else check_count(hidden, "hidden")
        self.first = nn.Linear(feature_dim, width)
        self.last = _last(width, feature_dim, zero_init)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        """Return W2·GELU(W1·z), (n, p), of the features ``z`` (n, p); the images ``x`` are not looked at."""
        correction: Tensor = self.last(gelu(self.first(z)))
        return correction


class TokenCertifyingAdapter(CertifyingAdapter):
    """Bottlenecks inside a transformer: t + W2·GELU(W1·LN(t)) of the tokens t that each of some blocks returns.

    The blocks must not be under gradient checkpointing where a gradient is taken, as they would be computed again
    without their bottlenecks. The re-entrant kind is refused; with the other kind, torch's backward pass raises an
    error of its own (``CheckpointError``).

    Args:
        sites: Names of the blocks in the extractor, each of which returns tokens (n, tokens, width).
        width: Of the tokens.
        feature_dim: Number of features of the extractor (p).
        hidden: Width between W1 and W2.
        zero_init: Whether each W2 begins as 0, so that the classifier begins as it was; False: as in PyTorch's layers.

    Raises:
        InputError: If an argument has an impossible value.
    """

    kind = "token"
    reads_features = False

    def __init__(
        self, sites: Sequence[str], width: int, feature_dim: int, *, hidden: int = 64, zero_init: bool = True
    ) -> None:
        super().__init__(feature_dim)
        if isinstance(sites, str) or not sites or len(set(sites)) < len(sites):
            raise InputError(f"sites: expected names of blocks, each once, got {sites!r}")
        check_count(width, "width")
        check_count(hidden, "hidden")
        self.sites = tuple(sites)
        self.bottlenecks = nn.ModuleList(_Bottleneck(width, hidden, zero_init) for _ in sites)

    @contextmanager
    def inside(self, extractor: nn.Module) -> Iterator[None]:
        """Correct the tokens of ``extractor`` in the block; afterwards it is as before, also after an exception.

        Only of what this thread runs: others may run the same extractor at the same time, with their own corrections.

        Raises:
            InputError: If it has no block of one of the names.
            ModelError: If one of the blocks does not run, returns no tokens, or keeps no graph where one is asked for.
        """
        parts = dict(extractor.named_modules())
        if missing := [site for site in self.sites if site not in parts]:
            raise InputError(f"sites: the extractor has no module {missing[0]!r}")
        corrections = [_Correction(*pair) for pair in zip(self.bottlenecks, self.sites, strict=True)]
        handles = [
            parts[site].register_forward_hook(correction)
            for site, correction in zip(self.sites, corrections, strict=True)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
        if idle := [site for site, correction in zip(self.sites, corrections, strict=True) if not correction.ran]:
            raise ModelError(f"sites: expected {idle[0]} to run in the thread that runs the extractor, but it did not")


class _Bottleneck(nn.Module):
    def __init__(self, width: int, hidden: int, zero_init: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.first = nn.Linear(width, hidden)
        self.last = _last(hidden, width, zero_init)

    def forward(self, tokens: Tensor) -> Tensor:
        correction: Tensor = self.last(gelu(self.first(self.norm(tokens))))
        return tokens + correction


class _Correction:
    """A forward hook that puts corrected tokens in the place of those that a block returns, in the thread that made it.

    Attributes:
        ran: Whether it was asked to.
    """

    def __init__(self, bottleneck: nn.Module, site: str) -> None:
        self._bottleneck, self._site = bottleneck, site
        self._thread: int | None = get_ident()
        self._graph = torch.is_grad_enabled()
        self.ran = False

    def __deepcopy__(self, memo: object) -> "_Correction":
        """Return a hook that does nothing: another thread may copy the extractor meanwhile."""
        twin = copy.copy(self)
        twin._thread = None
        return twin

    def __call__(self, _module: nn.Module, _inputs: object, tokens: object) -> Tensor | None:
        if self._thread != get_ident():  # at which torch.compile breaks its graph, so compiled code asks, too
            return None
        self.ran = True
        if not isinstance(tokens, Tensor) or tokens.ndim != 3:
            got = tuple(tokens.shape) if isinstance(tokens, Tensor) else type(tokens).__name__
            raise ModelError(f"sites: expected {self._site} to return tokens (n, tokens, width), got {got}")
        if self._graph and not torch.is_grad_enabled():
            raise ModelError(
                f"sites: expected {self._site} to keep a graph for gradients, but it runs without; switch gradient "
                "checkpointing of the extractor off, or run the model under torch.no_grad()"
            )
        corrected: Tensor = self._bottleneck(tokens)
        return corrected


def _last(inside: int, outside: int, zero_init: bool) -> nn.Linear:
    layer = nn.Linear(inside, outside)
    if zero_init:
        with torch.no_grad():
            layer.weight.zero_()
            layer.bias.zero_()
    return layer
