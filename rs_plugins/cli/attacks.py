"""Attacks by name with their options, ``SmoothAdvPGD:eps=0.5,steps=20``, aimed at a smoothed classifier."""

import inspect
import math
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, get_type_hints

from rs_plugins import registry
from rs_plugins.activation import activated
from rs_plugins.cli.named_options import convert, fraction, split_text
from rs_plugins.errors import InputError, RSPluginsError

if TYPE_CHECKING:
    from torch import Tensor

    from rs_plugins.core.smoothing import SmoothedModel

HOSTS = ("torchattacks", "art")  # of two attacks of one name the first host's is taken
_NOT_OPTIONS = ("classifier", "summary_writer")
_OURS = ("rs_plugins", "rs_plugins_art", "rs_plugins_torchattacks")


@dataclass(frozen=True)
class NamedAttack:
    """An attack that is known by name, and how it is to be set up.

    Attributes:
        name: Its full name.
        make: Its class; called with the model and the options.
        options: What was asked for.
    """

    name: str
    make: Callable[..., Any]
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def of_art(self) -> bool:
        """Whether it is called as ART's attacks are: with an estimator and arrays."""
        return callable(getattr(self.make, "generate", None))

    @property
    def ours(self) -> bool:
        """Whether it is one of ours, whose results do not depend on how images are batched."""
        return self.make.__module__.partition(".")[0] in _OURS

    @property
    def record(self) -> dict[str, Any]:
        """What tells this attack from others, as plain data; with the versions of the hosts it is built on.

        Infinite numbers are text in it: JSON has none.
        """
        roots = {kind.__module__.partition(".")[0] for kind in getattr(self.make, "__mro__", (self.make,))}
        versions = {
            root: getattr(sys.modules.get(root), "__version__", None) for root in sorted(roots - {"rs_plugins"})
        }
        hosts = ", ".join(f"{root} {version}" for root, version in versions.items() if version)
        return {
            "attack": self.name,
            "options": {name: _plain(value) for name, value in self.options.items()},
            "host": hosts,
        }

    def aimed(self, smoothed: "SmoothedModel", *, base: bool = False) -> Callable[["Tensor", "Tensor"], Any]:
        """Return the attack on ``smoothed``, or on its base classifier: a function of images and labels.

        Raises:
            InputError: If it refuses the model or an option, or is targeted: it would be given true labels as targets.
        """
        if self.of_art and base:
            raise InputError(f"on: {self.name} attacks the smoothed classifier only")
        given = dict(self.options)
        if base and "sigma" in _parameters(self.make, self.name):
            given.setdefault("sigma", smoothed.sigma)
        try:
            made = self.make(_estimator(smoothed) if self.of_art else smoothed.base if base else smoothed, **given)
            if getattr(made, "targeted", False) in (True,) or given.get("targeted") is True:
                raise InputError(
                    f"attack: {self.name} is set up as targeted: it would take the true labels for its targets; "
                    "expected one that moves away from them"
                )
        except RSPluginsError:
            raise
        except Exception as error:  # somebody else's constructor
            raise InputError(f"attack: {self.name} cannot be set up: {registry.describe(error)}") from error
        if not self.of_art and not callable(made):
            raise InputError(
                f"attack: expected {self.name} to return a function of images and labels, got {made!r:.80}"
            )
        aimed: Callable[[Tensor, Tensor], Any] = _Generating(made) if self.of_art else made
        return aimed


def parse_attack(text: str) -> NamedAttack:
    """Return the attack that ``text``, ``NAME`` or ``NAME:OPTION=VALUE,…``, describes.

    A name is that of a component of kind attack, the last part of one, or ``torchattacks.NAME`` of that package.

    Raises:
        InputError: If there is no such attack or option, or a value is none for it; the message says what there is.
    """
    name, given = split_text(text, "attack")
    full, make = _lookup(name)
    known = _parameters(make, full)
    open_ended = any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values())
    known = {option: parameter for option, parameter in known.items() if parameter.kind is not parameter.VAR_KEYWORD}
    for option in given:
        if option not in known and not open_ended:
            raise InputError(f"attack: {full} has no option {option!r}; it has {', '.join(known) or 'none'}")
    for option, parameter in known.items():
        if parameter.default is parameter.empty and option not in given:
            raise InputError(f"attack: {full} needs {option}, as in {name}:{option}=…")
    hints = _hints(make)
    options = {option: _value(option, value, hints.get(option), known.get(option)) for option, value in given.items()}
    return NamedAttack(full, make, options)


