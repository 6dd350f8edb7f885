"""What an attack inside training leaves alone, how far it goes, and that every method learns."""

import copy

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

from rs_plugins.core.streams import stream
from rs_plugins.core.training.consistency import Consistency
from rs_plugins.core.training.inner_attacks import DDN, PGD, BallFirstPGD
from rs_plugins.core.training.loop import train
from rs_plugins.core.training.methods import make_objective
from rs_plugins.core.training.objective import Batch, StreamDraws
from rs_plugins.core.training.smoothadv import SmoothAdv
from rs_plugins.core.training.smoothmix import SmoothMix
from rs_plugins.errors import ModelError

# objective, how often it calls the model in eval mode, how often in train mode
ATTACKING = {
    "smoothadv, pgd": (SmoothAdv(0.5, attack=PGD(eps=0.5, steps=3)), 3, 1),
    "smoothadv, ddn": (SmoothAdv(0.5, attack=DDN(eps=0.5, steps=3)), 4, 1),
    "smoothadv, one noise": (SmoothAdv(0.5, attack=PGD(eps=0.5, steps=3), multi_noise=False), 3, 1),
    "consistency": (Consistency(0.5, attack=BallFirstPGD(eps=0.5, steps=3)), 3, 1),
    "smoothmix": (SmoothMix(0.5, steps=3), 3, 2),
    "smoothmix, one step": (SmoothMix(0.5, steps=3, mix_step=1), 3, 2),
}


class Stumbling(nn.Module):
    """Remembers in which mode it was called, and raises at the call of number ``at``."""

    def __init__(self, at=None):
        super().__init__()
        self.calls, self.at = [], at

    def forward(self, x):
        self.calls.append((self.training, torch.is_grad_enabled(), x.requires_grad))
        if len(self.calls) == self.at:
            raise MemoryError
        return x


def guest(at=None):
    torch.manual_seed(0)
    model = nn.Sequential(
        *(Stumbling(at), nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU()),
        *(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.1), nn.Linear(8, 3)),
    ).train()
    model[5].eval()  # frozen statistics, as in fine-tuning
    model[1].weight.requires_grad_(False)
    model[4].weight.grad = torch.full_like(model[4].weight, 0.25)
    return model


def state(model):
    return {
        "modes": [module.training for module in model.modules()],
        "asking": [parameter.requires_grad for parameter in model.parameters()],
        "gradients": [None if p.grad is None else p.grad.tolist() for p in model.parameters()],
        "tensors": {name: value.tolist() for name, value in model.state_dict().items()},
    }


@pytest.mark.parametrize("name", ATTACKING)
def test_only_passes_in_train_mode_move_the_statistics(name, images):
    objective, attacks, passes = ATTACKING[name]
    model = guest()
    before = state(model)
    loss = objective(model, Batch(*images, epoch=20), StreamDraws(stream(0, "test")))
    after = state(model)
    assert [training for training, _, _ in model[0].calls] == [False] * attacks + [True] * passes
    assert model[2].num_batches_tracked == passes
    for kind in ("modes", "asking", "gradients"):
        assert before[kind] == after[kind]
    changed = {key for key, value in before["tensors"].items() if value != after["tensors"][key]}
    assert changed == {"2.running_mean", "2.running_var", "2.num_batches_tracked"}
    assert not any(x for training, _, x in model[0].calls if training)  # no way back into the attack
    loss.backward()
    assert model[1].weight.grad is None
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("name", ATTACKING)
@pytest.mark.parametrize("at", [1, 2, 3])
def test_an_exception_in_the_attack_leaves_everything_as_it_was(name, at, images):
    model = guest(at)
    before = state(model)
    with pytest.raises(MemoryError):
        ATTACKING[name][0](model, Batch(*images), StreamDraws(stream(0, "test")))
    assert state(model) == before


@pytest.mark.parametrize("name", ATTACKING)
def test_images_are_not_changed_and_the_global_generator_is_not_used(name, images):
    x, y = images
    kept, before = x.clone(), torch.get_rng_state()
    model = nn.Linear(4, 3)
    before = torch.get_rng_state()
    ATTACKING[name][0](model, Batch(x, y), StreamDraws(stream(0, "test")))
    assert torch.equal(x, kept)
    assert torch.equal(before, torch.get_rng_state())


class Hard(nn.Linear):
    def forward(self, x):
        return super().forward((x > 0.5).to(x.dtype))


@pytest.mark.parametrize("name", ATTACKING)
def test_models_without_a_gradient_are_refused(name, images):
    with pytest.raises(ModelError, match="model: no gradient flows from its logits to its input"):
        ATTACKING[name][0](Hard(4, 3), Batch(*images), StreamDraws(stream(0, "test")))


