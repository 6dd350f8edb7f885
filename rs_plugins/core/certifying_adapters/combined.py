"""Several adapted classifiers with one extractor as one classifier: their mean, or one of them for each noisy image."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, get_args

import torch
from torch import Tensor, nn

from rs_plugins.core.certifying_adapters.adapted import AdaptedClassifier
from rs_plugins.core.certifying_adapters.routing import Router, choices
from rs_plugins.core.ensembles import Average, averaged
from rs_plugins.core.models import SelectiveModule, check_unchanged
from rs_plugins.errors import InputError

if TYPE_CHECKING:
    from typing_extensions import Self


class Members(nn.Module):
    """Adapted classifiers with one extractor and one normalisation, and maybe a router: a base of classifiers.

    Attributes:
        members: The adapted classifiers; to put them together leaves their modes as they are.
    """

    def __init__(self, members: Iterable[AdaptedClassifier]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)
        self.training = self.members.training = any(member.training for member in self.members)

    def adapted(self) -> list[AdaptedClassifier]:
        """Return the members as a list."""
        return list(self.members)  # type: ignore[arg-type]

    def train(self, mode: bool = True) -> "Self":
        """Put the members into train mode, or eval mode; a router stays in eval mode."""
        super().train(mode)
        self._still()
        return self

    def _still(self) -> None:
        router = getattr(self, "router", None)
        if isinstance(router, nn.Module):
            router.eval()


class AveragedClassifier(Members):
    """Several members asked at once: the mean of their answers.

    The extractor runs once for all members that read its features, and once for each that works inside it.

    Args:
        members: They have one extractor and one normalisation, as those of an `AdapterEnsemble`.
        of: What is averaged: ``"logits"`` or ``"probabilities"``.

    Raises:
        InputError: If ``of`` is something else.
    """

    def __init__(self, members: Iterable[AdaptedClassifier], *, of: Average = "logits") -> None:
        super().__init__(members)
        if of not in get_args(Average):
            raise InputError(f"of: expected one of {', '.join(map(repr, get_args(Average)))}, got {of!r}")
        self.of = of

    def forward(self, x: Tensor) -> Tensor:
        """Return the mean logits, or the logarithm of the mean probabilities, (n, classes), of ``x`` (n, *input).

        Raises:
            ModelError: If a part of a member changes in place what the next one reads.
        """
        members = self.adapted()
        return averaged(torch.stack(_every_answer(members, members[0].normalise(x))), self.of)

    def extra_repr(self) -> str:
        """Return the setting for `repr`."""
        return f"of={self.of!r}"


class RoutedClassifier(Members, SelectiveModule):
    """For each noisy image one member, chosen by a router that sees that noisy image and nothing else.

    The extractor runs once for all images whose members read its features, and once for each member that works inside
    it; certifying adapters and heads run on the images that chose them. Gradients go through the member that was
    chosen, none through the choice.

    Args:
        members: They have one extractor and one normalisation, as those of an `AdapterEnsemble`.
        router: As `AdapterEnsemble` takes it; a module is put into eval mode, and stays so.
    """

    def __init__(self, members: Iterable[AdaptedClassifier], router: Router) -> None:
        super().__init__(members)
        self.router = router
        self._still()

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits (n, classes) of noisy images ``x`` (n, *input), each of the member that was chosen for it.

        Raises:
            ModelError: As `rs_plugins.core.certifying_adapters.routing.choices`.
        """
        members = self.adapted()
        choice = choices(self.router, x, len(members))
        x = members[0].normalise(x)
        # What is compiled would be compiled again for each number of images that a member gets.
        if torch.compiler.is_compiling() or not self.selective:
            return torch.stack(_every_answer(members, x))[choice, torch.arange(len(x), device=x.device)]
        groups = [(member, (choice == number).nonzero().flatten()) for number, member in enumerate(members)]
        groups = [(member, rows) for member, rows in groups if len(rows)]
        if len(groups) > 1:
            return _answers_by_group(groups, x)
        member = groups[0][0] if groups else members[0]  # under noise of one level nearly always the same
        return member.classify(x, member.features(x))


def _every_answer(members: list[AdaptedClassifier], x: Tensor) -> list[Tensor]:
    """Return the logits (n, classes) of each member for normalised images ``x`` (n, *input)."""
    reading = [member for member in members if member.adapter.reads_features]
    with check_unchanged(x):
        z = reading[0].features(x) if reading else x
        with check_unchanged(z):
            return [member.classify(x, z if member in reading else member.features(x)) for member in members]


def _answers_by_group(groups: list[tuple[AdaptedClassifier, Tensor]], x: Tensor) -> Tensor:
    """Return the logits (n, classes) of normalised images ``x`` (n, *input), each row from the member that it is with.

    Every row is in one group. Members that work inside the extractor come last.
    """
    reading = [(member, rows) for member, rows in groups if member.adapter.reads_features]
    working = [(member, rows) for member, rows in groups if not member.adapter.reads_features]
    answers = []
    if reading:
        sizes = [len(rows) for _, rows in reading]
        together = x[torch.cat([rows for _, rows in reading])]
        z = reading[0][0].features(together)
        parts = zip(reading, together.split(sizes), z.split(sizes), strict=True)
        answers += [member.classify(part, features) for (member, _), part, features in parts]
    answers += [member.classify(x[rows], member.features(x[rows])) for member, rows in working]
    places = torch.cat([rows for _, rows in reading + working])
    return torch.cat(answers)[places.argsort()]
