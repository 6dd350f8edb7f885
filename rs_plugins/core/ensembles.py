"""Several base classifiers as one (Horváth et al. 2022): their mean, and K-consensus, which mostly asks only K."""

import math
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from rs_plugins.core.checks import check_count, check_positive
from rs_plugins.core.models import SelectiveModule, check_logits, check_noiseless, check_unchanged, device_and_dtype
from rs_plugins.errors import InputError, ModelError

Average = Literal["logits", "probabilities"]


class _Ensemble(nn.Module):
    """Base classifiers that are asked together, and how their answers are averaged."""

    def __init__(self, models: Iterable[nn.Module], average: Average, weights: Iterable[float] | None) -> None:
        super().__init__()
        self.members = nn.ModuleList(_checked_models(models))
        self.training = self.members.training = any(member.training for member in self.members)
        if average not in get_args(Average):
            raise InputError(f"average: expected one of {', '.join(map(repr, get_args(Average)))}, got {average!r}")
        self.average = average
        self.weights = None if weights is None else _checked_weights(weights, len(self.members))

    def extra_repr(self) -> str:
        """Return the settings for `repr`."""
        weights = "" if self.weights is None else f", weights={self.weights}"
        return f"average={self.average!r}{weights}"

    def _answers(self, x: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        """Return the logits (models, n, classes) of some of the members for images ``x`` (n, *input)."""
        answers: list[Tensor] = []
        with check_unchanged(x):
            for number, member in list(enumerate(self.members))[start:stop]:
                logits = check_logits(member(x), len(x))
                answers.append(_alike(logits, number, answers[0].shape[1] if answers else None))
        return torch.stack(answers)

    def _mean(self, answers: Tensor) -> Tensor:
        return averaged(answers, self.average, self.weights)


class SoftEnsemble(_Ensemble):
    """A soft ensemble: the mean of the answers of several base classifiers (Horváth et al. 2022).

    Its decision is that of the sum of the logits. It is a base classifier as any other: certified, attacked, trained.

    Args:
        models: Two or more base classifiers, (n, *input) in pixels to logits (n, classes), normalisation inside; of the
            same classes, on one device, of one floating-point type. They become parts of the ensemble and are not
            copied: what moves or trains it moves or trains them.
        average: What the mean is taken of: ``"logits"`` or ``"probabilities"``.
        weights: What each model counts in the mean, by default all the same; only their ratios matter.

    Attributes:
        members: The models.
        average: What is averaged.
        weights: The weights, which sum up to 1, or None.

    Raises:
        InputError: If there are fewer than two models, two are the same object, one adds noise by itself, their devices
            or types differ, or an option has an impossible value.
    """

    def __init__(
        self,
        models: Iterable[nn.Module],
        *,
        average: Average = "logits",
        weights: Iterable[float] | None = None,
    ) -> None:
        super().__init__(models, average, weights)

    def forward(self, x: Tensor) -> Tensor:
        """Return the mean logits, or the logarithm of the mean probabilities, (n, classes), of ``x`` (n, *input).

        Raises:
            ModelError: If a model returns no logits (n, classes) or other classes than the first, or changes its input.
        """
        return self._mean(self._answers(x))


class ConsensusEnsemble(_Ensemble, SelectiveModule):
    """K-consensus (Horváth et al. 2022): where the first K models agree, the others are not asked.

    Where the first K name one class for a noisy image, this is the decision. Where they do not, the soft ensemble of
    all models decides. That is another base classifier than the soft ensemble, but as much a function of the noisy
    image alone; so its certificates hold like those of any other.

    Its logits have one value for the class that is decided and a common lower one for all others, minus the largest
    absolute logit of those that decide. The difference is the smallest of all leads on which the decision hangs, in
    units of logits (of logarithms of probabilities where these are averaged): so rounding that may turn any of them is
    seen from outside, and votes do not depend on batches. As probabilities they mean little.

    Where a gradient is wanted, all models are asked, and the gradient is the soft ensemble's. All are asked, too, about
    a single image, and when compiled. Otherwise a pass waits for the GPU, to know which images are left.

    Args:
        models: Three or more base classifiers, as `SoftEnsemble` takes them. The first K decide most images.
        k: How many models have to agree, from 2 to one less than there are.
        average: As `SoftEnsemble` takes it.
        weights: As `SoftEnsemble` takes them; consensus does not heed them.

    Attributes:
        members: The models.
        k: How many have to agree.
        average: What is averaged.
        weights: The weights, which sum up to 1, or None.

    Raises:
        InputError: As `SoftEnsemble`, or if there are fewer than three models.
    """

    def __init__(
        self,
        models: Iterable[nn.Module],
        k: int,
        *,
        average: Average = "logits",
        weights: Iterable[float] | None = None,
    ) -> None:
        super().__init__(models, average, weights)
        if len(self.members) < 3:
            raise InputError(f"models: expected at least 3, as 2 agree without the third, got {len(self.members)}")
        self.k = _checked_k(k, len(self.members))

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (n, classes) of ``x`` (n, *input), whose largest is the decision.

        Raises:
            ModelError: If a model returns no logits (n, classes) or other classes than the first, or changes its input.
        """
        if torch.compiler.is_compiling() or not self.selective or len(x) < 2 or self._wants_gradient(x):
            answers = self._answers(x)
            soft = self._mean(answers)
            first, later = answers.detach().tensor_split([self.k])
            logits = _consensus(first, soft.detach(), _sizes(later))
            return logits + (soft - soft.detach()).nan_to_num(0.0) if soft.requires_grad else logits
        first = self._answers(x, stop=self.k)
        soft, left = first[0].clone(), _undecided(first)
        sizes = _sizes(first)
        if len(left):
            later = self._answers(x[left], start=self.k)
            soft[left] = self._mean(torch.cat([first[:, left], later]))
            sizes[left] = _sizes(later)
        return _consensus(first, soft, sizes)

    def extra_repr(self) -> str:
        """Return the settings for `repr`."""
        return f"k={self.k}, {super().extra_repr()}"

    def _wants_gradient(self, x: Tensor) -> bool:
        return torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in self.parameters()))


def averaged(answers: Tensor, average: Average, weights: Sequence[float] | None = None) -> Tensor:
    """Return the mean logits, or the logarithm of the mean probabilities, (n, classes).

    Args:
        answers: Logits (models, n, classes).
        average: ``"logits"`` or ``"probabilities"``.
        weights: What each model counts, positive, with sum 1; all the same by default.
    """
    shares = None if weights is None else answers.new_tensor(weights)[:, None, None]
    if average == "logits":
        return answers.mean(dim=0) if shares is None else (answers * shares).sum(dim=0)
    logarithms = answers.log_softmax(dim=2)
    if shares is None:
        return logarithms.logsumexp(dim=0) - math.log(len(answers))
    return (logarithms + shares.log()).logsumexp(dim=0)


def _undecided(first: Tensor) -> Tensor:
    """Return the rows that the logits ``first`` (k, n, classes) do not decide; those with NaN are nobody's."""
    choices = first.argmax(dim=2)
    agreed = (choices == choices[0]).all(dim=0)
    return (~agreed & ~first.isnan().any(dim=2).any(dim=0)).nonzero().flatten()


def _sizes(answers: Tensor) -> Tensor:
    """Return the largest absolute value of the logits ``answers`` (models, n, classes), (n,), infinities aside."""
    return answers.abs().masked_fill(answers.isinf(), 0.0).amax(dim=2).amax(dim=0)


def _consensus(first: Tensor, soft: Tensor, later: Tensor) -> Tensor:
    """Return the logits (n, classes) of K-consensus: one value for all classes but the decision's.

    They are continuous in what they are made of, so rounding there is rounding here.

    Args:
        first: Logits (k, n, classes) of the models that have to agree.
        soft: Logits (n, classes) of the soft ensemble; of no weight where they agree.
        later: The largest absolute logit of the others, (n,); of no weight where the first agree.
    """
    kind = first.dtype
    first, soft = (logits.to(torch.promote_types(kind, torch.float32)) for logits in (first, soft))
    choices = first.argmax(dim=2)
    agreed = (choices == choices[0]).all(dim=0)
    alone = _lead(first).amin(dim=0)
    behind = (first.amax(dim=2, keepdim=True) - first).nan_to_num(0.0, posinf=math.inf)
    to_agree = behind.amax(dim=0).amin(dim=1)  # so far off is the nearest consensus
    winners = torch.where(agreed, choices[0], soft.argmax(dim=1))
    lead = torch.where(agreed, alone, torch.minimum(_lead(soft), to_agree)).clamp(max=torch.finfo(kind).max / 4)
    # The size of the logits is what rounding is in proportion to; without it a small lead would look like small logits.
    sizes = _sizes(first)
    sizes = torch.where(agreed, sizes, torch.maximum(sizes, later.to(sizes.dtype)))
    low = -sizes.clamp(min=torch.finfo(kind).tiny)
    high = torch.maximum((low + lead).to(kind), low.to(kind) * (1 - torch.finfo(kind).eps))  # or it would be a tie
    logits = low.to(kind)[:, None].repeat(1, first.shape[2]).scatter(1, winners[:, None], high[:, None])
    invalid = first.isnan().any(dim=2).any(dim=0) | (soft.isnan().any(dim=1) & ~agreed)
    return logits.masked_fill(invalid[:, None], math.nan)


def _lead(logits: Tensor) -> Tensor:
    """Return by how much the largest logit leads, of (..., classes); 0 where two are infinite."""
    best, second = logits.topk(2, dim=-1).values.unbind(-1)
    return (best - second).nan_to_num(0.0, posinf=math.inf)


def _alike(logits: Tensor, number: int, classes: int | None) -> Tensor:
    if classes is not None and logits.shape[1] != classes:
        raise ModelError(f"models: expected {classes} logits from each, got {logits.shape[1]} from model {number}")
    return logits


def _checked_models(models: Iterable[nn.Module]) -> list[nn.Module]:
    if isinstance(models, nn.Module) and not isinstance(models, nn.ModuleList):
        raise InputError(f"models: expected several models, got one {type(models).__name__}")
    found = list(models)
    if len(found) < 2:
        raise InputError(f"models: expected at least 2, got {len(found)}")
    for number, model in enumerate(found):
        check_noiseless(model, f"models[{number}]")
        if any(model is other for other in found[:number]):
            raise InputError(f"models: expected different ones, got the same {type(model).__name__} twice")
    homes = [(number, *device_and_dtype(model)) for number, model in enumerate(found) if _has_tensors(model)]
    for number, device, dtype in homes[1:]:
        _, home, kind = homes[0]
        if (device, dtype) != (home, kind):
            raise InputError(f"models: expected all on {home} in {kind}, got model {number} on {device} in {dtype}")
    return found


def _checked_k(k: int, models: int) -> int:
    try:
        return check_count(k, "k", least=2, most=models - 1)
    except InputError:
        wanted = f"an integer >= 2 and fewer than the number of models, {models}"
        raise InputError(f"k: expected {wanted}, got {k!r}") from None


def _has_tensors(model: nn.Module) -> bool:
    return next(chain(model.parameters(), model.buffers()), None) is not None


def _checked_weights(weights: Iterable[float], models: int) -> tuple[float, ...]:
    found = [check_positive(weight, "weights") for weight in weights]
    if len(found) != models:
        raise InputError(f"weights: expected one for each of {models} models, got {len(found)}")
    total = math.fsum(found)
    return tuple(weight / total for weight in found)
