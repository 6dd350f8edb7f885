"""A frozen extractor, a certifying adapter and a head: the base classifier of Deng et al. (2024)."""

from collections.abc import Iterator
from contextlib import nullcontext
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor, nn

from rs_plugins.core.certifying_adapters.modules import CertifyingAdapter, TokenCertifyingAdapter
from rs_plugins.core.checks import check_flag
from rs_plugins.core.models import digest
from rs_plugins.errors import InputError, ModelError

if TYPE_CHECKING:
    from typing_extensions import Self

Combine = Literal["add", "gated"]


class AdaptedClassifier(nn.Module):
    """H(z + A(ν(x), z)) with z = h(ν(x)): pixels (n, *input) to logits (n, classes).

    The extractor h is frozen and stays in eval mode whatever `train` is told; the certifying adapter A and the head H
    are trained. Noisy pixels may leave [0, 1] and are not clipped. With A's last layer at 0 and the old head it is the
    classifier that it was made of.

    Args:
        extractor: h, from normalised images to features (n, p); its parameters are frozen, in place: pass a copy or an
            alias (`split_features` makes one) where the original is to be trained.
        adapter: A.
        head: H, features (n, p) to logits (n, classes).
        normalise: ν, a layer such as `rs_plugins.core.architectures.normalise.Normalise` if h and A take normalised
            images; None if they take pixels. There is no default, as a wrong guess normalises twice or not at all.
        combine: ``"add"``: z + A; ``"gated"``: γ·z + A, with a trained number γ for each feature, 1 at the start. What
            the extractor makes of a noisy image is of little use, and without γ only A could take it away. (A factor of
            A is in its last layer already.)
        freeze_head: Whether the head stays as it is, too, so that the certifying adapter alone is trained.

    Raises:
        InputError: If an argument is of the wrong kind.
    """

    def __init__(
        self,
        extractor: nn.Module,
        adapter: CertifyingAdapter,
        head: nn.Module,
        *,
        normalise: nn.Module | None,
        combine: Combine = "add",
        freeze_head: bool = False,
    ) -> None:
        super().__init__()
        for name, part in (("extractor", extractor), ("head", head)):
            if not isinstance(part, nn.Module):
                raise InputError(f"{name}: expected a torch.nn.Module, got {type(part).__name__}")
        if not isinstance(adapter, CertifyingAdapter):
            raise InputError(f"adapter: expected a CertifyingAdapter, got {type(adapter).__name__}")
        if normalise is not None and not isinstance(normalise, nn.Module):
            raise InputError(f"normalise: expected a layer such as Normalise(mean, std) or None, got {normalise!r}")
        if combine not in get_args(Combine):
            raise InputError(f"combine: expected one of {', '.join(map(repr, get_args(Combine)))}, got {combine!r}")
        if combine == "gated" and not adapter.reads_features:
            raise InputError(f"combine: a {adapter.kind!r} certifying adapter works inside the extractor, 'add' alone")
        self.normalise = nn.Identity() if normalise is None else normalise
        self.extractor = extractor
        self.adapter = adapter
        self.head = head
        self.gate = nn.Parameter(_gate(adapter, head)) if combine == "gated" else None
        frozen = [self.normalise, extractor, *([head] if check_flag(freeze_head, "freeze_head") else [])]
        for part in frozen:
            part.requires_grad_(False)
        self._still = tuple(part for part in ("normalise", "extractor", "head") if getattr(self, part) in frozen)
        self.train(self.training)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits (n, classes) of images ``x`` (n, *input), in pixels.

        Raises:
            ModelError: If the extractor does not return the features that the certifying adapter is for.
        """
        x = self.normalise(x)
        return self.classify(x, self.features(x))

    def features(self, x: Tensor) -> Tensor:
        """Return the extractor's features (n, p) of normalised images ``x``, corrected inside it where A does that.

        No graph is built where neither the images nor a correction inside the extractor ask for a gradient: all
        parameters of the extractor are frozen.
        """
        within = self.adapter.inside(self.extractor) if isinstance(self.adapter, TokenCertifyingAdapter) else None
        wanted = torch.is_grad_enabled() and (x.requires_grad or within is not None)
        with torch.set_grad_enabled(wanted), within or nullcontext():
            z: Tensor = self.extractor(x)
        if z.shape != (len(x), self.adapter.feature_dim):
            expected, got = (len(x), self.adapter.feature_dim), tuple(z.shape)
            raise ModelError(f"extractor: expected features of shape {expected}, got {got}")
        return z

    def classify(self, x: Tensor, z: Tensor) -> Tensor:
        """Return the logits (n, classes) of normalised images ``x`` with features ``z`` (n, p), as `features` gives."""
        if self.adapter.reads_features:
            z = (z if self.gate is None else self.gate * z) + self.adapter(x, z)
        logits: Tensor = self.head(z)
        return logits

    def train(self, mode: bool = True) -> "Self":
        """Put certifying adapter and head into train mode, or eval mode; what is frozen stays in eval mode."""
        super().train(mode)
        for name in self._still if hasattr(self, "_still") else ():
            getattr(self, name).eval()
        return self

    def trainable_parameters(self) -> Iterator[nn.Parameter]:
        """Yield the parameters that are trained: of the certifying adapter, its gate, and the head."""
        return (parameter for parameter in self.parameters() if parameter.requires_grad)

    @property
    def still(self) -> tuple[str, ...]:
        """Names of the parts that are frozen, whose memory may be that of the classifier it was made of."""
        return self._still

    def extractor_fingerprint(self) -> str:
        """Return a SHA-256 over the extractor's parameters and buffers, which training leaves as they are."""
        return digest(self.extractor)


def _gate(adapter: CertifyingAdapter, head: nn.Module) -> Tensor:
    """Return ones, one per feature, of the head's type and on its device."""
    like = next(head.parameters(), torch.empty(0))
    return torch.ones(adapter.feature_dim, device=like.device, dtype=like.dtype)
