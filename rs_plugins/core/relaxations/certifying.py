"""The deterministic certifier: an attack, then bounds from cheap to tight, each on the images that are still open.

The model is a copy in double precision by default. A margin has to exceed a slack that covers rounding by far; that is
an estimate and no proof.
"""

import platform
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

import rs_plugins
from rs_plugins.core.checks import (
    check_count,
    check_images,
    check_indices,
    check_labels,
    check_nonnegative,
    check_seed,
    check_several,
)
from rs_plugins.core.frozen_copy import frozen_copy, unwrapped
from rs_plugins.core.identity import identity, numerics
from rs_plugins.core.memory import is_of_memory
from rs_plugins.core.models import check_device, check_logits, device_and_dtype, probe
from rs_plugins.core.relaxations.bound_results import (
    ATTACK,
    BOUNDS,
    PREDICTION,
    Bound,
    BoundCertificate,
    BoundProvenance,
)
from rs_plugins.core.relaxations.falsifying import falsify, smallest_margin
from rs_plugins.core.relaxations.network import RelaxedNetwork
from rs_plugins.core.relaxations.open_images import Batch
from rs_plugins.core.relaxations.precision import full_precision
from rs_plugins.core.relaxations.regions import Norm, Region
from rs_plugins.core.relaxations.slack import ROUNDINGS, SLACK, slack
from rs_plugins.errors import InputError, ModelError, RSPluginsWarning

CASCADE: tuple[Bound, ...] = ("ibp", "crown-ibp", "crown")
DTYPES = (torch.float32, torch.float64)


def certify_bounds(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    eps: float,
    *,
    norm: str = "linf",
    cascade: Sequence[str] = CASCADE,
    alpha_steps: int = 20,
    attack_steps: int = 40,
    attack_restarts: int = 1,
    dtype: torch.dtype = torch.float64,
    batch_size: int = 32,
    device: torch.device | str | None = None,
    seed: int = 0,
    indices: Sequence[int] | None = None,
    progress: bool = False,
) -> list[BoundCertificate]:
    """Find out for each image whether a ball around it is classified rightly, all of it.

    In this order, each on the images that are still open: the prediction; an attack by projected gradients; the bounds
    of ``cascade``, up to the first by which all margins exceed the slack (`slack`). An error in any of these, such as
    too little memory for a single image, is a status of its own; the others go on.

    What is found for an image depends on it, the model and the settings, not on other images, but for rounding: the
    same image in another batch may get a margin that is other in its last digits.

    Args:
        model: (n, *input) in pixels to logits (n, classes), normalisation inside; a copy of it is certified.
        x: (n, *input), floating point, pixels in [0, 1].
        y: True classes, (n,).
        eps: Radius of the ball, in pixels.
        norm: ``"linf"``: the ball is cut off at the ends of [0, 1]. ``"l2"``.
        cascade: Which bounds, in order: of ``"ibp"``, ``"crown-ibp"``, ``"crown"``, ``"alpha-crown"``; see
            `cascade_up_to`.
        alpha_steps: Steps in which ``"alpha-crown"`` optimises its slopes.
        attack_steps: Steps of a run of the attack; 0 for none.
        attack_restarts: Runs of the attack; the first begins at the image, the others at random.
        dtype: Floating-point type of the copy: double precision, or single precision with a larger slack.
        batch_size: Images at once; fewer where memory is too small.
        device: Where to compute; where the model is by default.
        seed: Seed of the attack.
        indices: Position of each image in its data set, (n,); 0…n-1 by default.
        progress: Whether to show a progress bar.

    Returns:
        One record per image, in their order.

    Raises:
        InputError: If an argument has an impossible value.
        ModelError: If the model does not return logits, or has a module that bounds do not know, by its name.
    """
    places, size = check_indices(indices, len(check_images(x))), check_count(batch_size, "batch_size")
    certifier = BoundCertifier(
        *(model, tuple(x.shape[1:]), eps),
        norm=norm,
        cascade=cascade,
        alpha_steps=alpha_steps,
        attack_steps=attack_steps,
        attack_restarts=attack_restarts,
        dtype=dtype,
        device=device,
        seed=seed,
    )
    check_labels(y, n=len(x), classes=certifier.classes)
    certificates: list[BoundCertificate] = []
    with tqdm(total=len(x), desc="certify", unit="image", disable=not progress) as bar:
        for start in range(0, len(x), size):
            part = slice(start, start + size)
            certificates += certifier.batch(x[part], y[part], places[part])
            bar.update(len(certificates) - start)
    return certificates


