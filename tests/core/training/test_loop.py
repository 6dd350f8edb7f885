import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

from rs_plugins.core.training import fabric
from rs_plugins.core.training.batches import Batches, tensors
from rs_plugins.core.training.fabric import fabric_of
from rs_plugins.core.training.gaussian import gaussian, plain
from rs_plugins.core.training.loop import minimise, train
from rs_plugins.errors import DivergedError, InputError

X = torch.rand(10, 4, generator=torch.Generator().manual_seed(0))
Y = (X[:, 0] > 0.5).long()


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Linear(4, 2)


def run(objective=plain, **options):
    model = network()
    settings = {"epochs": 3, "batch_size": 4} | options
    losses = train(model, X, Y, objective, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), **settings)
    return model, losses


def test_training_learns_digits():
    digits = load_digits()
    x = torch.tensor(digits.images / 16, dtype=torch.float32).flatten(1)
    y = torch.tensor(digits.target)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = train(model, x[:1000], y[:1000], gaussian(0.2), optimizer=optimizer, epochs=8)
    assert losses[-1] < losses[0] / 2
    assert float((model(x[1000:]).argmax(1) == y[1000:]).float().mean()) > 0.8


def test_a_step_is_that_of_the_gradient():
    model = network()
    loss = nn.functional.cross_entropy(model(X), Y)
    expected = model.weight - 0.1 * torch.autograd.grad(loss, model.weight)[0]
    trained, losses = run(epochs=1, batch_size=10)
    torch.testing.assert_close(trained.weight, expected)
    assert losses == [pytest.approx(loss.item())]


def test_every_image_is_seen_unless_the_remainder_is_dropped():
    def seen(**options):
        images = []

        def objective(model, batch, draws):
            images.extend(batch.x[:, 0].tolist())
            return plain(model, batch, draws)

        run(objective, epochs=1, **options)
        return sorted(images)

    everything = sorted(X[:, 0].tolist())
    assert seen() == everything
    assert len(seen(drop_last=True)) == 8
    assert len(seen(drop_last=True, batch_size=5)) == 10


@pytest.mark.parametrize(
    ("options", "sizes"),
    [
        ({"parts": 1}, [4, 4, 2]),
        ({"parts": 3}, [2, 2, 2, 2, 2]),
        ({"parts": 3, "drop_last": True}, [2, 2, 2, 2]),
        ({"parts": 4, "batch_size": 10}, [3, 3, 2, 2]),
        ({"parts": 20, "batch_size": 10}, [2] * 5),
        ({"parts": 3, "batch_size": 9}, [4, 3, 3]),
    ],
    ids=repr,
)
def test_each_part_of_a_batch_is_a_step_and_holds_nearly_as_many_images(options, sizes):
    seen, epochs = [], []

    def objective(model, batch, draws):
        assert len(batch.x) == len(batch.y)
        seen.append(batch.x[:, 0])
        epochs.append(batch.epoch)
        return plain(model, batch, draws)

    steps = []
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.register_step_post_hook(lambda *_: steps.append(model.weight.clone()))
    train(model, X, Y, objective, optimizer=optimizer, **({"epochs": 2, "batch_size": 4} | options))
    assert [len(part) for part in seen] == sizes * 2
    assert epochs == [0] * len(sizes) + [1] * len(sizes)
    assert len(steps) == 2 * len(sizes)
    if "drop_last" not in options:
        assert sorted(torch.cat(seen[: len(sizes)]).tolist()) == sorted(X[:, 0].tolist())


def test_parts_are_batches_of_their_own():
    cut, _ = run(gaussian(0.5), batch_size=10, parts=2)
    small, _ = run(gaussian(0.5), batch_size=5)
    assert torch.equal(cut.weight, small.weight)


def test_the_mean_loss_weighs_parts_by_their_images():
    _, losses = run(lambda model, batch, draws: model(batch.x).sum() * 0 + len(batch.x), epochs=1, parts=2)
    assert losses == [pytest.approx((4 * 2 * 2 + 2 * 2) / 10)]


def test_noise_has_the_right_size_and_is_fresh_each_step():
    noisy = []
    model = nn.Linear(4, 2)
    model.register_forward_pre_hook(lambda module, inputs: noisy.append(inputs[0].clone()))
    x, y = torch.full((500, 4), 0.5), torch.zeros(500, dtype=torch.int64)
    train(model, x, y, gaussian(0.7), optimizer=torch.optim.SGD(model.parameters(), lr=0.0), epochs=3, batch_size=500)
    assert not torch.equal(noisy[0], noisy[1])
    assert float(torch.cat(noisy).std()) == pytest.approx(0.7, rel=0.05)
    assert float(torch.cat(noisy).min()) < 0


