"""From a classifier to one with a certifying adapter: what is put beside or inside it, as plain data."""

import copy
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from rs_plugins.core.architectures.normalise import Normalise
from rs_plugins.core.certifying_adapters.adapted import AdaptedClassifier, Combine
from rs_plugins.core.certifying_adapters.backbones import SIZES, image_backbone
from rs_plugins.core.certifying_adapters.features import FeatureFunction, FeatureSplit, split_features
from rs_plugins.core.certifying_adapters.modules import (
    CertifyingAdapter,
    FeatureCertifyingAdapter,
    ImageCertifyingAdapter,
    TokenCertifyingAdapter,
)
from rs_plugins.core.checks import check_count, check_flag, check_seed, check_several
from rs_plugins.core.global_randomness import global_randomness
from rs_plugins.core.models import device_and_dtype, evaluating, probe
from rs_plugins.core.streams import stream
from rs_plugins.errors import InputError, ModelError

Kind = Literal["image", "feature", "token"]
_ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 1e-1}
_NO_TRANSFORMER = "the kind 'token' is for transformers, for others there are 'image' and 'feature'"
COPY = "copy"  # the size of a backbone that begins as the extractor


@dataclass(frozen=True, kw_only=True)
class AdapterDesign:
    """What certifying adapter a classifier gets.

    Attributes:
        kind: ``"image"``: a network beside the extractor that reads the image (Deng et al. 2024); ``"feature"``: a
            bottleneck on its features; ``"token"``: bottlenecks inside a transformer.
        size: Of the network of kind ``"image"``: ``"copy"``, a copy of the extractor that is trained on from its
            weights, all of them; or with initial weights ``"tiny"``, ``"small"``, ``"medium"``, ``"paper"``, a
            ResNet-18. None: a copy; of other kinds there is no size.
        hidden: Width of the bottlenecks, of the other kinds; None: half of the features, or 64 in a transformer.
        sites: Names of a transformer's blocks that get a bottleneck; empty: all modules in its longest list of blocks.
        combine: ``"add"`` or ``"gated"``, as `AdaptedClassifier` explains; None: gated, but in a transformer.
        head: ``"tuned"``: the old head, trained along; ``"frozen"``: the old head as it is; ``"fresh"``: one with
            initial weights, as in the code of Deng et al.
        head_name: Name of the layer that gives the logits; None: it is looked for.

    Raises:
        InputError: If a setting has an impossible value.
    """

    kind: Kind = "image"
    size: str | None = None
    hidden: int | None = None
    sites: tuple[str, ...] = ()
    combine: Combine | None = None
    head: Literal["tuned", "frozen", "fresh"] = "tuned"
    head_name: str | None = None

    def __post_init__(self) -> None:
        _check_one_of(self.kind, get_args(Kind), "kind")
        if self.size is None and self.kind == "image":
            object.__setattr__(self, "size", COPY)
        if self.size is not None:
            _check_one_of(self.size, (*SIZES, COPY), "size")
        if self.combine is None:
            object.__setattr__(self, "combine", "add" if self.kind == "token" else "gated")
        _check_one_of(self.combine, get_args(Combine), "combine")
        _check_one_of(self.head, ("tuned", "frozen", "fresh"), "head")
        if isinstance(self.sites, str):
            raise InputError(f"sites: expected names of blocks, got the text {self.sites!r}")
        object.__setattr__(self, "sites", tuple(check_several(self.sites, "sites", "names of blocks")))
        if self.hidden is not None:
            check_count(self.hidden, "hidden")
        for name, kinds in (("size", ("image",)), ("hidden", ("feature", "token")), ("sites", ("token",))):
            if getattr(self, name) and self.kind not in kinds:
                of = " or ".join(map(repr, kinds))
                raise InputError(f"{name}: only for the kind {of}, got {getattr(self, name)!r} for {self.kind!r}")

    def plain(self) -> dict[str, Any]:
        """Return the settings as plain data, of which ``AdapterDesign(**…)`` makes the same again."""
        return {**asdict(self), "sites": list(self.sites)}