# ---- how far images go -----------------------------------------------------------------------------------------------


class Remembering(StreamDraws):
    def noise(self, noise, x, samples):
        e = super().noise(noise, x, samples)
        object.__setattr__(self, "e", e)
        return e


def shifts(objective, images, epoch):
    """Return how far each image was moved before each pass in train mode, by the noise that it had there."""
    torch.manual_seed(0)
    model, seen = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).train(), []
    model.register_forward_hook(lambda model, inputs, _: seen.append(inputs[0]) if model.training else None)
    draws = Remembering(stream(0, "test"))
    objective(model, Batch(*images, epoch=epoch), draws)
    x = images[0]
    moved = [each.reshape(len(x), -1, 4) - draws.e[:, : len(each) // len(x)] - x.unsqueeze(1) for each in seen]
    for each in moved:
        torch.testing.assert_close(each, each[:, :1].expand_as(each), atol=1e-5, rtol=0)
    return [each[:, 0].norm(dim=1) for each in moved]


@pytest.mark.parametrize("multi_noise", [True, False])
@pytest.mark.parametrize("make", [PGD, BallFirstPGD, DDN], ids=lambda make: make.__name__)
def test_warm_up_is_seen_in_the_length_of_the_perturbation(make, multi_noise, images):
    """By PGD all images reach the sphere; DDN stops there at images that stay right."""
    objective = SmoothAdv(0.05, attack=make(eps=0.2, steps=4), warmup=4, multi_noise=multi_noise)
    for epoch, eps in ((0, 0.05), (1, 0.1), (3, 0.2), (9, 0.2)):
        (moved,) = shifts(objective, images, epoch)
        assert float(moved.max()) == pytest.approx(eps, abs=1e-5)
        if make is not DDN:
            assert float(moved.min()) == pytest.approx(eps, abs=1e-5)


def test_the_default_step_is_two_budgets_over_the_number_of_steps(images):
    """The ball ends further out here than one step leads."""
    (moved,) = shifts(SmoothAdv(0.05, attack=PGD(eps=0.2, steps=1, step=0.05), warmup=1), images, 0)
    torch.testing.assert_close(moved, torch.full_like(moved, 0.05), atol=1e-5, rtol=0)
    (moved,) = shifts(SmoothAdv(0.05, attack=BallFirstPGD(eps=0.2, steps=1, step=0.05), warmup=1), images, 0)
    torch.testing.assert_close(moved, torch.full_like(moved, 0.05), atol=1e-5, rtol=0)


def test_the_clean_side_of_smoothmix_warms_up_and_the_other_goes_all_the_way(images):
    objective = SmoothMix(0.05, step=0.1, steps=3, mix_step=1, warmup=4)
    for epoch, w in ((0, 0.25), (1, 0.5), (3, 1.0), (9, 1.0)):
        clean, mixed = shifts(objective, images, epoch)
        torch.testing.assert_close(clean, torch.full_like(clean, 0.1 * w), atol=1e-5, rtol=0)
        assert float(mixed.max()) > 0.1 * w
        assert float(mixed.max()) < 0.1 * w + 0.5 * 0.3


def test_ddn_does_not_stop_at_the_image_itself(images):
    """Where no perturbation is adversarial, it is the last one that is trained on."""
    (moved,) = shifts(SmoothAdv(0.05, attack=DDN(eps=0.02, steps=3), warmup=1), images, 0)
    assert int((moved > 0.01).sum()) >= 1


# ---- learning --------------------------------------------------------------------------------------------------------

LEARNING = {
    "gaussian": {"samples": 2},
    "stability": {},
    "stability-rs4a": {},
    "stability-confseq": {},
    "smoothadv": {"attack": PGD(eps=0.3, steps=2), "samples": 2, "warmup": 1},
    "smoothmix": {"step": 0.3, "steps": 2, "samples": 2, "warmup": 1},
    "consistency": {"lam": 2.0},
    "macer": {"lam": 1.0, "samples": 4},
}


@pytest.mark.parametrize("name", LEARNING)
def test_every_method_learns_digits(name):
    digits = load_digits()
    x = torch.tensor(digits.images / 16, dtype=torch.float32).flatten(1)
    y = torch.tensor(digits.target)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 10))
    untrained = copy.deepcopy(model)
    objective = make_objective(name, 0.25, **LEARNING[name])
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = train(model, x[:400], y[:400], objective, optimizer=optimizer, epochs=5, batch_size=64, parts=2)
    assert losses[-1] < 0.8 * losses[0]
    right = (model.eval()(x[400:]).argmax(1) == y[400:]).float().mean()
    before = (untrained.eval()(x[400:]).argmax(1) == y[400:]).float().mean()
    assert float(right) > 0.7 > float(before)
