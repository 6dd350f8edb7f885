"""Norms, directions and projections of perturbations of any rank; every function works per image."""

import torch
from torch import Tensor

from rs_plugins.errors import InputError


def expand_like(value: Tensor, reference: Tensor) -> Tensor:
    """Append dimensions to ``value`` (n,) until it broadcasts against ``reference`` (n, *input)."""
    return value.reshape(-1, *[1] * (reference.ndim - 1))


def at_least_single(x: Tensor) -> torch.dtype:
    """Return the type of ``x``, or single precision if that is half: that of perturbations and of sums over draws."""
    return torch.promote_types(x.dtype, torch.float32)


def per_image(value: float | Tensor, reference: Tensor, name: str) -> Tensor:
    """Return ``value``, a number or one per image, as a tensor that broadcasts against ``reference`` (n, *input).

    It is at least in single precision: half precision would round a radius up by as much as 0.4%.

    Raises:
        InputError: If it is neither, is negative, or is not finite.
    """
    try:
        tensor = torch.as_tensor(value, dtype=at_least_single(reference), device=reference.device).detach()
    except (TypeError, ValueError, RuntimeError):
        raise InputError(f"{name}: expected a number or one per image, got {value!r}") from None
    if tensor.numel() not in (1, len(reference)):
        shape = tuple(tensor.shape)
        raise InputError(
            f"{name}: expected a number or one per image ({len(reference)}), got a tensor of shape {shape}"
        )
    if not bool((tensor.isfinite() & (tensor >= 0)).all()):
        raise InputError(f"{name}: expected finite values >= 0, got {value}")
    return expand_like(tensor.reshape(-1), reference)


def l2_norm(delta: Tensor) -> Tensor:
    """Return the l2 norm of each image of ``delta`` (n, *input) as (n,); no overflow or underflow of the squares."""
    flat = delta.flatten(1)
    if flat.shape[1] == 0:
        return flat.new_zeros(len(flat))
    peak = flat.abs().amax(dim=1, keepdim=True)
    scale = torch.where(peak > 0, peak, torch.ones_like(peak))
    norm: Tensor = torch.linalg.vector_norm(flat / scale, dim=1)
    return norm * scale.squeeze(1)


def normalise_l2(gradient: Tensor, otherwise: Tensor) -> Tensor:
    """Return each image of ``gradient`` (n, *input) at unit l2 norm.

    An image whose gradient is zero or not finite gets the direction ``otherwise`` (broadcastable), at unit norm as well
    unless it is zero too.
    """
    peak, usable = _usable(gradient)
    direction = torch.where(usable, gradient / torch.where(usable, peak, torch.ones_like(peak)), otherwise)
    norm = expand_like(torch.linalg.vector_norm(direction.flatten(1), dim=1), direction)
    return direction / torch.where(norm > 0, norm, torch.ones_like(norm))


def sign_or(gradient: Tensor, otherwise: Tensor) -> Tensor:
    """Return the sign of each pixel of ``gradient`` (n, *input), 0 where it is 0, so that such a pixel stays.

    An image whose gradient is zero everywhere or not finite gets the signs of ``otherwise`` (broadcastable).
    """
    _, usable = _usable(gradient)
    return torch.where(usable, gradient, otherwise).sign()


def _usable(gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Return the largest size of a pixel of each image, and where that is finite and above 0, both broadcastable."""
    peak = expand_like(gradient.flatten(1).abs().amax(dim=1), gradient)  # NaN propagates through amax
    return peak, peak.isfinite() & (peak > 0)


def project_l2(delta: Tensor, eps: Tensor) -> Tensor:
    """Scale each image of ``delta`` (n, *input) down to l2 norm at most ``eps`` (broadcastable)."""
    norm = expand_like(l2_norm(delta), delta)
    return torch.where(norm > eps, delta * (eps / norm), delta)


def project_linf(delta: Tensor, eps: Tensor) -> Tensor:
    """Move each pixel of ``delta`` (n, *input) into [-eps, eps] (broadcastable)."""
    return delta.clamp(-eps, eps)


def project_box(delta: Tensor, x: Tensor) -> Tensor:
    """Change ``delta`` as little as needed for ``x + delta`` to lie in [0, 1]."""
    return (x + delta).clamp(0, 1) - x


def highest_l2(slope: Tensor, x: Tensor, eps: Tensor) -> Tensor:
    """Return argmax <slope, delta> over ||delta||_2 <= eps and x + delta in [0, 1], of the shape of ``x`` (n, *input).

    The maximiser is c·slope, cut off at the box, for that c at which its norm is ``eps`` (broadcastable); where all
    that has a slope is cut off sooner, it is shorter. A pixel cut off at some c is so at every larger one, and c grows
    with each that is. Every round finds another pixel, or is the last; a handful are usual.
    """
    wide = at_least_single(x)
    x, eps, size = x.to(wide), eps.to(wide), slope.abs().to(wide)
    most = torch.where(slope > 0, 1 - x, x).clamp(min=0)
    cut, nothing = torch.zeros_like(size, dtype=torch.bool), torch.zeros_like(size)
    while True:
        used = expand_like(l2_norm(most * cut), size)
        left = (eps - used).clamp(min=0).sqrt() * (eps + used).sqrt()  # eps² - used², without squares to overflow
        rest = left * normalise_l2(size * ~cut, otherwise=nothing)
        over = rest > most
        if not bool(over.any()):
            return (torch.where(cut, most, rest) * slope.sign()).to(slope.dtype)
        cut = cut | over


def add_inside(x: Tensor, delta: Tensor) -> Tensor:
    """Return ``x + delta`` in [0, 1] and of the type of ``x``, rounded towards ``x``.

    No pixel moves further than ``delta`` says, but for a rounding in single precision of how far it is: in half
    precision, where ``delta`` should be in single, a pixel that cannot move less than that stays where it is. Rounding
    to nearest adds up: on 150,528 equal pixels it makes a perturbation of l2 norm 1 longer by 1e-5.
    """
    wide = x.to(at_least_single(x))
    total = wide + delta
    total = torch.where((total - wide).abs() > delta.abs(), torch.nextafter(total, wide), total).clamp(0, 1)
    return total if x.dtype == wide.dtype else _halved(total, x)


def _halved(image: Tensor, x: Tensor) -> Tensor:
    """Return ``image``, in [0, 1], rounded towards ``x`` and to its half precision."""
    up = image >= x
    near = image.to(x.dtype)
    over = torch.where(up, near > image, near < image)
    # Of numbers >= 0 the next one has the next bits; not all versions of torch know nextafter for float16.
    return torch.where(over, (near.view(torch.int16) + torch.where(up, -1, 1).to(torch.int16)).view(x.dtype), near)
