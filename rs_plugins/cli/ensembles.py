"""Several models as one on the command line: ``--model A --member B --member C --ensemble consensus:k=2``."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import click

from rs_plugins.cli.named_options import convert, split_text
from rs_plugins.errors import InputError

if TYPE_CHECKING:
    from torch import nn

_SOFT: dict[str, Any] = {"average": str, "weights": tuple[float, ...]}
_RULES: dict[str, dict[str, Any]] = {"soft": _SOFT, "consensus": {"k": int, **_SOFT}}
DEFAULT = "soft"

member_option = click.option(
    "--member",
    multiple=True,
    metavar="PACKAGE.MODULE:FUNCTION|DIR",
    help="A further model beside --model, of an ensemble of all; as often as there are.",
)
ensemble_option = click.option(
    "--ensemble",
    metavar="RULE[:OPTION=VALUE,...]",
    help="soft, the mean of their logits (average=probabilities, weights=1/2/1), or consensus:k=2, where the others "
    f"are asked if the first 2 disagree.  [{DEFAULT}, with --member]",
)


_Value = TypeVar("_Value")


def agreed(option: str, values: Iterable[_Value | None]) -> _Value | None:
    """Return the one value that is known, None where none is.

    Args:
        option: Of which option, which one gives where they differ.
        values: Of each model, None where it is not known.

    Raises:
        InputError: If there are several.
    """
    known = list(dict.fromkeys(value for value in values if value is not None))
    if len(known) > 1:
        raise InputError(f"{option}: expected --{option}, as members were trained with {' and '.join(map(str, known))}")
    return known[0] if known else None


def make_ensemble(text: str, models: Sequence["nn.Module"]) -> "nn.Module":
    """Return the ensemble of ``models``, the first first, that ``text`` describes: ``consensus:k=2``.

    Raises:
        InputError: If there is no such rule or option, or a value is none for it, or two models are the same network.
    """
    from rs_plugins.core.ensembles import ConsensusEnsemble, SoftEnsemble
    from rs_plugins.core.identity import identity

    rule, given = split_text(text, "ensemble")
    if rule not in _RULES:
        raise InputError(f"ensemble: expected one of {', '.join(_RULES)}, got {rule!r}")
    kinds = _RULES[rule]
    for option in given:
        if option not in kinds:
            raise InputError(f"ensemble: {rule} has no option {option!r}; it has {', '.join(kinds)}")
    if rule == "consensus" and "k" not in given:
        raise InputError("ensemble: consensus needs k, as in consensus:k=2")
    if len(set(map(identity, models))) < len(models):
        raise InputError("member: expected different networks, got the same one twice")
    how = {option: convert(option, value, kinds[option], "ensemble") for option, value in given.items()}
    return ConsensusEnsemble(models, **how) if rule == "consensus" else SoftEnsemble(models, **how)
