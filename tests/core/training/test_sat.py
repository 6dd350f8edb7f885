"""The objective of adversarial training, SAT's with a smooth activation, against hand-made attacks and losses."""

import math

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from rs_plugins.core.activations import SmoothReLU
from rs_plugins.core.noise import GaussianNoise
from rs_plugins.core.smooth_backward import ReLUWithSmoothBackward
from rs_plugins.core.streams import stream
from rs_plugins.core.training.objective import Batch, StreamDraws
from rs_plugins.core.training.sat import Sat
from rs_plugins.errors import InputError, ModelError


def draws(seed: int = 0) -> StreamDraws:
    return StreamDraws(stream(seed, "test"), seed)


def images(n: int = 6, *, edges: bool = False) -> torch.Tensor:
    x = torch.rand(n, 1, 4, 4, generator=stream(1, "images"))
    return x.round() if edges else x


def labels(n: int = 6) -> torch.Tensor:
    return torch.arange(n) % 3


def network(activation: nn.Module | None = None) -> nn.Module:
    torch_weights = stream(2, "weights")
    model = nn.Sequential(
        *(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), activation or nn.SiLU(), nn.Dropout(0.0), nn.Flatten()),
        nn.Linear(12, 3),
    )
    with torch.no_grad():
        for value in model.parameters():
            value.copy_(torch.randn(value.shape, generator=torch_weights))
    return model.train()


class Recorded(nn.Module):
    """A linear classifier of the sum of pixels times a weight, which keeps what it was shown."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(scale * torch.randn(16, 3, generator=stream(3, "weights")))
        self.seen: list[torch.Tensor] = []
        self.modes: list[bool] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.append(x.detach().clone())
        self.modes.append(self.training)
        return x.flatten(1) @ self.weight


def by_hand(model: nn.Module, x: torch.Tensor, y: torch.Tensor, start: torch.Tensor, method: Sat) -> torch.Tensor:
    """The spec's algorithm, image by image."""
    step = max(method.step or 0.0, method.eps / method.steps)
    found = []
    for image, label, here in zip(x.double(), y, start.double(), strict=True):
        for _ in range(method.steps):
            leaf = here.clone().requires_grad_()
            (slope,) = torch.autograd.grad(cross_entropy(model(leaf[None]), label[None]), leaf)
            if method.norm == "linf":
                here = (here + step * slope.sign()).clamp(image - method.eps, image + method.eps)
            else:
                delta = here + step * slope / slope.norm() - image
                here = image + delta * min(1.0, method.eps / float(delta.norm()))
            here = here.clamp(0, 1)
        found.append(here.float())
    return torch.stack(found)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize(("steps", "step"), [(1, None), (3, None), (4, 0.2), (3, 0.001)])