def test_the_seed_decides_and_the_global_generator_does_not():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = run(gaussian(0.5))[0].weight
    torch.manual_seed(2)
    assert torch.equal(first, run(gaussian(0.5))[0].weight)
    assert not torch.equal(first, run(gaussian(0.5), seed=1)[0].weight)
    assert not torch.equal(run(gaussian(0.5), seed=None)[0].weight, run(gaussian(0.5), seed=None)[0].weight)
    torch.manual_seed(1)
    assert torch.equal(before, torch.get_rng_state())


def test_the_scheduler_steps_after_each_epoch():
    class Counter:
        steps = 0

        def step(self):
            self.steps += 1

    counter = Counter()
    run(scheduler=counter)
    assert counter.steps == 3


def test_modes_are_restored():
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 2)).eval()
    model[0].train()
    train(model, X, Y, plain, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), epochs=1)
    assert [module.training for module in model.modules()] == [False, True, False]


def test_progress_is_shown_on_request(capsys):
    run(progress=True)
    assert "train: 100%" in capsys.readouterr().err
    run(progress="train a line")
    assert "train a line: 100%" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"epochs": -1}, InputError, "epochs: expected an integer >= 0, got -1"),
        ({"drop_last": True, "batch_size": 11}, InputError, "drop_last: nothing is left of 10 images in batches of 11"),
        ({"seed": "x"}, InputError, "seed: expected an integer or None, got 'x'"),
        ({"batch_size": 0}, InputError, "batch_size: expected an integer >= 1, got 0"),
        ({"parts": 0}, InputError, "parts: expected an integer >= 1, got 0"),
        (
            {"objective": lambda model, *_: model.weight.sum() * float("nan")},
            DivergedError,
            "loss: expected a finite value, got nan in epoch 0",
        ),
        (
            {"objective": lambda model, *_: model.weight.sum() * 0 + float("inf")},
            DivergedError,
            "loss: expected a finite value, got inf in epoch 0",
        ),
    ],
    ids=["epochs", "nothing left", "seed", "batch size", "parts", "nan", "inf"],
)
def test_bad_settings_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        run(**options)


@pytest.mark.parametrize(
    ("objective", "got"),
    [
        (lambda model, batch, draws: None, "None"),
        (lambda model, batch, draws: 1.0, "1.0"),
        (lambda model, batch, draws: model(batch.x).sum(1), r"one of shape \(4,\)"),
    ],
    ids=["nothing", "a float", "a vector"],
)
def test_an_objective_returns_a_scalar(objective, got):
    with pytest.raises(InputError, match=f"^objective: the objective must return a scalar tensor, got {got}$"):
        run(objective)


def test_missing_labels_are_refused():
    with pytest.raises(
        InputError, match="y: expected one label for each of at least one image, got 10 images, 9 labels"
    ):
        train(network(), X, Y[:9], plain, optimizer=None, epochs=1)


def test_images_and_models_that_make_no_sense_are_refused():
    with pytest.raises(InputError, match=r"x: expected pixels in \[0, 1\], got values from"):
        train(network(), X * 255, Y, plain, optimizer=None, epochs=1)
    with pytest.raises(InputError, match="model: it has no parameters or buffers"):
        train(nn.Flatten(), X, Y, plain, optimizer=None, epochs=1)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_more_images_are_weighed(seed):
    """With one image in each source a step's gradient is that of its image times the weight."""
    model = network()
    sources = [(X[:1], Y[:1], 1.0), (X[1:2], 1 - Y[1:2], 0.25)]
    order = [step.source for step in Batches([1, 1], 128, seed=seed).steps(0)]
    copy, total = network(), 0.0
    for source in order:
        x, y, weight = sources[source]
        loss = weight * nn.functional.cross_entropy(copy(x), y)
        gradients = torch.autograd.grad(loss, list(copy.parameters()))
        for parameter, gradient in zip(copy.parameters(), gradients, strict=True):
            parameter.data -= 0.1 * gradient
        total += loss.item()
    extra = tensors(*sources[1][:2], weight=0.25)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = train(model, X[:1], Y[:1], plain, optimizer=optimizer, epochs=1, extra=extra, seed=seed)
    torch.testing.assert_close(model.state_dict(), copy.state_dict())
    assert losses == [pytest.approx(total / 2)]


def test_images_are_changed_before_the_objective_sees_them():
    seen = []

    def objective(model, batch, draws):
        seen.append(batch.x)
        return plain(model, batch, draws)

    def augment(x, draws):
        return x * 0 + draws.uniform(x).unsqueeze(1)

    run(objective, augment=augment, epochs=2, batch_size=10)
    assert len({float(value) for x in seen for value in x[:, 0]}) == 20


def test_epochs_are_counted_from_the_first_one_that_is_named():
    seen = []

    def objective(model, batch, draws):
        seen.append(batch.epoch)
        return plain(model, batch, draws)

    run(objective, first_epoch=5, epochs=2, batch_size=10)
    assert seen == [5, 6]


