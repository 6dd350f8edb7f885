"""Intervals forward and linear bounds backward through the layers of a network, on one region."""

import sys
from collections.abc import Callable, Mapping
from typing import cast

import torch
from torch import Tensor

from rs_plugins.core.relaxations.activations import Activation, Lines, Slope
from rs_plugins.core.relaxations.layers import Affine, Call, Convolution, Diagonal, Sum
from rs_plugins.core.relaxations.linear import Coefficients, Dense
from rs_plugins.core.relaxations.patches import Patches
from rs_plugins.core.relaxations.pooling import Choice, MaxPool
from rs_plugins.core.relaxations.reading import INPUT, Network, Node
from rs_plugins.core.relaxations.regions import Interval, Region, best

Ends = tuple[Tensor, Tensor]
_WORTH_ALL = 0.5  # single rows cost about twice as much each as rows of whole channels
_AT_ONCE = 2**25  # coefficients of a node in one backward pass


class Propagation:
    """What is known of the values of each node while the images are in the region; made for one call.

    ``curved`` are the nodes that are not affine, in the order of the forward pass.

    Args:
        network: The layers.
        region: Where the images are.
        call: What the layers need besides.
        lower_slope: Which lower line an activation gets where there is a choice.
        slopes: Lower slopes of some activations instead, by their names, (n, *node) or (n, rows, *node).
        known: Bounds (lower, upper) before nodes that are not affine, by their names, that hold already.
        chunk: How many rows go into a backward pass; None: as many as fit a fixed amount of memory.
    """

    def __init__(
        self,
        network: Network,
        region: Region,
        call: Call,
        *,
        lower_slope: Slope = "adaptive",
        slopes: Mapping[str, Tensor] | None = None,
        known: Mapping[str, Ends] | None = None,
        chunk: int | None = None,
    ) -> None:
        self.network, self.region, self.call = network, region, call
        self._slope, self._slopes, self._chunk = lower_slope, dict(slopes or {}), chunk
        self._nodes = {node.name: node for node in network.nodes}
        self.curved = [node for node in network.nodes if not node.linear]
        self._known: dict[str, Ends] = dict(known or {})
        self._intervals: dict[str, Interval] = {INPUT: region.interval()}
        self._lines: dict[str, Lines | Choice] = {}

    def interval(self, name: str) -> Interval:
        """Return the interval of a node's output."""
        if name not in self._intervals:
            node = self._nodes[name]
            layer = node.layer
            if node.linear:
                inputs = (self.interval(before) for before in node.inputs)
                self._intervals[name] = cast(Affine, layer).interval(self.call, *inputs)
            else:
                self._intervals[name] = Interval.between(*cast(Activation | MaxPool, layer).interval(*self.ends(node)))
        return self._intervals[name]

    def ends(self, node: Node) -> Ends:
        """Return the bounds (lower, upper) before a node that is not affine."""
        for earlier in self.curved:  # one after the other, so that a deep network is no deep recursion
            if node.name in self._known:
                break
            if earlier.name not in self._known:
                before = self.interval(earlier.inputs[0])
                self._known[earlier.name] = (before.lower, before.upper)
        return self._known[node.name]

    def before_activations(self) -> dict[str, Ends]:
        """Return the bounds (lower, upper) before each activation, by its name."""
        return {node.name: self.ends(node) for node in self.curved if not isinstance(node.layer, MaxPool)}

    def before_curved(self) -> dict[str, Ends]:
        """Return the bounds (lower, upper) before each node that is not affine, by its name."""
        return {node.name: self.ends(node) for node in self.curved}

    def first_slopes(self, rows: int) -> dict[str, Tensor]:
        """Return the lower slopes of the activations that may have others, the same for each row: (n, rows, *node)."""
        found = {}
        for node in self.curved:
            if not isinstance(node.layer, MaxPool) and cast(Activation, node.layer).adjustable:
                slope = cast(Lines, self._relaxed(node)).lower_slope
                found[node.name] = slope.unsqueeze(1).expand(-1, rows, *node.shape)
        return found

    def tighten(self) -> None:
        """Bound what goes into each node that is not affine by a backward pass of its own, from the first to the last.

        The better of both bounds is kept, element by element, and what follows makes use of it. Where intervals are
        exact, or better bounds would change nothing, there is no pass.
        """
        for node in self.curved:
            (source,) = node.inputs
            straight = source == INPUT or self._nodes[source].linear
            if straight and not self.interval(source).exact:
                self._known[node.name] = self._tightened(node, source, *self.ends(node))

    def terms(self, source: str, coefficients: Coefficients) -> Tensor:
        """Return the sum of the sizes of all that adds up to `minimum` of the same, (n, rows).

        For each node |A| times the sum of the sizes that its values are computed from, over all nodes: times the unit
        of rounding it says how far off sums may be.
        """
        sizes: list[Tensor] = []

        def weigh(name: str, here: Coefficients) -> None:
            sizes.append(-here.concretise(self._sizes(name)))

        self.minimum(source, coefficients, far=True, visit=weigh)
        return torch.stack(sizes).sum(0)

    def _sizes(self, name: str) -> Interval:
        """Return what a node's values are summed from, as intervals around 0."""
        layer = None if name == INPUT else self._nodes[name].layer
        if layer is None or not self._nodes[name].linear:
            size = self._largest(name)
        else:
            before = (self._largest(each) for each in self._nodes[name].inputs)
            found = cast(Affine, layer).interval(self.call, *(Interval(torch.zeros_like(z), z) for z in before))
            size = found.centre.abs() + found.radius
        return Interval(torch.zeros_like(size), size)

    def _largest(self, name: str) -> Tensor:
        interval = self.interval(name)
        return interval.centre.abs() + interval.radius

    def minimum(
        self,
        source: str,
        coefficients: Coefficients,
        *,
        far: bool,
        visit: Callable[[str, Coefficients], None] | None = None,
    ) -> Tensor:
        """Return a lower bound of <A_k, z> for the output z of a node, (n, rows).

        Args:
            source: The node.
            coefficients: A.
            far: Whether to go back to the images. If not, the nearest intervals behind nodes that are not affine are
                made use of, which folds A into the last affine layers.
            visit: Called with the name of each node on the way and its coefficients.
        """
        pending, total = {source: coefficients}, torch.zeros((), dtype=self.call.like.dtype)
        total = total.to(self.call.like.device)
        for node in reversed(self.network.nodes):
            if node.name not in pending or (not far and not node.linear):
                continue
            here = pending.pop(node.name)
            if visit is not None:
                visit(node.name, here)
            parts, offset = self._pull(node, here)
            total = total if offset is None else total + offset
            for before, part in zip(node.inputs, parts, strict=True):
                pending[before] = pending[before].plus(part) if before in pending else part
        for name, rest in pending.items():
            if visit is not None:
                visit(name, rest)
            total = total + rest.concretise(self.region if name == INPUT else self.interval(name))
        return total

    def _pull(self, node: Node, coefficients: Coefficients) -> tuple[tuple[Coefficients, ...], Tensor | None]:
        """Return the coefficients of a node's inputs for those of its output, and what is added to the constant."""
        if node.linear:
            return cast(Affine, node.layer).pull(self.call, coefficients)
        if node.name not in self._lines:
            self._lines[node.name] = self._relaxed(node)
        lines = self._lines[node.name]
        if isinstance(lines, Choice):
            pooled, constant = cast(MaxPool, node.layer).through(coefficients, lines)
            return (pooled,), constant
        before, offset = coefficients.through_activation(lines)
        return (before,), offset

    def _relaxed(self, node: Node) -> Lines | Choice:
        lower, upper = self.ends(node)
        if isinstance(node.layer, MaxPool):
            return node.layer.choice(lower, upper)
        return cast(Activation, node.layer).lines(lower, upper, self._slopes.get(node.name, self._slope))

    def _tightened(self, node: Node, source: str, lower: Tensor, upper: Tensor) -> Ends:
        """Return the better of the bounds (lower, upper) and those by backward passes; settled neurons keep theirs."""
        shape, settled = tuple(lower.shape[1:]), _settled(node, lower, upper)
        rows = _open_rows(settled)
        if not len(rows):
            return lower, upper
        at_once = self._rows_at_once(source, shape, len(lower))
        if len(shape) == 3:
            rows, at_once = _whole_channels(rows, at_once, shape)
        ends = [self._bounded(source, shape, some) for some in rows.split(at_once)]
        old = (lower.flatten(1), -upper.flatten(1))
        fixed = settled.flatten(1)[:, rows]
        new = []
        for worse, parts in zip(old, zip(*ends, strict=True), strict=True):
            # whether a neuron is settled in another image must not matter: bounds do not depend on the batch
            before = worse[:, rows]
            better = torch.where(fixed, before, best(before, torch.cat(parts, 1)))
            new.append(worse.index_copy(1, rows, better).view_as(lower))
        return new[0], -new[1]

    def _bounded(self, source: str, shape: tuple[int, ...], rows: Tensor) -> Ends:
        """Return lower bounds of some values of a node's output and of their negatives, each (n, rows)."""
        form = Patches if len(shape) == 3 else Dense
        start: Coefficients = form.identity(shape, rows, self.call.like)
        return self.minimum(source, start, far=True), self.minimum(source, start.negative(), far=True)

    def _rows_at_once(self, source: str, shape: tuple[int, ...], images: int) -> int:
        return self._chunk or max(_AT_ONCE // (max(images, 1) * self._longest_row(source, shape)), 1)

    def _longest_row(self, source: str, shape: tuple[int, ...]) -> int:
        """Return how many coefficients of a node a row may have on its way back from ``source``."""
        everything = (sys.maxsize, 1)
        windows = {source: (1, 1) if len(shape) == 3 else everything}
        longest = 1
        for node in reversed(self.network.nodes):
            if node.name not in windows:
                continue
            window = windows.pop(node.name)
            longest = max(longest, _coefficients(node.shape, window))
            kernel = node.layer.kernel() if isinstance(node.layer, Convolution) else None
            if kernel is not None:
                window = kernel.window(window)
            elif not isinstance(node.layer, Diagonal | Sum) and node.linear:
                window = everything
            for before in node.inputs:
                windows[before] = max(window, windows.get(before, window))
        return max(longest, *(_coefficients(self.network.shape, window) for window in windows.values()))


def _coefficients(shape: tuple[int, ...], window: tuple[int, int]) -> int:
    """Return how many values of a node of this shape are in a window of it."""
    size = torch.Size(shape).numel()
    return min(size, shape[0] * window[0] * window[1]) if len(shape) == 3 else size


def _whole_channels(rows: Tensor, at_once: int, shape: tuple[int, ...]) -> tuple[Tensor, int]:
    """Return what is faster than most of the single rows: all of them, by whole channels where that many go at once."""
    size, area = torch.Size(shape).numel(), shape[1] * shape[2]
    if at_once < area or len(rows) < _WORTH_ALL * size:
        return rows, at_once
    return torch.arange(size, device=rows.device), at_once - at_once % area


def _settled(node: Node, lower: Tensor, upper: Tensor) -> Tensor:
    """Return where tighter bounds would not change the node's lines, (n, *node)."""
    mask = None if isinstance(node.layer, MaxPool) else cast(Activation, node.layer).settled(lower, upper)
    return torch.zeros_like(lower, dtype=torch.bool) if mask is None else mask


def _open_rows(settled: Tensor) -> Tensor:
    """Return the flat positions that are open in some image of ``settled`` (n, *node)."""
    columns = settled.flatten(1)
    try:
        return (~columns.all(0)).nonzero().squeeze(1)
    except RuntimeError:  # under torch.func.vmap, where the number of rows may not depend on values
        return torch.arange(columns.shape[1], device=settled.device)
