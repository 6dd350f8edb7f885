"""What ART's `fit` adds to core's training loop."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from rs_plugins.core.checks import check_count
from rs_plugins.core.noise import Family
from rs_plugins.core.training.methods import METHODS, make_objective, option_names
from rs_plugins.core.training.objective import Batch, Draws, Objective
from rs_plugins.errors import InputError
from rs_plugins_art.arrays import Array

_OF_CLASSIFIER = ("sigma", "family")


def objective_for(
    method: str | Objective, options: Mapping[str, Any], *, sigma: float, family: Family, keywords: Sequence[str]
) -> Objective:
    """Return the objective that ``method`` names or is, under the classifier's own noise.

    Args:
        method: A name, or an objective, which brings its own options.
        options: Those of the method of that name.
        sigma: Standard deviation of the classifier's noise, in pixels.
        family: The classifier's noise family.
        keywords: What `fit` takes besides, for the message about a misspelt one.

    Raises:
        InputError: If there is no such method, a value is impossible, or the objective is for other noise.
        TypeError: If there is no such option.
    """
    if isinstance(method, str):
        if method in METHODS:
            _check_known(options, option_names(method), keywords, f"the options of {method!r} are")
        return make_objective(method, sigma, **options, family=family)
    if isinstance(method, type) or not callable(method):
        raise InputError(f"method: expected one of {', '.join(map(repr, METHODS))} or an objective, got {method!r}")
    _check_known(options, (), keywords, "an objective brings its own options")
    return _check_noise(method, sigma, family)


def _check_known(options: Mapping[str, Any], known: Sequence[str], keywords: Sequence[str], and_options: str) -> None:
    """Check that ``options`` are among the ``known`` ones.

    Raises:
        TypeError: Otherwise.
    """
    if not (unknown := options.keys() - set(known)):
        return
    hint = f"its own are {', '.join(keywords)}; {' '.join([and_options, ', '.join(known)]).rstrip()}"
    if min(unknown) in _OF_CLASSIFIER:
        hint = "the noise is that of the classifier"
    raise TypeError(f"fit() got an unexpected keyword argument {min(unknown)!r}; {hint}")


def _check_noise(objective: Any, sigma: float, family: Family) -> Objective:
    """Return ``objective`` if it says nothing of its noise, or that it is ``family`` at ``sigma`` pixels.

    Raises:
        InputError: Otherwise.
    """
    its_sigma, its_family = getattr(objective, "sigma", sigma), getattr(objective, "family", family)
    if not math.isclose(its_sigma, sigma, rel_tol=1e-6):
        raise InputError(f"method: expected an objective for the classifier's sigma {sigma}, got one for {its_sigma}")
    if (its := its_family(sigma).name) != (own := family(sigma).name):
        raise InputError(f"method: expected an objective for the classifier's noise family {own!r}, got {its!r}")
    return objective  # type: ignore[no-any-return]


def in_eval_mode(objective: Objective) -> Objective:
    """Return ``objective`` for a model whose batch normalisation and dropout stay as in evaluation."""

    def frozen(model: nn.Module, batch: Batch, draws: Draws) -> Tensor:
        return objective(model.eval(), batch, draws)

    return frozen


@contextmanager
def gradients_kept(model: nn.Module) -> Iterator[None]:
    """Put back the ``.grad`` of every parameter afterwards."""
    before = [(parameter, parameter.grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        for parameter, gradient in before:
            parameter.grad = gradient


def one_epoch(generator: Any) -> Iterator[tuple[Array, Array]]:
    """Yield batches of an ART data generator until it gave ``size`` images.

    Raises:
        InputError: If it does not say its size, or gives an empty batch.
    """
    size: Any = getattr(generator, "size", None)
    check_count(size, "generator.size")
    seen = 0
    while seen < size:
        x, y = generator.get_batch()
        seen += check_count(len(x), "generator: size of a batch")
        yield x, y