def adapt(
    model: nn.Module,
    shape: tuple[int, ...],
    design: AdapterDesign | None = None,
    *,
    feature_fn: FeatureFunction | None = None,
    seed: int = 0,
    copied: bool = False,
) -> AdaptedClassifier:
    """Return ``model`` with a certifying adapter; ``model`` itself stays as it is.

    A `Normalise` layer that comes first in a Sequential is in front of the certifying adapter, too; normalisation
    elsewhere in the model remains a part of the extractor.

    Args:
        model: A classifier, pixels (n, *input) to logits (n, classes).
        shape: Of an image, such as (3, 32, 32).
        design: Which certifying adapter; by default `AdapterDesign` with its defaults.
        feature_fn: A function of a copy of ``model`` and images (n, *input) that returns features (n, p), for a model
            that has no linear layer which gives the logits. The head is then a fresh one, unless the design names the
            layer that makes logits of these features; normalisation remains a part of the extractor.
        seed: Of its initial weights; the global generators are as before.
        copied: Whether the result has weights of its own; otherwise the extractor shares those of ``model``, so that
            several results take little memory, and training ``model`` later changes them all.

    Raises:
        InputError: If the layer that gives the logits is not found, the model does not fit the design, or a setting has
            an impossible value.
        ModelError: If the model cannot be run on images of ``shape``, or does more than its extractor and its head.
    """
    design = AdapterDesign() if design is None else design
    if not isinstance(design, AdapterDesign):
        raise InputError(f"design: expected an AdapterDesign, got {type(design).__name__}")
    if not isinstance(model, nn.Module):
        raise InputError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    check_flag(copied, "copied")
    device, dtype = device_and_dtype(model)
    sides = [check_count(side, "shape") for side in check_several(shape, "shape", "sides of an image")]
    example = torch.full((1, *sides), 0.5, device=device, dtype=dtype)
    classes = probe(model, example)
    normalise, rest = (None, model) if feature_fn is not None else _without_normalisation(model)
    if normalise is not None:
        with torch.no_grad():
            example = normalise(example)
    name = _inside(design.head_name, model, rest)
    split = split_features(rest, example, head_name=name, feature_fn=feature_fn, copy=copied)
    with global_randomness(stream(check_seed(seed), "certifying adapter").initial_seed()):
        adapter = _adapter(design, split, example).to(device, dtype)
        head = _head(design, split, classes).to(device, dtype)
    adapted = AdaptedClassifier(
        *(split.extractor, adapter, head),
        normalise=copy.deepcopy(normalise),
        combine=design.combine or "add",
        freeze_head=design.head == "frozen",
    )
    if head is split.head:
        _check_beginning(adapted, model, torch.full((1, *shape), 0.5, device=device, dtype=dtype))
    return adapted


def _check_beginning(adapted: AdaptedClassifier, model: nn.Module, grey: Tensor) -> None:
    """Compare the logits of ``adapted`` with those of ``model``, but for rounding, on ``grey`` and on random pixels.

    Raises:
        ModelError: If they differ.
    """
    source = stream(0, "beginning of an adapted classifier")
    pixels = torch.rand(grey.shape, generator=source, dtype=torch.float64)
    images = torch.cat([grey, pixels.to(grey.device, grey.dtype)])
    with evaluating(model), evaluating(adapted), torch.no_grad():
        expected, got = model(images), adapted(images)
    scale = max(1.0, float(expected.abs().max()))
    if not torch.allclose(got, expected, rtol=0, atol=scale * _ROUNDING[grey.dtype]):
        far = float((got - expected).abs().max())
        raise ModelError(
            f"model: with a certifying adapter that does nothing yet its logits differ by {far:.3g}; something in it "
            "belongs neither to the extractor nor to the head"
        )


def _without_normalisation(model: nn.Module) -> tuple[nn.Module | None, nn.Module]:
    """Return the normalisation that comes first in ``model``, or None, and the rest.

    A Sequential that does anything else than to call its parts is left whole.
    """
    if not isinstance(model, nn.Sequential) or len(model) < 2 or not isinstance(model[0], Normalise):
        return None, model
    hooked = any(value for name, value in vars(model).items() if "hooks" in name)
    if type(model) is not nn.Sequential or "forward" in vars(model) or hooked:
        return None, model
    return model[0], model[1] if len(model) == 2 else model[1:]