def cascade_up_to(bound: str) -> tuple[Bound, ...]:
    """Return all bounds from the cheapest up to ``bound``.

    Raises:
        InputError: If there is no such bound.
    """
    (last,) = _check_cascade([bound])
    return BOUNDS[: BOUNDS.index(last) + 1]


class BoundCertifier:
    """Certifies images batch by batch, as `certify_bounds` does, whose arguments it has.

    Args:
        model: The classifier; it is copied here, and may change afterwards.
        shape: Shape of one image, (*input).
        eps: Radius of the ball, in pixels.

    Attributes:
        made_with: What is written into each certificate.
        classes: How many classes the model tells apart.

    Raises:
        InputError: If an argument has an impossible value.
        ModelError: If the model does not return logits, or has a module that bounds do not know, by its name.
    """

    def __init__(
        self,
        model: nn.Module,
        shape: tuple[int, ...],
        eps: float,
        *,
        norm: str = "linf",
        cascade: Sequence[str] = CASCADE,
        alpha_steps: int = 20,
        attack_steps: int = 40,
        attack_restarts: int = 1,
        dtype: torch.dtype = torch.float64,
        device: torch.device | str | None = None,
        seed: int = 0,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise InputError(
                f"model: expected a torch.nn.Module, which bounds can look into, got {type(model).__name__}"
            )
        self._norm = _check_norm(norm)
        self._eps = _check_eps(eps, self._norm)
        self._cascade, self._alpha_steps = _check_cascade(cascade), check_count(alpha_steps, "alpha_steps")
        self._attack_steps = check_count(attack_steps, "attack_steps", least=0)
        self._restarts, self._seed = check_count(attack_restarts, "attack_restarts"), check_seed(seed)
        if not isinstance(dtype, torch.dtype) or dtype not in DTYPES:
            raise InputError(f"dtype: expected torch.float64 or torch.float32, got {dtype}")
        model = unwrapped(model)
        self._device, self._dtype = device_and_dtype(model)[0] if device is None else check_device(device), dtype
        if self._device.type == "meta":
            raise InputError("device: expected a device that computes, got 'meta'")
        copy = frozen_copy(model, own=True).to(self._device, dtype)
        self._network = RelaxedNetwork(copy, shape)
        with full_precision(self._device, dtype):
            self.classes = probe(copy, torch.full((1, *shape), 0.5, device=self._device, dtype=dtype))
            self.made_with = self._provenance(model)
        self._most: dict[str, int] = {}  # images at once for which memory was enough

    def batch(self, x: Tensor, y: Tensor, indices: Sequence[int]) -> list[BoundCertificate]:
        """Return what is known about the images ``x`` (n, *input), pixels in [0, 1], with classes ``y`` (n,).

        ``indices`` are their positions in the data set.
        """
        batch = Batch(x.to(self._device, self._dtype), y.to(self._device).long(), self.classes)
        with full_precision(self._device, self._dtype), torch.no_grad():
            self._stage(PREDICTION, batch, self._predict)
            if self._attack_steps and self._eps:
                self._stage(ATTACK, batch, self._attack)
            for bound in self._cascade:
                self._stage(bound, batch, self._bound)
        return [
            BoundCertificate(
                *(index, label, found.prediction, found.status or "unknown", found.method, found.margin, found.slack),
                seconds=found.seconds,
                made_with=self.made_with,
                message=found.message,
                adversarial=found.adversarial,
            )
            for index, label, found in zip(indices, y.tolist(), batch.found, strict=True)
        ]

    def _stage(self, name: str, batch: Batch, work: Callable[[str, Batch, list[int]], None]) -> None:
        """Let ``work`` look at the images of ``batch`` that are open, in smaller parts where it fails.

        An error on a part is an error of none but the images that fail alone: the others have to go on.
        """
        rows = batch.open()
        most = self._most.get(name, len(rows))
        parts = [rows[start : start + most] for start in range(0, len(rows), max(1, most))]
        while parts:
            part, error, started = parts.pop(0), None, time.perf_counter()
            try:
                work(name, batch, part)
            except ModelError:  # a module that is not supported: of all images
                raise
            except Exception as caught:  # its traceback, and what it holds in memory, ends with this block
                error = f"{type(caught).__name__}: {caught}"
                if is_of_memory(caught):
                    self._most[name] = max(1, len(part) // 2)
            batch.book(part, time.perf_counter() - started)
            if error is not None and len(part) > 1:
                parts[:0] = [part[: len(part) // 2], part[len(part) // 2 :]]
            elif error is not None:
                batch.found[part[0]].end("failed", name, message=error)
            if error is not None and self._device.type == "cuda":
                torch.cuda.empty_cache()

    def _predict(self, name: str, batch: Batch, rows: list[int]) -> None:
        logits = check_logits(self._network.logits(batch.x[rows]), len(rows), self.classes)
        margins, classes = smallest_margin(logits, batch.y[rows]).tolist(), logits.argmax(dim=1)
        broken, right = logits.isnan().any(dim=1).tolist(), (classes == batch.y[rows]).tolist()
        for place, row in enumerate(rows):
            if broken[place]:
                batch.found[row].end("failed", name, message="the model returns NaN logits")
                continue
            batch.found[row].prediction = int(classes[place])
            if not right[place]:
                batch.found[row].end("misclassified", name, margins[place])

    def _attack(self, name: str, batch: Batch, rows: list[int]) -> None:
        images, margins = falsify(
            *(self._network.logits, batch.x[rows], batch.y[rows]),
            eps=self._eps,
            norm=self._norm,
            steps=self._attack_steps,
            restarts=self._restarts,
            seed=self._seed,
        )
        for row, image, margin in zip(rows, images.cpu(), margins.tolist(), strict=True):
            if margin < 0:
                batch.found[row].end("falsified", name, margin)
                batch.found[row].adversarial = image.clone()

    def _bound(self, name: str, batch: Batch, rows: list[int]) -> None:
        region, y = Region(batch.x[rows], self._eps, self._norm), batch.y[rows]
        method: Any = name
        if name == "alpha-crown":
            margins = self._network.alpha_margins(region, y, steps=self._alpha_steps)
        else:
            margins = self._network.margins(region, y, method=method)
        # NaN says nothing; fmax takes the other bound, and is NaN of two
        best = torch.fmax(batch.best[rows], margins)
        if bool(batch.terms[rows].isnan().any()):
            batch.terms[rows] = self._network.terms(batch.x[rows], y)
        enough = slack(best, batch.terms[rows])
        proved = (best.isfinite() & (best > enough)).all(dim=1).tolist()
        smallest = best.argmin(dim=1, keepdim=True)  # NaN is smaller than all numbers
        least, needed = (each.gather(1, smallest).squeeze(1).tolist() for each in (best, enough))
        batch.best[rows] = best
        for row, verified, margin, threshold in zip(rows, proved, least, needed, strict=True):
            batch.found[row].method, batch.found[row].margin, batch.found[row].slack = name, margin, threshold
            if verified:
                batch.found[row].status = "verified"

    def _provenance(self, model: nn.Module) -> BoundProvenance:
        settings = {"alpha-crown": f" ({self._alpha_steps} steps)"}
        runs = f"{self._restarts} run{'s' * (self._restarts > 1)} of {self._attack_steps} steps"
        return BoundProvenance(
            eps=self._eps,
            norm=self._norm,
            cascade=", ".join(f"{bound}{settings.get(bound, '')}" for bound in self._cascade),
            attack=f"{ATTACK}, {runs}" if self._attack_steps else "none",
            seed=self._seed,
            slack=f"{SLACK[self._dtype]:g}·(1 + |margin|) + {ROUNDINGS} roundings of all terms",
            dtype=str(self._dtype).removeprefix("torch."),
            device=self._device.type,
            numerics=numerics(self._device),
            model=identity(model),
            versions=(
                f"rs-plugins {rs_plugins.__version__}, torch {torch.__version__}, numpy {np.__version__}, "
                f"python {platform.python_version()}"
            ),
        )


def _check_norm(norm: str) -> Norm:
    for known in get_args(Norm):
        if isinstance(norm, str) and norm == known:
            return known  # type: ignore[no-any-return]
    raise InputError(f"norm: expected one of {', '.join(map(repr, get_args(Norm)))}, got {norm!r}")


def _check_eps(eps: float, norm: Norm) -> float:
    eps = check_nonnegative(eps, "eps")
    if norm == "linf" and eps > 1:
        warnings.warn(
            f"eps: {eps:g} is for pixels in [0, 1]; for a radius of {eps:g} in [0, 255] give {eps / 255:g}",
            RSPluginsWarning,
            stacklevel=4,
        )
    return eps


def _check_cascade(cascade: Sequence[str]) -> tuple[Bound, ...]:
    known = ", ".join(map(repr, get_args(Bound)))
    wanted = [] if isinstance(cascade, str) else check_several(cascade, "cascade", f"bounds out of {known}")
    for bound in wanted:
        if not isinstance(bound, str) or bound not in BOUNDS:
            raise InputError(f"cascade: expected bounds out of {known}, got {bound!r}")
    if not wanted or len(set(wanted)) < len(wanted):
        raise InputError(f"cascade: expected a list of different bounds out of {known}, got {cascade!r}")
    return tuple(bound for each in wanted for bound in BOUNDS if bound == each)