def test_the_attack_and_the_loss_are_those_of_the_paper(norm: str, steps: int, step: float | None) -> None:
    method = Sat(0.3, norm=norm, steps=steps, step=step, clean_start=1.0, label_smoothing=0.2)
    model, x, y = network(), images(), labels()
    twin = network().double().eval()
    adversarial = by_hand(twin, x, y, x, method)

    loss = method(model, Batch(x, y), draws())

    log_p = network()(adversarial).log_softmax(dim=1)
    target = 0.2 / 3 + 0.8 * torch.eye(3)[y]
    torch.testing.assert_close(loss, -(target * log_p).sum(dim=1).mean(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_one_step_from_the_image_has_the_length_eps(norm: str) -> None:
    method, model = Sat(0.1, norm=norm, clean_start=1.0), Recorded()
    x = 0.4 + 0.2 * images()
    method(model, Batch(x, labels()), draws())
    moved = (model.seen[-1] - x).flatten(1)
    length = moved.abs() if norm == "linf" else moved.norm(dim=1)
    torch.testing.assert_close(length, torch.full_like(length, 0.1))


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_random_start_is_uniform_in_the_ball_and_each_image_has_its_own(norm: str) -> None:
    method, model = Sat(0.2, norm=norm, clean_start=0.0), Recorded(scale=0.0)  # without a gradient nothing moves
    x = torch.full((4096, 1, 4, 4), 0.5)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(*_first_two_starts(method, model, x))
    deltas = (model.seen[0] - x).flatten(1)
    assert float(deltas.mean().abs()) < 0.005
    if norm == "linf":
        assert float(deltas.abs().max()) <= 0.2 + 1e-6
        assert float(deltas.var()) == pytest.approx(0.2**2 / 3, rel=0.03)
        share = deltas.abs().flatten()
    else:
        share = deltas.norm(dim=1)
        assert float(share.max()) <= 0.2 + 1e-6
        share = 0.2 * (share / 0.2) ** 16  # the cdf of the radius in 16 dimensions
    quantiles = torch.quantile(share[:4096], torch.tensor([0.25, 0.5, 0.75])) / 0.2
    torch.testing.assert_close(quantiles, torch.tensor([0.25, 0.5, 0.75]), atol=0.03, rtol=0)


def _first_two_starts(method: Sat, model: Recorded, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    method(model, Batch(x, torch.zeros(len(x), dtype=torch.int64)), draws())
    return model.seen[0][0], model.seen[0][1]


def test_the_start_is_in_the_box() -> None:
    method, model = Sat(0.3, clean_start=0.0), Recorded()
    method(model, Batch(images(edges=True), labels()), draws())
    assert all(bool(((seen >= 0) & (seen <= 1)).all()) for seen in model.seen)


def test_a_whole_batch_begins_at_the_image_for_the_given_share_of_batches() -> None:
    method, model, x = Sat(0.1, clean_start=0.2), Recorded(), images()
    clean = 0
    for seed in range(300):
        model.seen.clear()
        method(model, Batch(x, labels()), draws(seed))
        same = (model.seen[0] == x).flatten(1).all(dim=1)
        assert bool(same.all()) or not bool(same.any())
        clean += bool(same.all())
    assert 40 <= clean <= 85  # 60 expected, standard deviation 7


@pytest.mark.parametrize("edges", [True, False])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_ball_and_box_hold_and_pixels_at_the_bounds_have_a_gradient(norm: str, edges: bool) -> None:
    method, model, x = Sat(0.25, norm=norm, steps=3, step=0.2), Recorded(), images(edges=edges)
    method(model, Batch(x, labels()), draws())
    delta = (model.seen[-1] - x).flatten(1)
    assert float(delta.abs().max()) > 0.01
    assert float(delta.abs().max() if norm == "linf" else delta.norm(dim=1).max()) <= 0.25 + 1e-6
    assert bool(((model.seen[-1] >= 0) & (model.seen[-1] <= 1)).all())


def test_the_attack_sees_eval_mode_and_leaves_batch_statistics_alone() -> None:
    model, x, y = network(), images(), labels()
    seen: list[tuple[bool, float]] = []
    norm = model[1]
    model[1].register_forward_hook(lambda part, _i, _o: seen.append((part.training, float(norm.running_mean.sum()))))
    before = float(norm.running_mean.sum())
    Sat(0.1, steps=4)(model, Batch(x, y), draws())
    assert [training for training, _ in seen] == [False] * 4 + [True]
    assert [value for _, value in seen[:4]] == [before] * 4
    assert int(norm.num_batches_tracked) == 1
    assert all(part.training for part in model.modules())


def test_frozen_layers_stay_frozen_and_only_trained_ones_get_a_gradient() -> None:
    model = network()
    model[0].requires_grad_(False)
    Sat(0.1, steps=2)(model, Batch(images(), labels()), draws()).backward()
    assert all(not value.requires_grad and value.grad is None for value in model[0].parameters())
    assert all(value.requires_grad and value.grad is not None for value in model[5].parameters())


@pytest.mark.parametrize(
    ("where", "attack_differs", "update_differs"),
    [("attack_grad", True, False), ("update_grad", False, True), ("both_grads", True, True)],
)
def test_smooth_gradients_are_taken_where_the_activation_says(
    where: str, attack_differs: bool, update_differs: bool
) -> None:
    x, y = images(), labels()
    plain, smooth = network(nn.ReLU()), network(ReLUWithSmoothBackward(where, sharpness=2.0))
    seen: dict[str, torch.Tensor] = {}
    for name, model in (("plain", plain), ("smooth", smooth)):
        model.register_forward_pre_hook(lambda _part, inputs, name=name: seen.__setitem__(name, inputs[0]))
    method = Sat(0.2, norm="l2", steps=2, clean_start=1.0)
    for model in (plain, smooth):
        method(model, Batch(x, y), draws()).backward()
    assert torch.equal(seen["plain"], seen["smooth"]) is not attack_differs
    if not attack_differs:
        same = torch.equal(plain[0].weight.grad, smooth[0].weight.grad)
        assert same is not update_differs
    assert smooth[2]._purpose is None


def test_the_curvature_of_smooth_relu_is_trained() -> None:
    model = network(SmoothReLU(2.0))
    Sat(0.1)(model, Batch(images(), labels()), draws()).backward()
    assert float(model[2].b_raw.grad.abs()) > 0


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_validate_counts_what_survives_ten_steps(norm: str) -> None:
    model, x, y = network().double().eval(), images(), labels()
    longer = Sat(0.05, norm=norm, steps=10, step=0.05 / 4)
    attacked = by_hand(model, x, y, x, longer)
    expected = int((model(attacked.double()).argmax(dim=1) == y).sum())
    assert Sat(0.05, norm=norm).validate(model, x.double(), y) == expected
    clean = int((model(x.double()).argmax(dim=1) == y).sum())
    assert Sat(1e-9, norm=norm).validate(model, x.double(), y) == clean
    assert Sat(0.05, norm=norm).figure == "adversarial accuracy"


def test_validate_takes_the_networks_own_gradient() -> None:
    x, y = images(), labels()
    counts = {
        where: Sat(0.1).validate(network(ReLUWithSmoothBackward(where, sharpness=0.1)).eval(), x, y)
        for where in ("attack_grad", "update_grad")
    }
    assert counts["attack_grad"] == counts["update_grad"] == Sat(0.1).validate(network(nn.ReLU()).eval(), x, y)


def test_the_step_is_the_same_however_the_images_are_spread() -> None:
    one, other = (Sat(0.1, clean_start=0.0)(network(), Batch(images(), labels()), draws()) for _ in range(2))
    assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"eps": 0}, "eps: expected a finite number > 0, got 0"),
        ({"eps": 8}, "eps: expected a radius in pixels of [0, 1], got 8.0; divide by 255"),
        ({"eps": math.nan}, "eps: expected a finite number > 0"),
        ({"eps": 0.1, "norm": "l1"}, "norm: expected one of 'linf', 'l2', got 'l1'"),
        ({"eps": 0.1, "steps": 0}, "steps: expected"),
        ({"eps": 0.1, "step": -1.0}, "step: expected"),
        ({"eps": 0.1, "step": 2.0}, "step: expected a length in pixels of [0, 1], got 2.0; divide by 255"),
        ({"eps": 0.1, "clean_start": 1.5}, "clean_start: expected a share in [0, 1], got 1.5"),
        ({"eps": 0.1, "label_smoothing": 2}, "label_smoothing: expected a share in [0, 1], got 2"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_impossible_settings_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(InputError) as error:
        Sat(**settings)  # type: ignore[arg-type]
    assert message in str(error.value)


def test_an_l2_radius_may_be_above_one() -> None:
    assert Sat(2.0, norm="l2").eps == 2.0


def test_labels_and_models_that_do_not_fit_are_refused() -> None:
    with pytest.raises(InputError, match="label"):
        Sat(0.1)(network(), Batch(images(), labels() + 5), draws())
    stuck = nn.Sequential(nn.Flatten(), _Detached())
    with pytest.raises(ModelError, match="no gradient flows"):
        Sat(0.1)(stuck, Batch(images(), labels()), draws())


class _Detached(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.detach()[:, :3] * self.scale


def test_the_draws_of_the_start_are_those_it_is_given() -> None:
    method, model, x = Sat(0.2, clean_start=0.0), Recorded(scale=0.0), torch.full((6, 1, 4, 4), 0.5)
    method(model, Batch(x, labels()), draws())
    normal = draws().noise(GaussianNoise(1.0), x, 1)[:, 0]
    expected = x + 0.2 * (2 * torch.special.ndtr(normal) - 1)
    torch.testing.assert_close(model.seen[0], expected)