def _lookup(name: str) -> tuple[str, Callable[..., Any]]:
    known = [component.name for component in registry.components("attack")]
    full = name if name in known else _by_last_part(name, known)
    if full is not None:
        found: Any = registry.component("attack", full)
        return full, found
    host, _, short = name.partition(".")
    if host == "torchattacks" and find_spec(host) is not None:
        with activated():  # names that plugins export into it, too
            package = import_module(host)
            theirs = sorted(set(package.__all__) - set(getattr(package, "__wrapper__", ())))
            if short in theirs:
                return name, getattr(package, short)
        raise InputError(
            f"attack: expected one of {', '.join(known)} or, of torchattacks, {', '.join(theirs)}, got {name!r}"
        )
    raise InputError(
        f"attack: expected one of {', '.join(known) or 'no plugin offers any'}, the last part of one, or "
        f"torchattacks.NAME, with options as in SmoothAdvPGD:eps=0.5, got {name!r}"
    )


def _by_last_part(name: str, known: list[str]) -> str | None:
    """Return the full name; of several that of the first host that is installed."""
    found = [full for full in known if full.rpartition(".")[2] == name]

    def rank(full: str) -> tuple[bool, int]:
        host = full.partition(".")[0]
        return host in HOSTS and find_spec(host) is None, HOSTS.index(host) if host in HOSTS else len(HOSTS)

    return min(found, key=rank, default=None)


def _parameters(make: Callable[..., Any], name: str) -> dict[str, inspect.Parameter]:
    """Return what ``make``, the attack called ``name``, takes after the model.

    Raises:
        InputError: If it takes none.
    """
    parameters: list[inspect.Parameter] = []
    with suppress(TypeError, ValueError):  # not callable; written in C
        parameters = list(inspect.signature(make).parameters.values())
    if not parameters:
        raise InputError(f"attack: expected {name} to be a class or function that takes a model, got {make!r:.80}")
    _, *rest = parameters
    return {item.name: item for item in rest if item.kind is not item.VAR_POSITIONAL and item.name not in _NOT_OPTIONS}


def _hints(make: Callable[..., Any]) -> dict[str, Any]:
    try:
        return get_type_hints(make.__init__ if inspect.isclass(make) else make)
    except Exception:  # names that only a type checker imports
        return {}


def _value(option: str, text: str, hint: Any, parameter: inspect.Parameter | None) -> Any:
    """Convert ``text`` by its annotation, or else by the type of the default, or else by how it looks."""
    if hint in (None, Any, Any | None):  # Python 3.10 makes the last of Any where the default is None
        hint = next((kind for kind in (bool, str) if parameter and isinstance(parameter.default, kind)), None)
    if hint is not None:
        return convert(option, text, hint, "attack", number=fraction)
    words = {"none": None, "true": True, "false": False}
    if text.lower() in words:
        return words[text.lower()]
    with suppress(ValueError):
        return int(text)
    with suppress(ValueError, ZeroDivisionError):
        return fraction(text)
    return text


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _estimator(smoothed: "SmoothedModel") -> Any:
    from rs_plugins.core.models import device_and_dtype

    make: Any = registry.component("estimator", "art.SmoothedClassifier")
    device = str(device_and_dtype(smoothed.base)[0])
    settings = {name: getattr(smoothed, name) for name in ("samples", "family", "noise", "seed", "chunk")}
    return make(smoothed.base, smoothed.sigma, device_type=device, **settings)


class _Generating:
    """An ART attack as a function of tensors."""

    def __init__(self, attack: Any) -> None:
        self._attack = attack

    @property
    def success(self) -> Any:
        return getattr(self._attack, "success", None)

    def __call__(self, images: "Tensor", labels: "Tensor") -> "Tensor":
        import torch

        return torch.as_tensor(self._attack.generate(images.cpu().numpy(), labels.cpu().numpy()))
