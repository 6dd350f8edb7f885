"""A classifier in two parts: a frozen extractor of features, and its last layer, which may learn."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor, nn

from rs_plugins.core.checks import check_flag, check_floating
from rs_plugins.core.frozen_copy import buffers_unchanged, frozen_copy, unwrapped
from rs_plugins.core.models import check_noiseless, check_unchanged, probe
from rs_plugins.core.streams import stream
from rs_plugins.errors import InputError, ModelError

FeatureFunction = Callable[[nn.Module, Tensor], Tensor]

_NAMES_SHOWN = 6
_ADVICE = (
    "take off what comes after it, such as a softmax, which changes no decision; for another network pass (in Python) "
    "feature_fn(model, x), which returns features (n, p), and the last layer is a new one"
)


@dataclass(frozen=True, eq=False)
class FeatureSplit:
    """A classifier in two parts: ``head(extractor(x))`` are its logits in eval mode, to the last bit.

    They are those of the classifier with frozen parameters. In rare layers torch rounds the last bit otherwise where
    parameters ask for a gradient, even if none is taken.

    Attributes:
        extractor: Makes features (n, p) of what the model takes, (n, *input). In eval mode, no parameter of it asks
            for a gradient; gradients with respect to its input flow.
        head: The last layer, features (n, p) to logits (n, classes): a copy with weights of its own, all trainable.
            None where ``feature_fn`` was given without a ``head_name``.
        feature_dim: Number p of features.
        head_name: Name of that layer in the model, out of its wrappers; "" where the model is that layer alone, None
            where ``head`` is.
    """

    extractor: nn.Module
    head: nn.Linear | None
    feature_dim: int
    head_name: str | None


class FunctionExtractor(nn.Module):
    """What a function makes of a model and images: (n, *input) to features (n, p).

    Args:
        model: Handed to the function.
        feature_fn: Takes the model and images (n, *input), returns features (n, p).
    """

    def __init__(self, model: nn.Module, feature_fn: FeatureFunction) -> None:
        super().__init__()
        self.model = model
        self.feature_fn = feature_fn

    def forward(self, x: Tensor) -> Tensor:
        """Return the features (n, p) of images (n, *input)."""
        return self.feature_fn(self.model, x)


def split_features(
    model: nn.Module,
    example: Tensor,
    *,
    head_name: str | None = None,
    feature_fn: FeatureFunction | None = None,
    copy: bool = False,
) -> FeatureSplit:
    """Split a classifier into what makes features and the linear layer that makes logits of them.

    That layer is the one whose output the model returns as it is, found by running the model. It need not be the last
    one that is defined, or that runs. ``model`` stays as it was: what is run, and returned, is a copy of its modules,
    hooks included. The copy has the very weights and buffers of ``model``, so it needs no more memory, and when
    ``model`` is trained later the extractor changes with it; pass ``copy=True`` to prevent that. Loading weights into
    such an extractor would load them into ``model``. Where modules refuse to be copied so, they get weights of their
    own in any case. DataParallel, DistributedDataParallel and compiled modules are taken out of their wrappers.

    Args:
        model: The classifier, images (n, *input) to logits (n, classes).
        example: A batch of images that ``model`` takes, (1, *input), say all grey; moved to the model's device and
            type. The model runs on it and on as many images of random pixels.
        head_name: Dotted name of the last layer, to be sure which one is taken.
        feature_fn: A function that takes the copy of ``model`` and images (n, *input) and returns features (n, p), for
            models without such a layer, or with other features than its input. Without ``head_name`` the split has no
            head, and logits of ``model`` are not asked for.
        copy: Whether the extractor has weights and buffers of its own.

    Raises:
        InputError: If no linear layer, or not the one of that name, makes the logits, features are not (n, p), or
            another argument is not what it should be.
        ModelError: If the model cannot be copied or run, returns no logits, changes its buffers in eval mode, or the
            parts together do not return its logits to the last bit.
    """
    check_noiseless(model, "model")
    _check_options(example, head_name, feature_fn)
    own = check_flag(copy, "copy")
    with torch.inference_mode(mode=False), torch.no_grad():  # inference tensors could not be differentiated later
        twin = frozen_copy(unwrapped(model), own=own)
        images = _images(example, twin)
        with buffers_unchanged(twin):
            if feature_fn is None:
                return _split_before_head(twin, images, head_name)
            return _split_by_function(twin, images, head_name, feature_fn)


def _check_options(example: Tensor, head_name: str | None, feature_fn: FeatureFunction | None) -> None:
    if not len(check_floating(example, "example")):
        raise InputError(f"example: expected at least one image, got shape {tuple(example.shape)}")
    if not isinstance(head_name, str | None):
        raise InputError(f"head_name: expected the name of a layer, or None, got {type(head_name).__name__}")
    if feature_fn is not None and (isinstance(feature_fn, nn.Module) or not callable(feature_fn)):
        raise InputError(f"feature_fn: expected a function feature_fn(model, x), got {type(feature_fn).__name__}")


def _images(example: Tensor, model: nn.Module) -> Tensor:
    """Return the images of ``example`` and as many of random pixels: grey ones may well hide a difference."""
    floating = (value for value in chain(model.parameters(), model.buffers()) if value.is_floating_point())
    like = next(floating, example)
    pixels = torch.rand(example.shape, generator=stream(0, "features"), device="cpu")
    return torch.cat([part.detach().to(like.device, like.dtype) for part in (example, pixels)])


def _split_before_head(twin: nn.Module, images: Tensor, head_name: str | None) -> FeatureSplit:
    found = _find_head(twin, images, head_name)
    head = _trainable(found.layer)
    extractor = _without(twin, found.layer).eval()
    features = _features(extractor, images, f"model: without its last layer {found.name!r}")
    _check_exact(head, features, found, "that layer may be used beside its own call, or")
    return FeatureSplit(extractor, head, head.in_features, found.name)


def _split_by_function(
    twin: nn.Module, images: Tensor, head_name: str | None, feature_fn: FeatureFunction
) -> FeatureSplit:
    extractor = FunctionExtractor(twin, feature_fn).eval()
    features = _features(extractor, images, "feature_fn:")
    if features.requires_grad:
        raise InputError("feature_fn: expected a function of the model that it is given, got features of other weights")
    if head_name is None:
        return FeatureSplit(extractor, None, features.shape[1], None)
    found = _find_head(twin, images, head_name)
    head = _trainable(found.layer)
    if head.in_features != features.shape[1]:
        raise InputError(
            f"feature_fn: expected as many features as {head_name!r} takes, {head.in_features}, got {features.shape[1]}"
        )
    _check_exact(head, features, found, "feature_fn may return something else than what the model puts into it, or")
    return FeatureSplit(extractor, head, head.in_features, head_name)


def _features(extractor: nn.Module, images: Tensor, who: str) -> Tensor:
    """Return what ``extractor`` makes of ``images`` if it is (n, p); ``who`` begins the sentence in messages."""
    images = images.clone()
    try:
        with torch.enable_grad(), check_unchanged(images):
            features = extractor(images)
    except ModelError:
        raise
    except Exception as error:  # somebody else's code may raise anything
        reason = f"{type(error).__name__}: {error}"
        raise ModelError(f"{who} it fails on images of shape {tuple(images.shape)} ({reason})") from error
    if not isinstance(features, Tensor) or not features.is_floating_point():
        got = f"a tensor of {features.dtype}" if isinstance(features, Tensor) else type(features).__name__
        raise InputError(f"{who} expected floating-point features of shape (n, p), got {got}")
    if features.ndim != 2 or len(features) != len(images):
        raise InputError(
            f"{who} expected features of shape (n, p), got shape {tuple(features.shape)} for {len(images)} images; "
            "let feature_fn(model, x) pool them, say by their mean over all places"
        )
    if bool(features.isnan().any()):
        raise ModelError(f"{who} it returns NaN features of clean images")
    return features


class _Head(NamedTuple):
    """The last layer, its name in the model, and the logits that the model gave."""

    layer: nn.Linear
    name: str
    logits: Tensor


class _Run(NamedTuple):
    """One run of a linear layer: what it returned, and in which version."""

    layer: nn.Module
    output: Tensor
    version: int

    def gave(self, result: Tensor) -> bool:
        """Return whether ``result`` is the output, with nothing done to it after."""
        output = self.output
        same = output is result or (
            output.data_ptr() == result.data_ptr()
            and (output.shape, output.stride(), output.dtype) == (result.shape, result.stride(), result.dtype)
        )
        return same and result._version == self.version


class _Watched(nn.Module):
    """A model that remembers what it returned, and which of its linear layers ran."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.runs: list[_Run] = []
        self.results: list[Tensor] = []
        linear = [part for part in model.modules() if isinstance(part, nn.Linear)]
        self.handles = [part.register_forward_hook(self._note) for part in linear]

    def _note(self, layer: nn.Module, _inputs: object, output: object) -> None:
        if isinstance(output, Tensor):
            self.runs.append(_Run(layer, output, output._version))

    def forward(self, x: Tensor) -> Tensor:
        """Return what the model does."""
        result: Tensor = self.model(x)
        self.results.append(result)
        return result

    def unwatch(self) -> None:
        """Take the hooks away again."""
        for handle in self.handles:
            handle.remove()


