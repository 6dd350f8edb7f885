"""Smooth activations in the place of ReLU, in any model (Xie et al. 2020, "Smooth Adversarial Training")."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from rs_plugins.core.activation_replacement.calls import CallCounter, is_capped_name, is_relu
from rs_plugins.core.activation_replacement.function_mode import SmoothedCalls
from rs_plugins.core.activation_replacement.rewriting import Untraceable, rewrite
from rs_plugins.core.activation_replacement.running import called_again, count, outputs, reads_what_it_handed_in
from rs_plugins.core.activation_replacement.surgery import Replacements, replace_modules
from rs_plugins.core.activations import make_activation
from rs_plugins.core.checks import check_count, check_flag, check_floating
from rs_plugins.core.frozen_copy import frozen_copy, unwrapped
from rs_plugins.core.models import check_noiseless
from rs_plugins.core.smooth_backward import ReLUWithSmoothBackward
from rs_plugins.core.streams import stream
from rs_plugins.errors import InputError, ModelError, ModelWarning

Mechanism = Literal["auto", "modules", "fx", "mode"]
IMAGES = 2  # with fewer, batch normalisation may refuse to train


@dataclass(frozen=True)
class ActivationReport:
    """What became of the ReLUs of a model.

    Attributes:
        activation: What is in their place, as it prints itself.
        mechanism: "modules", "fx" or "mode".
        modules: How many ReLU modules were replaced.
        sites: How many calls in the source were rewritten with torch.fx; a module that is called twice has two.
        calls: How often one forward pass calls an activation, in eval mode.
        learnable: Names of the parameters that came in with activations: new state-dict keys.
        uncapped: Where a ReLU6 was, or what it was called as; what is there now is not capped.
        written_back: Whether activations overwrite their inputs where an in-place ReLU did, since the model reads them.
        look_alikes: Calls that are left and compute max(z, 0) by another name, such as clamp(min=0), with numbers.
        remaining: Calls of ReLU that are left, with numbers.
        unchecked: Why calls in train mode were not counted; empty if they were.
    """

    activation: str
    mechanism: Mechanism
    modules: int
    sites: int
    calls: int
    learnable: tuple[str, ...] = ()
    uncapped: tuple[str, ...] = ()
    written_back: bool = False
    look_alikes: Mapping[str, int] = field(default_factory=dict)
    remaining: Mapping[str, int] = field(default_factory=dict)
    unchecked: str = ""

    def __str__(self) -> str:
        parts = [f"{self.activation} in the place of ReLU, by {self.mechanism}: {self.modules} modules"]
        parts[0] += f" and {self.sites} call sites" if self.sites else ""
        parts.append(f"{self.calls} calls in a forward pass")
        parts += [f"{len(self.learnable)} learnable parameters"] if self.learnable else []
        parts += [f"the cap of ReLU6 is lost at {', '.join(self.uncapped)}"] if self.uncapped else []
        parts += ["in-place results are written back"] if self.written_back else []
        parts += [f"left as they are: {_listed(self.look_alikes)}"] if self.look_alikes else []
        parts += [f"still called: {_listed(self.remaining)}"] if self.remaining else []
        parts += [f"not seen in train mode ({self.unchecked})"] if self.unchecked else []
        return "; ".join(parts)


class SmoothModel(NamedTuple):
    """A converted model, and what was done to it: ``model, report = smooth_activations(…)``.

    Attributes:
        model: The converted copy.
        report: Counts and remarks.
    """

    model: nn.Module
    report: ActivationReport


def smooth_activations(
    model: nn.Module,
    activation: str | Callable[[], nn.Module],
    example: Tensor | Sequence[int],
    *,
    mechanism: Mechanism = "auto",
    strict: bool = True,
    **options: Any,
) -> SmoothModel:
    """Return a copy of ``model`` with another activation wherever it calls ReLU, and a report (Xie et al. 2020).

    The copy has weights of its own, so that ``model`` stays as it was; make the optimiser for the copy. Weights that
    were trained with ReLU no longer fit: train on. ``"parametric-softplus"`` with a large ``sharpness`` is nearest.

    * ``"modules"``: modules in the place of ReLU modules, hooks kept. Paths and state-dict keys stay; a ReLU that is
      used at several places becomes one activation, which learns one parameter for all.
    * ``"fx"``: each call in the source, of a module or a function, gets an activation of its own. Modules and keys
      stay; the result takes images alone, has no other methods of the model, and goes by what its attributes were.
      Refused where the way through the model depends on values, shapes or modes, where it draws random numbers as
      Python's, and where it keeps something in itself. torch.utils.checkpoint is lost.
    * ``"mode"``: modules as above; ReLU functions are caught while the model runs, and share one activation. Any code
      goes, except that torch.utils.checkpoint runs parts again where nothing is caught. The model becomes a part of the
      result: its keys begin with ``model.``. Bounds do not see through it, and torch.compile leaves it as it is.
    * ``"auto"``: the first of modules, fx (for functions) and mode that leaves no ReLU.

    The result is a pair, as a report is what nobody should have to ask for, and the model what everybody goes on with.
    Activations that learn (``"smooth-relu"``) add keys to the state dict. Convert before torch.compile and
    DistributedDataParallel. That no ReLU is left is looked up in runs of the copy on ``example``, in eval and in train
    mode, and not where those do not come by. What computes ReLU by ``where``, a mask or a leak of 0 is not known. ReLU
    of weights is replaced, too. Activations in frozen layers learn unless they are frozen.

    Args:
        model: A classifier.
        activation: A name (see `make_activation`), or a function without arguments that makes a module.
        example: Images (n, *input) of which two are used, or the shape of one, such as (3, 32, 32). Required, since
            without a run nobody knows whether some ReLU is left.
        mechanism: How.
        strict: Whether a ReLU that is left is an error, or a warning; so is that there was none to replace.
        options: What `make_activation` takes: ``initial`` of "smooth-relu", ``alpha`` of "celu", ….

    Raises:
        InputError: If an argument has an impossible value.
        ModelError: If ``model`` fails on the example or returns no tensors, has script modules, cannot be copied, or
            still calls ReLU or never did, or if the converted copy fails.

    Warns:
        ModelWarning: If calls are left that compute max(z, 0) by another name, or ReLU6 lost its cap.
    """
    mechanism, strict = _check_mechanism(mechanism), check_flag(strict, "strict")
    make = _maker(activation, options)
    _check_convertible(model)
    images = _images(model, example)
    _check_runs(_copy(model), images)
    conversion = _Conversion(model, make, images, mechanism)
    converted, report = conversion.best()
    problem = ""
    if report.remaining:
        problem = f"ReLU is still called after conversion by {report.mechanism!r}: {_listed(report.remaining)}"
        problem += conversion.advice
    elif conversion.idle:
        problem = "it calls no ReLU on the example, so there is nothing to replace"
    if problem and strict:
        raise ModelError(f"model: {problem}")
    likes = f"max(z, 0) by another name is left as it is: {_listed(report.look_alikes)}" if report.look_alikes else ""
    caps = f"the cap of ReLU6 is lost at {', '.join(report.uncapped)}" if report.uncapped else ""
    for remark in filter(None, (problem, likes, caps)):
        warnings.warn(f"model: {remark}", ModelWarning, stacklevel=2)
    return SmoothModel(converted, report)


class _Conversion:
    """Tries one mechanism, or each in turn."""

    def __init__(self, model: nn.Module, make: Callable[[], nn.Module], images: Tensor, mechanism: Mechanism) -> None:
        self._model, self._make, self._images, self._mechanism = model, make, images, mechanism
        self.idle = True  # whether the last report is of nothing
        self.advice = "" if mechanism in ("auto", "mode") else "; mechanism='auto' also replaces functions"

    def best(self) -> SmoothModel:
        if self._mechanism != "auto":
            return self._by(self._mechanism)
        found = self._by("modules")
        if not found.report.remaining:
            return found
        try:
            found = self._by("fx", after_surgery=True)
        except _NotRewritten as reason:
            self.advice = f" (not rewritten with torch.fx: {reason.why})"
        return self._by("mode") if found.report.remaining else found

    def _by(self, mechanism: Mechanism, *, after_surgery: bool = False) -> SmoothModel:
        for write_back in (False, True):
            copy, made = _copy(self._model), Replacements(self._fresh, write_back)
            converted = self._converted(copy, made, mechanism, after_surgery)
            if not write_back and made.in_place and reads_what_it_handed_in(converted, self._images, made.in_place):
                continue
            return SmoothModel(converted, self._report(converted, mechanism, made))
        raise AssertionError("the second turn returns")

    def _converted(self, copy: nn.Module, made: Replacements, mechanism: Mechanism, after_surgery: bool) -> nn.Module:
        if mechanism == "fx":
            return self._rewritten(copy, made, after_surgery)
        renewed = replace_modules(copy, made)
        if mechanism == "modules":
            return renewed
        calls = self._count(renewed, made)
        if calls.inside and not isinstance(made.modules[0], ReLUWithSmoothBackward):
            raise ModelError("activation: it calls ReLU itself, which mechanism='mode' would replace in modules, too")
        made.uncapped += [name for name in calls.relu if is_capped_name(name)]
        return SmoothedCalls(renewed, made.new("", training=renewed.training))

    def _rewritten(self, copy: nn.Module, made: Replacements, after_surgery: bool) -> nn.Module:
        try:
            if after_surgery:
                return rewrite(replace_modules(copy, made), self._images, made)
            return replace_modules(rewrite(copy, self._images, made), made)
        except Untraceable as error:
            raise _NotRewritten(str(error)) from error

    def _fresh(self) -> nn.Module:
        home = _home(self._model, self._images)
        return self._make().to(home.device, home.dtype)

    def _report(self, converted: nn.Module, mechanism: Mechanism, made: Replacements) -> ActivationReport:
        calls = self._count(converted, made)
        remaining, similar, unchecked = dict(calls.relu), dict(calls.similar), ""
        self.idle = not (made.surgery or made.sites or calls.replaced)
        try:
            trained = count(converted, self._images, made.modules, training=True)
            remaining, similar = {**trained.relu, **remaining}, {**trained.similar, **similar}
            self.idle = self.idle and not trained.replaced
        except Exception as error:  # whatever a model may raise where it cannot be trained on two images
            unchecked = f"{type(error).__name__}: {error}"
        if isinstance(converted, SmoothedCalls):
            again = called_again(converted, self._images)
            remaining |= {"in a backward pass with checkpointing": again} if again else {}
        learned = {id(parameter) for module in made.modules for parameter in module.parameters()}
        return ActivationReport(
            activation=repr(self._make()),
            mechanism=mechanism,
            modules=made.surgery,
            sites=made.sites,
            calls=calls.replaced,
            learnable=tuple(name for name, value in converted.named_parameters() if id(value) in learned),
            uncapped=tuple(made.uncapped),
            written_back=made.write_back,
            look_alikes=similar,
            remaining=remaining,
            unchecked=unchecked,
        )

    def _count(self, model: nn.Module, made: Replacements) -> CallCounter:
        try:
            return count(model, self._images, made.modules, training=False)
        except Exception as error:  # whatever an activation may raise where ReLU did not
            reason = f"{type(error).__name__}: {error}"
            raise ModelError(f"model: with {self._make()!r} in the place of ReLU it fails: {reason}") from error


class _NotRewritten(ModelError):  # noqa: N818 - a reason to go on with the next mechanism
    def __init__(self, why: str) -> None:
        super().__init__(f"model: it cannot be converted by 'fx': {why}; mechanism='mode' takes any code")
        self.why = why


def _check_mechanism(mechanism: Mechanism) -> Mechanism:
    if not isinstance(mechanism, str) or mechanism not in get_args(Mechanism):
        known = ", ".join(map(repr, get_args(Mechanism)))
        raise InputError(f"mechanism: expected one of {known}, got {mechanism!r}")
    return mechanism


def _maker(activation: str | Callable[[], nn.Module], options: dict[str, Any]) -> Callable[[], nn.Module]:
    """Return what makes a fresh activation, after it has made one."""
    if isinstance(activation, str):
        return _checked(partial(make_activation, activation, **options))
    if not callable(activation) or isinstance(activation, nn.Module):
        advice = f"; pass lambda: {activation!r}" if isinstance(activation, nn.Module) else ""
        got = type(activation).__name__
        raise InputError(f"activation: expected a name or a function that makes a module, got a {got}{advice}")
    if options:
        raise InputError(f"activation: expected a name where there are options, got {activation!r} and {options}")
    return _checked(activation)


def _checked(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    try:
        made = make()
    except TypeError as error:
        raise InputError(f"activation: expected a function without arguments that makes a module: {error}") from error
    if not isinstance(made, nn.Module):
        raise InputError(f"activation: expected a function that makes a torch.nn.Module, got one of {made!r}")
    if is_relu(made):
        raise InputError("activation: expected another one than ReLU, which is what is replaced")
    if getattr(made, "inplace", False):
        raise InputError(f"activation: expected one that leaves its input as it is, got {made!r}")
    return make


def _check_convertible(model: nn.Module) -> None:
    check_noiseless(model, "model")
    if unwrapped(model) is not model:
        kind = type(model).__name__
        raise InputError(f"model: expected the network itself, got a {kind} around it; convert it, then wrap it again")
    for path, part in model.named_modules():
        if isinstance(part, torch.jit.ScriptModule):
            where = f"{path} ({type(part).__name__})" if path else type(part).__name__
            raise ModelError(f"model: {where}: a script module's code cannot be changed; convert it before scripting")


def _images(model: nn.Module, example: Tensor | Sequence[int]) -> Tensor:
    if isinstance(example, Tensor):
        images = check_floating(example, "example").detach()
        if not len(images):
            raise InputError(f"example: expected at least one image, got shape {tuple(images.shape)}")
        return images[:IMAGES] if len(images) >= IMAGES else torch.cat([images] * IMAGES)
    if isinstance(example, str) or not isinstance(example, Sequence) or not example:
        raise InputError(f"example: expected images (n, *input) or the shape of one, got {example!r}")
    shape = [check_count(size, "example") for size in example]
    pixels = torch.rand(IMAGES, *shape, generator=stream(0, "activations"), dtype=torch.float64)
    home = _home(model, torch.zeros(0))
    return pixels.to(home.device, home.dtype)


def _home(model: nn.Module, otherwise: Tensor) -> Tensor:
    """Return a tensor on the device of ``model`` and in its type."""
    return next((value for value in chain(model.parameters(), model.buffers()) if value.is_floating_point()), otherwise)


def _check_runs(model: nn.Module, images: Tensor) -> None:
    try:
        found = outputs(model, images, training=False)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise ModelError(f"model: it fails on an input of shape {tuple(images.shape)}: {reason}") from error
    if not found:
        raise ModelError("model: expected it to return tensors, or a tuple, list or dictionary of them")


def _copy(model: nn.Module) -> nn.Module:
    """Return a copy with its own weights, in the same modes, that learns what ``model`` learns."""
    copy = frozen_copy(model, own=True)
    for part, twin in zip(model.modules(), copy.modules(), strict=True):
        twin.training = part.training
    for value, twin_value in zip(model.parameters(), copy.parameters(), strict=True):
        twin_value.requires_grad_(value.requires_grad)
    return copy


def _listed(numbers: Mapping[str, int]) -> str:
    return ", ".join(f"{name} ({number})" for name, number in numbers.items())
