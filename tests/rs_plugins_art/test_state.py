"""After every call, also one that fails, the model and the global generators are as they were."""

from pathlib import Path

import numpy as np
import pytest
import torch

from rs_plugins.errors import ResultsError
from rs_plugins_art.attacks import SmoothAdvPGD
from rs_plugins_art.classifier import SmoothedClassifier

from .conftest import cnn

CALLS = {
    "predict": lambda c, x, y: c.predict(x),
    "hard votes": lambda c, x, y: c.predict(x, is_abstain=True),
    "certify": lambda c, x, y: c.certify(x, 20, n0=5),
    "half-read certificates": lambda c, x, y: next(c.certificates(x, 20, n0=5)),
    "votes": lambda c, x, y: c.votes(x, 20),
    "loss_gradient": lambda c, x, y: c.loss_gradient(x, y),
    "loss_gradient of a tensor": lambda c, x, y: c.loss_gradient(torch.tensor(x), torch.tensor(y)),
    "loss_gradient, soft": lambda c, x, y: c.loss_gradient(x, np.full((5, 4), 0.25)),
    "class_gradient": lambda c, x, y: c.class_gradient(x),
    "compute_loss": lambda c, x, y: c.compute_loss(x, y),
    "compute_loss of a tensor": lambda c, x, y: c.compute_loss(torch.tensor(x), y),
    "compute_losses": lambda c, x, y: c.compute_losses(x, y),
    "get_activations": lambda c, x, y: c.get_activations(x, 0),
    "get_activations of a tensor": lambda c, x, y: c.get_activations(torch.tensor(x), 0, framework=True),
    "custom_loss_gradient": lambda c, x, y: c.custom_loss_gradient(torch.norm, x, x[::-1].copy(), "network.0"),
    "framework": lambda c, x, y: c._predict_framework(torch.tensor(x)),
    "fit": lambda c, x, y: c.fit(x, y, nb_epochs=1, batch_size=5),
    "fit in eval mode": lambda c, x, y: c.fit(x, y, nb_epochs=1, batch_size=5, training_mode=False),
    "SmoothAdvPGD": lambda c, x, y: SmoothAdvPGD(c, max_iter=2).generate(x, y),
    "SmoothAdvPGD without labels": lambda c, x, y: SmoothAdvPGD(c, max_iter=2).generate(x),
}


class Faulty(torch.nn.Module):
    """A network that fails on batches of noisy images, once it is told to."""

    def __init__(self):
        super().__init__()
        self.network = cnn()
        self.network[3] = torch.nn.Identity()  # dropout draws from the global generator in train mode
        self.network.requires_grad_(True)
        self.network[5].bias.requires_grad_(False)
        self.fails = False

    def forward(self, x):
        if self.fails:
            raise MemoryError("as if out of memory")
        return self.network(x)


def mixed():
    """A classifier whose submodules are in different modes, with gradients on some parameters."""
    model = Faulty()
    classifier = SmoothedClassifier(
        model, 0.25, samples=12, input_shape=(2, 6, 6), optimizer=torch.optim.SGD(model.parameters(), lr=0.1)
    )
    classifier.model.train()
    model.network[1].eval()
    for parameter in list(model.parameters())[:3]:
        parameter.grad = torch.ones_like(parameter)
    return classifier


def state(classifier):
    return (
        [module.training for module in classifier.model.modules()],
        [
            (p.requires_grad, p.device, None if p.grad is None else p.grad.tolist())
            for p in classifier.model.parameters()
        ],
        torch.get_rng_state().tolist(),
        [str(part) for part in np.random.get_state()],  # noqa: NPY002  the generator that must not be touched
        torch.is_grad_enabled(),
        sum(len(module._forward_hooks) for module in classifier.model.modules()),
    )


@pytest.mark.parametrize("name", CALLS)
def test_state_after_a_call(name, x, y):
    classifier = mixed()
    before, images = state(classifier), x.copy()
    CALLS[name](classifier, x, y)
    assert state(classifier) == before
    assert np.array_equal(x, images)


@pytest.mark.parametrize("name", CALLS)
def test_state_after_an_exception(name, x, y):
    classifier = mixed()
    before = state(classifier)
    classifier.base_model.fails = True
    with pytest.raises(MemoryError):
        CALLS[name](classifier, x, y)
    assert state(classifier) == before


@pytest.mark.parametrize("name", [name for name in CALLS if "fit" not in name])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_every_call_works_inside_no_grad_and_inference_mode(name, mode, x, y):
    classifier = mixed()
    with mode():
        CALLS[name](classifier, x, y)


@pytest.mark.parametrize("name", [name for name in CALLS if "fit" not in name])
def test_parameters_and_buffers_are_as_before(name, x, y):
    classifier = mixed()
    before = {key: value.clone() for key, value in classifier.model.state_dict().items()}
    CALLS[name](classifier, x, y)
    assert all(torch.equal(before[key], value) for key, value in classifier.model.state_dict().items())


def flat(result):
    """Return the numbers of any of the results, in one list."""
    if isinstance(result, dict):
        result = tuple(result.values())
    if isinstance(result, tuple):
        return [number for part in result if part is not None for number in flat(part)]
    if hasattr(result, "radius"):
        return [result.prediction, result.radius, result.count]
    return np.asarray(result.detach() if isinstance(result, torch.Tensor) else result).reshape(-1).tolist()


@pytest.mark.parametrize("name", [name for name in CALLS if "fit" not in name])
def test_a_model_left_in_train_mode_gives_the_results_of_eval_mode(name, x, y):
    one, other = mixed(), mixed()
    one.model.eval()
    other.model.train()  # batch normalisation included
    assert flat(CALLS[name](other, x, y)) == flat(CALLS[name](one, x, y))


def test_a_failing_save_leaves_the_saved_classifier_as_it_was(tmp_path, monkeypatch):
    from rs_plugins_art import files

    first = SmoothedClassifier(cnn(20), 0.1)
    first.save("it", path=str(tmp_path))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def torn(_model, path, **_):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "save_model", torn)
    with pytest.raises(ResultsError, match=r"it\.safetensors: cannot be written \(No space left on device\)"):
        SmoothedClassifier(cnn(5), 0.1).save("it", path=str(tmp_path))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