def test_two_runs_are_one():
    whole, losses = run(gaussian(0.5), epochs=3)
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    first = train(model, X, Y, gaussian(0.5), optimizer=optimizer, epochs=1, batch_size=4)
    rest = train(model, X, Y, gaussian(0.5), optimizer=optimizer, epochs=2, first_epoch=1, batch_size=4)
    assert torch.equal(model.weight, whole.weight)
    assert [*first, *rest] == losses


def test_nothing_of_the_loop_stays_on_model_and_optimiser():
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    before = set(vars(optimizer)), set(vars(model)), type(optimizer), type(model)
    train(model, X, Y, plain, optimizer=optimizer, epochs=1)
    assert (set(vars(optimizer)), set(vars(model)), type(optimizer), type(model)) == before
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(X), Y).backward()
    kept = model.weight.detach().clone()
    optimizer.step()
    assert not torch.equal(kept, model.weight)


@pytest.mark.parametrize("at", [0, 1, 3])
def test_a_run_that_is_left_in_the_middle_leaves_the_modes(at):
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 2)).eval()
    source = tensors(X, Y)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    steps = minimise(
        *(fabric_of(model), model, plain, [source], Batches([10], 4), optimizer), epochs=range(2), workers=0
    )
    for _ in range(at):
        next(steps)
    steps.close()
    assert not any(module.training for module in model.modules())


def test_readers_of_their_own_change_nothing():
    def weights(workers):
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        source = tensors(X, Y)
        for _ in minimise(
            *(fabric_of(model), model, gaussian(0.5), [source], Batches([10], 4), optimizer),
            epochs=range(2),
            workers=workers,
        ):
            pass
        return model.weight

    assert torch.equal(weights(0), weights(2))


def test_a_scheduler_that_raises_leaves_the_modes():
    class Broken:
        def step(self):
            raise RuntimeError("no more")

    model = network().eval()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    try:
        train(model, X, Y, plain, optimizer=optimizer, epochs=2, scheduler=Broken())
    except RuntimeError:
        assert not model.training
    else:
        pytest.fail("it should have raised")


def test_layers_that_draw_do_so_from_a_known_state_and_leave_the_global_generator():
    def weights(seed):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 2))
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        train(model, X, Y, plain, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), epochs=3, batch_size=4)
        assert torch.equal(before, torch.get_rng_state())
        return model[0].weight

    assert torch.equal(weights(1), weights(2))


class BadGradient(nn.Module):
    """Its loss is finite, its gradient is not: that of the square root at 0."""

    def __init__(self):
        super().__init__()
        self.inner = network()

    def forward(self, x):
        return self.inner(x) * (1 + 0 * (0 * self.inner.bias).abs().sum().sqrt())


def test_weights_that_are_no_numbers_end_it_also_where_the_loss_is_one():
    model = BadGradient()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(DivergedError, match=r"model: expected finite weights, got NaN or infinity in inner\.bias"):
        train(model, X, Y, plain, optimizer=optimizer, epochs=1, batch_size=10)


def test_after_each_epoch_somebody_may_be_told():
    told = []
    _, losses = run(first_epoch=4, after_epoch=lambda *what: told.append(what))
    assert told == list(zip([4, 5, 6], losses, strict=True))


def test_images_are_brought_to_the_type_of_the_model():
    model = network().double()
    train(model, X, Y, gaussian(0.5), optimizer=torch.optim.SGD(model.parameters(), lr=0.1), epochs=1)
    assert model.weight.dtype == torch.float64
    other = network()
    soft = nn.functional.one_hot(Y, 2).double()
    train(other, X.double(), soft, gaussian(0.5), optimizer=torch.optim.SGD(other.parameters(), lr=0.1), epochs=1)
    assert other.weight.dtype == torch.float32


def test_without_gradients_around_it_trains_all_the_same():
    with torch.no_grad():
        model, _ = run()
    assert torch.equal(model.weight, run()[0].weight)


def test_a_model_with_nothing_to_train_is_refused():
    model = network().requires_grad_(False)
    with pytest.raises(
        InputError, match="model: expected a parameter that is to be trained, got none with requires_grad"
    ):
        train(model, X, Y, plain, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), epochs=1)


def test_variables_of_clusters_are_no_business_of_a_process_alone(monkeypatch):
    usual = run()[0].weight
    for name, value in {"SLURM_NTASKS": "4", "SLURM_JOB_NAME": "job", "SLURM_JOB_ID": "3"}.items():
        monkeypatch.setenv(name, value)
    fabric._alone.cache_clear()
    assert torch.equal(run()[0].weight, usual)
    fabric._alone.cache_clear()


def test_batch_normalisation_survives_a_last_image():
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))
    train(model, X, Y, plain, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), epochs=1, batch_size=3, parts=2)