def _inside(name: str | None, model: nn.Module, rest: nn.Module) -> str | None:
    """Return what the part called ``name`` in ``model`` is called in ``rest``."""
    if name is None or rest is model:
        return name
    wanted = dict(model.named_modules(remove_duplicate=False)).get(name)
    return next((inner for inner, part in rest.named_modules(remove_duplicate=False) if part is wanted), name)


def _adapter(design: AdapterDesign, split: FeatureSplit, example: Tensor) -> CertifyingAdapter:
    features = split.feature_dim
    if design.kind == "feature":
        return FeatureCertifyingAdapter(features, hidden=design.hidden)
    if design.kind == "image" and design.size == COPY:
        return ImageCertifyingAdapter(_trainable_copy(split.extractor), features)
    if design.kind == "image":
        backbone = image_backbone(tuple(example.shape[1:]), design.size or COPY)
        return ImageCertifyingAdapter(backbone, features, backbone_dim=backbone.features)
    sites = design.sites or _blocks(split.extractor)
    hidden = 64 if design.hidden is None else design.hidden
    return TokenCertifyingAdapter(sites, _token_width(split.extractor, sites, example), features, hidden=hidden)


def _trainable_copy(extractor: nn.Module) -> nn.Module:
    backbone = copy.deepcopy(extractor)
    parameters = [parameter for parameter in backbone.parameters() if parameter.is_floating_point()]
    if not parameters:
        raise InputError("size: the extractor has no weights, so a copy of it has nothing to train; choose another one")
    for parameter in parameters:
        parameter.requires_grad_(True)
    return backbone.train()


def _head(design: AdapterDesign, split: FeatureSplit, classes: int) -> nn.Linear:
    """Return the old head, or a fresh one where that is asked for, or there is no old one."""
    if split.head is not None and design.head != "fresh":
        return split.head
    return nn.Linear(split.feature_dim, classes, bias=split.head is None or split.head.bias is not None)


def _blocks(extractor: nn.Module) -> tuple[str, ...]:
    """Return the names of the parts of the longest list of modules of one class, which are a transformer's blocks."""
    lists = [
        [f"{name}.{inner}" if name else inner for inner, _ in part.named_children()]
        for name, part in extractor.named_modules()
        if isinstance(part, nn.Sequential | nn.ModuleList) and len({type(child) for child in part.children()}) == 1
    ]
    if not lists:
        raise InputError(
            f"sites: expected names of blocks that return tokens, as no list of blocks was found; {_NO_TRANSFORMER}"
        )
    longest: list[str] = max(lists, key=len)
    return tuple(longest)


def _token_width(extractor: nn.Module, sites: tuple[str, ...], example: Tensor) -> int:
    """Return the width of the tokens that all the blocks called ``sites`` return."""
    parts, found = dict(extractor.named_modules()), dict[str, object]()
    if missing := [site for site in sites if site not in parts]:
        raise InputError(f"sites: the extractor has no module {missing[0]!r}")

    def note(site: str, _module: nn.Module, _inputs: object, tokens: object) -> None:
        found[site] = tokens

    handles = [parts[site].register_forward_hook(partial(note, site)) for site in sites]
    try:
        with evaluating(extractor), torch.no_grad():
            extractor(example)
    finally:
        for handle in handles:
            handle.remove()
    for site in sites:
        tokens = found.get(site)
        if not isinstance(tokens, Tensor) or tokens.ndim != 3:
            got = tuple(tokens.shape) if isinstance(tokens, Tensor) else type(tokens).__name__
            got = got if site in found else "none, as it does not run"
            raise InputError(
                f"sites: expected {site} to return tokens (n, tokens, width), got {got}; {_NO_TRANSFORMER}"
            )
    widths = {site: tokens.shape[2] for site, tokens in found.items() if isinstance(tokens, Tensor)}
    if len(set(widths.values())) > 1:
        raise InputError(f"sites: expected tokens of one width, got {widths}")
    return widths[sites[0]]


def _check_one_of(value: object, expected: tuple[str, ...], name: str) -> None:
    if not isinstance(value, str) or value not in expected:
        raise InputError(f"{name}: expected one of {', '.join(map(repr, expected))}, got {value!r}")