def _find_head(twin: nn.Module, images: Tensor, name: str | None) -> _Head:
    """Return the layer of that name, or the one whose output ``twin`` returns."""
    watched = _Watched(twin)
    probe(watched, images)
    watched.unwatch()
    layers, logits = _linear_layers(twin), watched.results[0]
    if name is not None:
        layer = _named(twin, layers, watched.runs, name, logits)
    else:
        gave = [run.layer for run in watched.runs if run.gave(logits)]
        if not gave:
            raise InputError(f"model: expected a torch.nn.Linear whose output is the logits, {_got(layers, watched)}")
        name = _place(layers, gave[-1])
        layer = layers[name]
    runs = sum(run.layer is layer for run in watched.runs)
    if runs > 1:
        raise InputError(f"model: expected its last layer {name!r} to run once, got {runs} runs; pass feature_fn")
    return _Head(layer, name, logits)


def _named(twin: nn.Module, layers: dict[str, nn.Linear], runs: list[_Run], name: str, logits: Tensor) -> nn.Linear:
    if name not in layers:
        there = dict(twin.named_modules(remove_duplicate=False)).get(name)
        got = repr(name) if there is None else f"{name!r}, a {type(there).__name__}"
        raise InputError(f"head_name: expected a torch.nn.Linear of the model ({_names(list(layers))}), got {got}")
    outputs = [run for run in runs if run.layer is layers[name]]
    if not outputs:
        raise InputError(f"head_name: expected the layer that makes the logits, but {name!r} does not run in eval mode")
    if not any(run.gave(logits) for run in outputs):
        shape = tuple(outputs[-1].output.shape)
        raise InputError(
            f"head_name: expected the layer whose output is the logits, but something comes after {name!r}, which "
            f"returns shape {shape}; {_ADVICE}"
        )
    return layers[name]


