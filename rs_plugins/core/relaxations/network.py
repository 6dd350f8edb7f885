"""A classifier together with lower bounds of its margins over a region: IBP, CROWN-IBP and CROWN."""

from collections.abc import Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from rs_plugins.core.checks import check_count, check_flag, check_positive
from rs_plugins.core.models import evaluating, frozen
from rs_plugins.core.relaxations.layers import Call, Statistics
from rs_plugins.core.relaxations.linear import Dense
from rs_plugins.core.relaxations.optimised import highest, intersection
from rs_plugins.core.relaxations.propagation import Ends, Propagation
from rs_plugins.core.relaxations.reading import read
from rs_plugins.core.relaxations.regions import Region, best, identity
from rs_plugins.core.relaxations.tracing import evaluate
from rs_plugins.errors import InputError, ModelError

Method = Literal["ibp", "crown-ibp", "crown"]
LowerSlope = Literal["adaptive", "parallel"]


class RelaxedNetwork(nn.Module):
    """A classifier that also bounds what it can say about a region of images.

    Bounds are differentiable in the parameters. These are looked up at each call: ``torch.func.functional_call`` works,
    also under ``torch.func.vmap``. The model is read once, with torch.fx, in eval mode: numbers that are no tensors, as
    the slope of a leaky ReLU, are those of that moment.

    * ``"ibp"``: interval bound propagation (Gowal et al. 2018).
    * ``"crown-ibp"``: a backward pass of linear bounds for the margins, with intervals before each activation
      (Zhang et al. 2020).
    * ``"crown"``: a backward pass for each layer before an activation as well (Zhang et al. 2018; DeepPoly).

    Each takes the best of all bounds that it computes, element by element.

    Args:
        model: From images (n, *shape), pixels in [0, 1], to logits (n, classes). Normalisation belongs inside.
        shape: Of an image, such as (3, 32, 32).

    Raises:
        InputError: If ``model`` is no module.
        ModelError: If it cannot be run on such images, or something in it is not supported; the message names it.
    """

    def __init__(self, model: nn.Module, shape: tuple[int, ...]) -> None:
        super().__init__()
        self._network, images = read(model, tuple(shape))
        self.model = model
        for points in (images, images.round(), images[:1]):
            self._check_reading(points)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of an image."""
        return self._network.shape

    @property
    def classes(self) -> int:
        """Number of logits."""
        return self._network.classes

    def logits(self, x: Tensor) -> Tensor:
        """Return the logits (n, classes) of images (n, *shape), as the model gives them."""
        logits: Tensor = self.model(x)
        return logits

    def forward(self, region: Region, y: Tensor, **options: Any) -> Tensor:
        """Return `margins`, for ``torch.func.functional_call``."""
        return self.margins(region, y, **options)

    def intervals(self, region: Region, statistics: Statistics | None = None) -> dict[str, Ends]:
        """Return the interval bounds (lower, upper) before each activation, (n, *node), in order of the forward pass.

        Args:
            region: Where the images are.
            statistics: As in `margins`.

        Raises:
            InputError: As `margins`.
            ModelError: As `margins`.
        """
        return self._propagation(region, statistics).before_activations()

    def margins(
        self,
        region: Region,
        y: Tensor,
        *,
        method: Method = "crown",
        lower_slope: LowerSlope = "adaptive",
        statistics: Statistics | None = None,
        intervals: Mapping[str, Ends] | None = None,
        chunk: int | None = None,
    ) -> Tensor:
        """Return lower bounds of logit_y - logit_k over the region, (n, classes - 1), k ascending without y.

        What is bounded is folded into the last affine layers, so these are tighter than bounds of single logits.

        Args:
            region: Where the images are.
            y: Labels (n,).
            method: See the class.
            lower_slope: Lower line of a ReLU whose sign is open: 0 or 1 as the interval is more negative or positive
                (``"adaptive"``, which jumps), or parallel to the upper one (``"parallel"``, continuous).
            statistics: Mean and variance that batch normalisations take instead of their own, by the names of the
                modules in the model; see `batch_statistics`.
            intervals: Bounds before activations that hold already, as from `intervals` on this region.
            chunk: How many values of a layer are bounded in one backward pass; None: as many as fit about 1 GiB. The
                bounds do not depend on it.

        Raises:
            InputError: If an argument does not fit the network.
            ModelError: If the model is in train mode and has dropout, or batch normalisation without ``statistics``.
        """
        rows = _margin_rows(y, self.classes, region.x)
        return self._lowest(region, rows, method, lower_slope, statistics, intervals, chunk)

    def terms(self, x: Tensor, y: Tensor) -> Tensor:
        """Return how large all is that adds up to logit_y - logit_k of images, (n, classes - 1), k ascending without y.

        The sum, over all values on the way, of how much the margin changes with a value times the sum of the sizes that
        it is computed from. Times the unit of rounding it says what bounds may be off by; see `slack`.

        Args:
            x: Images (n, *shape).
            y: Labels (n,).

        Raises:
            InputError: As `margins`.
            ModelError: As `margins`.
        """
        region = Region(x, 0.0)
        start = Dense(_margin_rows(y, self.classes, region.x))
        return self._propagation(region, None).terms(self._network.nodes[-1].name, start)

    def alpha_margins(
        self,
        region: Region,
        y: Tensor,
        *,
        steps: int = 20,
        lr: float = 0.1,
        intermediate: bool = False,
        lower_slope: LowerSlope = "adaptive",
        intervals: Mapping[str, Ends] | None = None,
        chunk: int | None = None,
    ) -> Tensor:
        """Return `margins` by ``"crown"`` with the lower slopes optimised for each margin, (n, classes - 1).

        Alpha-CROWN (Xu et al. 2021). The result is never below `margins` by ``"crown"``, and has no gradient. Bounds
        before activations are those of CROWN, unless ``intermediate`` asks for better ones.

        Args:
            region: Where the images are.
            y: Labels (n,).
            steps: How many steps of Adam, each a backward pass for the margins and its gradient.
            lr: Length of the first step; slopes are in [0, 1].
            intermediate: Whether slopes for the bounds before activations are optimised first, in as many steps. All
                neurons share these, so that a step costs as much as a pass of CROWN and its gradient.
            lower_slope: Where the slopes begin; as in `margins`, as are the rest.
            intervals: Bounds before activations that hold already.
            chunk: How many values of a layer are bounded in one backward pass.

        Raises:
            InputError: As `margins`.
            ModelError: As `margins`.
        """
        check_count(steps, "steps")
        check_positive(lr, "lr")
        check_flag(intermediate, "intermediate")
        output, start = self._network.nodes[-1].name, Dense(_margin_rows(y, self.classes, region.x))
        options: dict[str, Any] = {"lower_slope": lower_slope, "chunk": chunk}
        with frozen(self.model), torch.no_grad():
            work = self._propagation(region, None, known=intervals, **options)
            work.tighten()
            plain = best(work.minimum(output, start, far=True), work.minimum(output, start, far=False))
            ends, slopes = work.before_curved(), work.first_slopes(plain.shape[1])
            if intermediate:
                shared = {name: value[:, 0] for name, value in slopes.items()}

                def bound_anew(slopes: Mapping[str, Tensor]) -> Tensor:
                    work = self._propagation(region, None, known=intervals, slopes=slopes, **options)
                    work.tighten()
                    ends.update(intersection(ends, work.before_curved()))
                    return work.minimum(output, start, far=True)

                plain = best(highest(bound_anew, shared, steps=steps, lr=lr), plain)

            def bound(slopes: Mapping[str, Tensor]) -> Tensor:
                work = self._propagation(region, None, known=ends, slopes=slopes, **options)
                return work.minimum(output, start, far=True)

            return best(highest(bound, slopes, steps=steps, lr=lr), plain)

    def output_bounds(
        self,
        region: Region,
        *,
        method: Method = "crown",
        lower_slope: LowerSlope = "adaptive",
        statistics: Statistics | None = None,
        intervals: Mapping[str, Ends] | None = None,
        chunk: int | None = None,
    ) -> Ends:
        """Return bounds (lower, upper) of each logit over the region, both (n, classes); arguments as in `margins`.

        Raises:
            InputError: As `margins`.
            ModelError: As `margins`.
        """
        each = identity(self.classes, region.x)
        rows = torch.cat([each, -each]).unsqueeze(0)
        least = self._lowest(region, rows, method, lower_slope, statistics, intervals, chunk)
        return least[:, : self.classes], -least[:, self.classes :]

    def _lowest(
        self,
        region: Region,
        rows: Tensor,
        method: Method,
        lower_slope: LowerSlope,
        statistics: Statistics | None,
        intervals: Mapping[str, Ends] | None,
        chunk: int | None,
    ) -> Tensor:
        """Return lower bounds of <rows, logits>, (n, rows)."""
        _check_choice(method, Method, "method")
        work = self._propagation(region, statistics, lower_slope=lower_slope, known=intervals, chunk=chunk)
        if method == "crown":
            work.tighten()
        output, start = self._network.nodes[-1].name, Dense(rows)
        near = work.minimum(output, start, far=False)
        return near if method == "ibp" else best(work.minimum(output, start, far=True), near)

    def _propagation(
        self,
        region: Region,
        statistics: Statistics | None,
        *,
        lower_slope: LowerSlope = "adaptive",
        slopes: Mapping[str, Tensor] | None = None,
        known: Mapping[str, Ends] | None = None,
        chunk: int | None = None,
    ) -> Propagation:
        _check_choice(lower_slope, LowerSlope, "lower_slope")
        if tuple(region.x.shape[1:]) != self.shape:
            raise InputError(f"region: expected images (n, *{self.shape}), got shape {tuple(region.x.shape)}")
        if chunk is not None:
            check_count(chunk, "chunk")
        self._check_modules()
        strangers = set(known or ()) - {node.name for node in self._network.nodes if not node.linear}
        if strangers:
            raise InputError(f"intervals: expected those of this network's activations, got {min(strangers)!r} as well")
        constants = evaluate(self._network.constants, self._network.literals, self)
        call = Call(constants, statistics or {}, region.x)
        options: dict[str, Any] = {"lower_slope": lower_slope, "slopes": slopes, "known": known, "chunk": chunk}
        return Propagation(self._network, region, call, **options)

    def _check_modules(self) -> None:
        """Look whether the layers that were read are still those of the model.

        Raises:
            ModelError: If one is another module now.
        """
        for path, module in self._network.modules:
            now: Any = self.model
            for part in path.split(".") if path else ():
                now = getattr(now, part, None)
            if now is not module:
                raise ModelError(
                    f"model: {path}: expected the module that was there when the model was read, got "
                    f"{'none' if now is None else 'another'}; make a new {type(self).__name__} of the model"
                )

    def _check_reading(self, images: Tensor) -> None:
        """Look whether the layers that were read compute what the model does.

        Raises:
            ModelError: If they do not.
        """
        with evaluating(self.model), torch.no_grad():
            logits = self.model(images.clone())
            point = self._propagation(Region(images, 0.0), None).interval(self._network.nodes[-1].name)
        off = float((point.centre - logits).abs().max())
        if not off <= (1e-6 if logits.dtype == torch.float64 else 1e-3) * (1 + float(logits.abs().max())):
            raise ModelError(
                "model: its layers, as torch.fx reads them, give other logits than its forward pass; does it add "
                "noise, or depend on other images of the batch or their number?"
            )


def _margin_rows(y: Tensor, classes: int, like: Tensor) -> Tensor:
    """Return the rows onehot(y) - onehot(k), k ascending without y, (n, classes - 1, classes)."""
    each = identity(classes, like)
    others = torch.arange(classes - 1, device=like.device)
    others = others + (others >= y.unsqueeze(1))
    return each[y].unsqueeze(1) - each[others]


def _check_choice(value: object, choices: Any, name: str) -> None:
    if value not in get_args(choices):
        raise InputError(f"{name}: expected one of {', '.join(map(repr, get_args(choices)))}, got {value!r}")
