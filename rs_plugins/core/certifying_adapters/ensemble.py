"""Ensembles: one frozen extractor, several certifying adapters with a head each, trained at several noise levels."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any, Literal, get_args, overload

import numpy as np
import torch
from torch import Tensor, nn

from rs_plugins.core.certification import Certificate, Certificates, certify
from rs_plugins.core.certifying_adapters.adapted import AdaptedClassifier
from rs_plugins.core.certifying_adapters.combined import AveragedClassifier, Members, RoutedClassifier
from rs_plugins.core.certifying_adapters.routing import NoiseLevelRouter, Router
from rs_plugins.core.checks import check_positive
from rs_plugins.core.ensembles import Average
from rs_plugins.core.frozen_copy import sharing_copy
from rs_plugins.core.identity import identity
from rs_plugins.core.models import check_logits, device_and_dtype, evaluating
from rs_plugins.core.plans.fixed_budget import FixedBudget
from rs_plugins.core.plans.protocol import Plan
from rs_plugins.errors import InputError, ModelError

Mode = Literal["select", "average", "route"]


@dataclass(frozen=True)
class HeuristicRadius:
    """The largest of the radii that several smoothed classifiers have at one image: no certificate.

    Attributes:
        index: Position of the image in its data set.
        sigma: The noise level at which the radius is largest, in pixels; of equal ones the first.
        prediction: The class there, or -1 if there is an abstention at every level.
        radius: The radius there, in pixels.
        certified: Always False: nothing is proved of a classifier that chooses its noise by the clean image.
    """

    index: int
    sigma: float
    prediction: int
    radius: float
    certified: Literal[False] = field(default=False, init=False)


class AdapterEnsemble(Members):
    """One extractor and K certifying adapters with a head each, trained at K noise levels (cf. Deng et al. 2024).

    It is no classifier by itself; there are three ways to make one of it, each a function of the noisy image alone, as
    randomized smoothing wants it. `at` gives the member trained at one level. `average` asks all members, `route` one
    that is chosen for each noisy image; whether they are any good at a level depends on the members trained near it.
    Nothing here picks a member by the clean image: a certificate of such a classifier would be worth nothing.

    The ensemble has members of its own: copies of those that are handed in, all with one copy of the first one's
    extractor and normalisation. The copies hold the very weights and buffers, so they need no more memory, and what
    changes these in place, as an optimiser or `load_state_dict` does, changes those handed in as well. To move or cast
    the ensemble gives it weights of its own: those handed in stay whole.

    Attributes:
        members: The adapted classifiers.
        sigmas: The noise level that each was trained at, in pixels.
        router: Chooses the members for `route`; None if there is none.

    Args:
        members: Pairs of an adapted classifier and its noise level, or such classifiers by level. Several may be
            trained at the same level, for `average`.
        router: What `route` asks: a function or module, noisy images (n, *input) in pixels to the numbers of their
            members (n,), int64. It is handed one image at a time, so that no choice can depend on other images, unless
            it has a true attribute ``row_wise`` and so promises that by itself. It must give the same answer each time.
            A module is put into eval mode, and stays so. None: a `NoiseLevelRouter`, where all levels differ.

    Raises:
        InputError: If the members are not adapted classifiers with equal extractors, normalisation and number of
            features, or a level or the router is of the wrong kind.
        ModelError: If their heads do not return logits of the same classes, or they cannot be copied.
    """

    def __init__(
        self,
        members: Sequence[tuple[AdaptedClassifier, float]] | Mapping[float, AdaptedClassifier],
        *,
        router: Router | None = None,
    ) -> None:
        adapted, sigmas = _checked_members(members)
        super().__init__(_with_one_extractor(adapted, sigmas))
        self.sigmas = sigmas
        if router is not None and (isinstance(router, type) or not callable(router)):
            raise InputError(f"router: expected a function of noisy images or a module, got {router!r}")
        different = len(set(sigmas)) == len(sigmas)
        self.router = NoiseLevelRouter(sigmas) if router is None and different else router
        self._still()

    def forward(self, x: Tensor) -> Tensor:
        """Raise `ModelError`: which of its classifiers is meant has to be said."""
        raise ModelError("ensemble: it is no classifier by itself; take its at(sigma), average() or route()")

    def at(self, sigma: float) -> AdaptedClassifier:
        """Return the member trained at ``sigma`` pixels: a part of the ensemble, with the extractor that all have.

        Raises:
            InputError: If there is none, or more than one.
        """
        wanted = check_positive(sigma, "sigma")
        found = [member for member, level in zip(self.adapted(), self.sigmas, strict=True) if level == wanted]
        if len(found) != 1:
            known = ", ".join(map(repr, self.sigmas))  # in full: 0.12 in float32 is not 0.12
            raise InputError(f"sigma: expected the noise level of one member, of {known}, got {wanted!r}")
        return found[0]

    def average(self, *, of: Average = "logits") -> AveragedClassifier:
        """Return the classifier that takes the mean over all members.

        Args:
            of: What is averaged: ``"logits"`` or ``"probabilities"``.

        Raises:
            InputError: If ``of`` is something else.
        """
        return AveragedClassifier(self.adapted(), of=of)

    def route(self) -> RoutedClassifier:
        """Return the classifier that asks, for each noisy image, the member that the router chooses.

        Raises:
            InputError: If there is no router, as several members were trained at the same level.
        """
        if self.router is None:
            raise InputError(f"router: expected one, as two members were trained at the same level, of {self.sigmas}")
        return RoutedClassifier(self.adapted(), self.router)

    @overload
    def certify(
        self, images: Tensor, sigma: float, *, mode: Mode = "select", plan: Plan | None = None, **options: Any
    ) -> Certificates: ...

    @overload
    def certify(
        self, images: Tensor, sigma: Sequence[float], *, mode: Mode = "select", plan: Plan | None = None, **options: Any
    ) -> dict[float, list[Certificate]]: ...

    def certify(
        self,
        images: Tensor,
        sigma: float | Sequence[float],
        *,
        mode: Mode = "select",
        plan: Plan | None = None,
        **options: Any,
    ) -> Certificates | dict[float, list[Certificate]]:
        """Certify one of the classifiers, smoothed at one noise level or at each of several.

        At several levels K each image gets K certificates, each with failure probability alpha / K (Bonferroni). So
        with probability at least 1 - alpha over the votes, for each image, all K hold at once: for every level, the
        classifier smoothed at that level has its certified prediction everywhere in its certified ball. These are
        statements about K classifiers; none of them is about one that takes its level, or its prediction, from the
        largest radius.

        Args:
            images: (n, *input), pixels in [0, 1].
            sigma: Standard deviation of the noise, in pixels, which has to be fixed without looking at ``images``; or
                several. With ``mode="select"``, levels that members were trained at.
            mode: ``"select"``, the member trained at ``sigma``; ``"average"``; ``"route"``.
            plan: How many votes to spend, `FixedBudget` by default; its alpha is the failure probability for each
                image, of all certificates together.
            options: What `rs_plugins.core.certification.certify` takes beside these.

        Returns:
            The certificates as they are computed, if ``sigma`` is a number; of several, after all is done, a list by
            level.

        Raises:
            InputError: If an argument has an impossible value.
            ModelError: As `rs_plugins.core.certification.certify`.
        """
        one, levels = _one_or_several(sigma)
        if one is not None:
            return certify(self._classifier(mode, one), images, one, plan=plan, **options)
        share = _shared_out(FixedBudget() if plan is None else plan, len(levels))
        runs = {level: certify(self._classifier(mode, level), images, level, plan=share, **options) for level in levels}
        return {level: list(run) for level, run in runs.items()}

    def heuristic_best_radius(
        self,
        images: Tensor,
        *,
        sigmas: Sequence[float] | None = None,
        mode: Mode = "select",
        plan: Plan | None = None,
        **options: Any,
    ) -> list[HeuristicRadius]:
        """Return for each image the largest radius over several noise levels: a figure to look at, no certificate.

        Each of the K radii is certified, with failure probability alpha / K, for the classifier smoothed at its own
        level. But what takes its level from the clean image is another classifier: an attacker who moves the image may
        move the choice. Of that classifier nothing is proved, so the results are no `Certificate` and no log takes
        them.

        Args:
            images: (n, *input), pixels in [0, 1].
            sigmas: The noise levels, in pixels; those of the members by default.
            mode: As in `certify`.
            plan: As in `certify`.
            options: As in `certify`.

        Raises:
            InputError: If an argument has an impossible value.
            ModelError: As `rs_plugins.core.certification.certify`.
        """
        levels = list(dict.fromkeys(self.sigmas)) if sigmas is None else sigmas
        if not np.ndim(levels):
            raise InputError(f"sigmas: expected several noise levels, got {sigmas!r}")
        found = self.certify(images, levels, mode=mode, plan=plan, **options)
        return [_largest(dict(zip(found, row, strict=True))) for row in zip(*found.values(), strict=True)]

    def extra_repr(self) -> str:
        """Return the levels for `repr`."""
        return f"sigmas={self.sigmas}"

    def _classifier(self, mode: Mode, sigma: float) -> nn.Module:
        if mode == "select":
            return self.at(sigma)
        if mode == "average":
            return self.average()
        if mode == "route":
            return self.route()
        raise InputError(f"mode: expected one of {', '.join(map(repr, get_args(Mode)))}, got {mode!r}")


def _one_or_several(sigma: Any) -> tuple[float | None, list[float]]:
    if sigma is None:
        raise InputError("sigma: expected the standard deviation of the noise, in pixels, got None")
    if not np.ndim(sigma):
        return check_positive(sigma, "sigma"), []
    levels = [check_positive(level, "sigma") for level in sigma]
    if not levels or len(set(levels)) < len(levels):
        raise InputError(f"sigma: expected one or more different noise levels, got {levels}")
    return None, levels


def _largest(certificates: Mapping[float, Certificate]) -> HeuristicRadius:
    sigma, best = max(certificates.items(), key=lambda item: (not item[1].abstained, item[1].radius))
    return HeuristicRadius(best.index, sigma, best.prediction, best.radius)


def _shared_out(plan: Plan, certificates: int) -> Plan:
    """Return ``plan`` with the failure probability that each of so many certificates may have."""
    if not is_dataclass(plan) or isinstance(plan, type) or "alpha" not in {f.name for f in fields(plan) if f.init}:
        raise InputError(f"plan: expected a plan that is a dataclass with alpha, to share it out, got {plan!r}")
    return replace(plan, alpha=plan.alpha / certificates)


def _checked_members(
    members: Sequence[tuple[AdaptedClassifier, float]] | Mapping[float, AdaptedClassifier],
) -> tuple[list[AdaptedClassifier], tuple[float, ...]]:
    try:
        pairs = [(m, s) for s, m in members.items()] if isinstance(members, Mapping) else [(m, s) for m, s in members]
    except (TypeError, ValueError):
        raise InputError(
            f"members: expected pairs of an AdaptedClassifier and its sigma, got {type(members).__name__}"
        ) from None
    if not pairs:
        raise InputError("members: expected at least one adapted classifier, got none")
    for number, (member, _) in enumerate(pairs):
        if not isinstance(member, AdaptedClassifier):
            raise InputError(f"members: expected an AdaptedClassifier as member {number}, got {type(member).__name__}")
    return [member for member, _ in pairs], tuple(
        check_positive(s, f"sigma of member {k}") for k, (_, s) in enumerate(pairs)
    )


def _with_one_extractor(members: list[AdaptedClassifier], sigmas: tuple[float, ...]) -> list[AdaptedClassifier]:
    """Return copies of ``members`` in the same memory, with one copy of the first one's extractor and normalisation.

    Raises:
        InputError: If these are not equal in all.
        ModelError: If their heads do not give as many logits, or they cannot be copied.
    """
    first = members[0]
    features, classes = first.adapter.feature_dim, _classes(first)
    for number, (member, sigma) in enumerate(zip(members, sigmas, strict=True)):
        where = f"in member {number} (sigma {sigma:g})"
        for part in ("extractor", "normalise"):
            if not _same(getattr(member, part), getattr(first, part)):
                raise InputError(f"members: expected the {part} of member 0 in all, got another {where}")
        if member.adapter.feature_dim != features:
            got = member.adapter.feature_dim
            raise InputError(f"members: expected adapters for {features} features in all, got one for {got} {where}")
        if _classes(member) != classes:
            raise ModelError(f"members: expected {classes} logits of all heads, got {_classes(member)} {where}")
    twins = [_twin(member, first) for member in members]
    return list(sharing_copy(nn.ModuleList(twins), name="members"))  # type: ignore[call-overload, no-any-return]


def _same(part: nn.Module, other: nn.Module) -> bool:
    return part is other or identity(part) == identity(other)


def _twin(member: AdaptedClassifier, first: AdaptedClassifier) -> AdaptedClassifier:
    """Return an adapted classifier with the parts of ``member``, but the extractor and normalisation of ``first``."""
    twin = copy.copy(member)  # which shares the dictionary of the parts
    twin._modules = dict(member._modules)
    twin.extractor, twin.normalise = first.extractor, first.normalise
    return twin


def _classes(member: AdaptedClassifier) -> int:
    device, dtype = device_and_dtype(member)
    with evaluating(member.head), torch.no_grad():
        logits = member.head(torch.zeros(1, member.adapter.feature_dim, device=device, dtype=dtype))
    return check_logits(logits, 1).shape[1]