def _got(layers: dict[str, nn.Linear], watched: _Watched) -> str:
    ran = [_place(layers, run.layer) for run in watched.runs]
    if not ran:
        return "got none that runs; pass feature_fn(model, x), which returns features (n, p)"
    return f"got others ({_names(list(dict.fromkeys(ran)))}, in the order in which they run); {_ADVICE}"


def _place(layers: dict[str, nn.Linear], layer: nn.Module) -> str:
    return next(place for place, part in layers.items() if part is layer)


def _names(names: list[str]) -> str:
    if not names:
        return "there is none"
    return ", ".join(["…"] * (len(names) > _NAMES_SHOWN) + names[-_NAMES_SHOWN:])


def _linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    named = model.named_modules(remove_duplicate=False)
    return {name: part for name, part in named if isinstance(part, nn.Linear)}


def _trainable(layer: nn.Linear) -> nn.Linear:
    """Return a plain linear layer with the weights of ``layer``, also where those are computed from others."""
    head = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
    head.weight = nn.Parameter(layer.weight.detach().clone())
    if layer.bias is not None:
        head.bias = nn.Parameter(layer.bias.detach().clone())
    return head


def _without(twin: nn.Module, layer: nn.Linear) -> nn.Module:
    """Put nothing in every place of ``layer``."""
    for place, part in _linear_layers(twin).items():
        if part is layer:
            if not place:
                return nn.Identity()
            parent, _, attribute = place.rpartition(".")
            setattr(twin.get_submodule(parent), attribute, nn.Identity())
    return twin


def _check_exact(head: nn.Linear, features: Tensor, found: _Head, why: str) -> None:
    fits = features.shape[1] == head.in_features
    if not fits or not torch.equal(head(features), found.logits):
        raise ModelError(
            f"model: expected features with the layer {found.name!r} after them to give its logits to the last bit, "
            f"got others; {why} that layer is not a plain one (hooks, a forward of its own), or the model is random in "
            "eval mode; pass another feature_fn, without head_name for a fresh head"
        )
