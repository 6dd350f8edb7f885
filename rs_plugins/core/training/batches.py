"""Which images each step of the optimiser takes, as a function of the seed and the epoch alone."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.utils.data import Dataset

from rs_plugins.core.checks import check_count, check_images, check_positive
from rs_plugins.core.data_sets.data_set import DataSet
from rs_plugins.core.streams import stream
from rs_plugins.errors import InputError


@dataclass(frozen=True)
class Source:
    """Images to train on.

    Attributes:
        read: Returns the images (k, *input), pixels in [0, 1], and the labels (k,) at k positions; labels may also be
            class probabilities (k, classes), if the method takes them.
        size: Number of images.
        weight: Their loss is multiplied by this (w of Salman et al. 2019, for images with pseudo-labels).
    """

    read: Callable[[Tensor], tuple[Tensor, Tensor]]
    size: int
    weight: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "size", check_count(self.size, "size"))
        object.__setattr__(self, "weight", check_positive(self.weight, "weight"))


def tensors(x: Tensor, y: Tensor, *, weight: float = 1.0) -> Source:
    """Return images in memory as a source.

    Args:
        x: (n, *input), pixels in [0, 1].
        y: Labels (n,), or class probabilities (n, classes).
        weight: By what their loss is multiplied.

    Raises:
        InputError: If they do not go together, there are none, or a pixel is out of range.
    """
    check_images(x)
    if len(x) != len(y) or not len(x):
        raise InputError(f"y: expected one label for each of at least one image, got {len(x)} images, {len(y)} labels")
    if not y.is_floating_point() and int(y.min()) < 0:  # of which torch's cross-entropy would skip some in silence
        raise InputError(f"y: expected labels >= 0, got {int(y.min())}")
    return Source(partial(_read_tensors, x, y), len(x), weight)


def data_set(data: DataSet, *, weight: float = 1.0) -> Source:
    """Return a data set as a source; its images are read when their turn comes."""
    return Source(partial(_read_data_set, data), len(data), weight)


def _read_tensors(x: Tensor, y: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    return x[rows], y[rows]


def _read_data_set(data: DataSet, rows: Tensor) -> tuple[Tensor, Tensor]:
    return data.read(rows.tolist()), torch.from_numpy(data.labels)[rows]


@dataclass(frozen=True)
class Step:
    """The images of one step of the optimiser.

    Attributes:
        epoch: How many passes over the data are finished.
        index: How many steps of the epoch are.
        last: Whether it is the last one of the epoch.
        source: Which source they are of.
        rows: Their positions in it, (n,).
        elapsed: How many passes over the data are finished, with the part of the one under way.
        passed: How many are when the step is done.
    """

    epoch: int
    index: int
    last: bool
    source: int
    rows: Tensor
    elapsed: float
    passed: float

    @property
    def name(self) -> str:
        """A name that no other step of the run has."""
        return f"epoch {self.epoch} step {self.index}"


@dataclass(frozen=True)
class Batches:
    """How the images of some sources are put into batches, and these into steps.

    An epoch is a pass over the first source in random order. Of each other source, which goes through its images at its
    own pace, an epoch has as many batches; all of them come in random order (Salman et al. 2019, semi-supervised).

    No batch and no part of one is of a single image if that can be helped, as batch normalisation cannot train on it: a
    last image that is left over joins the batch before, and a small batch is cut into fewer parts.

    Attributes:
        sizes: Number of images of each source.
        batch_size: Images per batch.
        parts: Into how many parts a batch is cut, nearly equal ones, each with a step of its own.
        drop_last: Whether an incomplete last batch is left out.
        seed: The run's seed.
    """

    sizes: Sequence[int]
    batch_size: int
    parts: int = 1
    drop_last: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "batch_size", check_count(self.batch_size, "batch_size"))
        object.__setattr__(self, "parts", check_count(self.parts, "parts"))
        if self.drop_last and min(self.sizes) < self.batch_size:
            raise InputError(f"drop_last: nothing is left of {min(self.sizes)} images in batches of {self.batch_size}")

    def steps(self, epoch: int) -> list[Step]:
        """Return the steps of an epoch."""
        batches = [(source, rows) for source in range(len(self.sizes)) for rows in self._batches(source, epoch)]
        if len(self.sizes) > 1:
            order = torch.randperm(len(batches), generator=stream(self.seed, "order of sources", epoch))
            batches = [batches[place] for place in order.tolist()]
        cut = [(source, part) for source, rows in batches for part in rows.tensor_split(_pieces(self.parts, len(rows)))]
        count = len(cut)
        return [
            Step(epoch, at, at == count - 1, *step, epoch + at / count, epoch + (at + 1) / count)
            for at, step in enumerate(cut)
        ]

    def steps_an_epoch(self) -> int:
        """Return how many steps the first epoch has; others may differ where other sources have incomplete batches."""
        return len(self.steps(0))

    def _batches(self, source: int, epoch: int) -> Iterator[Tensor]:
        """Yield the positions of each batch of a source in an epoch: the passes over it follow each other."""
        count = self._count(0)
        passes: dict[int, Sequence[Tensor]] = {}
        for place in range(epoch * count, (epoch + 1) * count):
            number, batch = divmod(place, self._count(source))
            if number not in passes:
                passes[number] = self._pass(source, number)
            yield passes[number][batch]

    def _count(self, source: int) -> int:
        return len(self._sizes(source))

    def _sizes(self, source: int) -> list[int]:
        """Return how many images the batches of a pass over a source have."""
        whole, rest = divmod(self.sizes[source], self.batch_size)
        sizes = [self.batch_size] * whole
        if rest == 1 and whole and not self.drop_last:
            sizes[-1] += 1
        elif rest and not self.drop_last:
            sizes.append(rest)
        return sizes

    def _pass(self, source: int, number: int) -> Sequence[Tensor]:
        shuffler = stream(self.seed, f"shuffle {source}", number)
        sizes, order = self._sizes(source), torch.randperm(self.sizes[source], generator=shuffler)
        return list(order[: sum(sizes)].split(sizes))


def _pieces(most: int, images: int) -> int:
    """Return into how many pieces ``images`` are cut, so that none has but one."""
    return max(1, min(most, images // 2))


@dataclass(frozen=True)
class Share:
    """What one of several processes has of a step: nearly equal parts, in the order of the processes.

    Attributes:
        step: The step.
        first: Place in it of the first image that is here.
        rows: Positions of the images that are here, at least one.
        weight: By what the mean loss of these is to be multiplied, so that the mean over the processes is that of the
            step. 0 where the step has too few images for all processes; those of another are then here too.
    """

    step: Step
    first: int
    rows: Tensor
    weight: float


def share_of(step: Step, rank: int, world: int) -> Share:
    """Return what the process ``rank`` of ``world`` has of a step."""
    pieces = torch.arange(len(step.rows)).tensor_split(_pieces(world, len(step.rows)))
    if rank >= len(pieces):
        return Share(step, 0, step.rows[: len(pieces[0])], 0.0)
    mine = pieces[rank]
    return Share(step, int(mine[0]), step.rows[mine], len(mine) * world / len(step.rows))


class Reader(Dataset[tuple[Share, Tensor, Tensor]]):
    """Reads the images of a share of a step, for a data loader without batches of its own."""

    def __init__(self, sources: Sequence[Source]) -> None:
        self._sources = sources

    def __getitem__(self, share: Share) -> tuple[Share, Tensor, Tensor]:
        """Return ``share`` with its images and labels."""
        return (share, *self._sources[share.step.source].read(share.rows))
