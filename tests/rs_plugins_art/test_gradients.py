"""Gradients and losses are the smoothed classifier's, under the right draws, for labels and images of every form."""

import numpy as np
import pytest
import torch
from art.metrics import loss_gradient_check

from rs_plugins.errors import InputError, ModelError
from rs_plugins_art.classifier import SmoothedClassifier

from .conftest import CLASSES, SHAPE, Recorder, cnn, mlp, seeded
from .test_arrays import ROWS


def log_p(model, x, draws):
    """The log of the mean softmax in double precision, differentiable, one draw after another."""
    model = model.double()
    softmax = [model(x.double() + draw.double()).softmax(dim=1) for draw in draws]
    return torch.stack(softmax).mean(dim=0).log()


def setting(output="log_probs", noise="fixed", **more):
    classifier = SmoothedClassifier(cnn(3), 0.25, samples=6, output=output, noise=noise, **more)
    return classifier, lambda x: classifier.model.fixed_draws(torch.tensor(x))


SOFT = seeded(lambda: torch.rand(5, CLASSES).softmax(dim=1), 7).numpy()


def forms(y):
    hot = np.eye(CLASSES)[y]
    return {
        "int": y,
        "column": y[:, None],
        "one-hot": hot,
        "one-hot float32": hot.astype(np.float32),
        "tensor": torch.tensor(y),
        "one-hot tensor": torch.tensor(hot),
        "list": y.tolist(),
        "read-only": np.frombuffer(y.tobytes(), y.dtype),
    }


@pytest.mark.parametrize("chunk", [None, 1, 4])
def test_loss_gradient_equals_an_independent_formula(chunk, x, y):
    classifier, draws = setting(chunk=chunk)
    leaf = torch.tensor(x).double().requires_grad_()
    loss = -log_p(cnn(3), leaf, draws(x))[torch.arange(5), torch.tensor(y)].mean()
    (expected,) = torch.autograd.grad(loss, leaf)
    gradient = classifier.loss_gradient(x, y)
    assert gradient.dtype == np.float32
    np.testing.assert_allclose(gradient, expected, atol=1e-7, rtol=1e-4)


def test_loss_gradient_for_soft_labels_equals_an_independent_formula(x):
    classifier, draws = setting()
    leaf = torch.tensor(x).double().requires_grad_()
    loss = -(torch.tensor(SOFT) * log_p(cnn(3), leaf, draws(x))).sum(dim=1).mean()
    (expected,) = torch.autograd.grad(loss, leaf)
    np.testing.assert_allclose(classifier.loss_gradient(x, SOFT), expected, atol=1e-7, rtol=1e-4)


@pytest.mark.parametrize("form", forms(np.zeros(5, int)))
def test_labels_of_every_form_give_the_same(form, x, y):
    classifier, _ = setting()
    labels = forms(y)[form]
    assert np.array_equal(classifier.loss_gradient(x, labels), classifier.loss_gradient(x, y))
    assert np.array_equal(classifier.compute_loss(x, labels), classifier.compute_loss(x, y))


FORMS = {
    "float64": lambda x: x.astype(np.float64),
    "read-only": lambda x: np.frombuffer(x.tobytes(), x.dtype).reshape(x.shape),
    "tensor": torch.tensor,
    "float64 tensor": lambda x: torch.tensor(x).double(),
    "tensor with gradient": lambda x: torch.tensor(x).requires_grad_(),
}


@pytest.mark.parametrize("form", FORMS)
def test_images_of_every_form_give_the_same_in_their_own_form(form, x, y):
    classifier, _ = setting()
    given = FORMS[form](x)
    gradient, loss = classifier.loss_gradient(given, y), classifier.compute_loss(given, y)
    if isinstance(given, torch.Tensor):
        assert isinstance(loss, torch.Tensor)
        assert (gradient.dtype, gradient.requires_grad) == (given.dtype, False)
        gradient, loss = gradient.numpy(), loss.detach().numpy()
    else:
        assert gradient.dtype == np.float32
    np.testing.assert_allclose(gradient, classifier.loss_gradient(x, y), rtol=1e-6)
    np.testing.assert_allclose(loss, classifier.compute_loss(x, y), rtol=1e-6)


@pytest.mark.parametrize("output", ["log_probs", "probs"])
def test_class_gradient_equals_an_independent_formula(output, x):
    classifier, draws = setting(output)
    leaf = torch.tensor(x).double().requires_grad_()
    rows = log_p(cnn(3), leaf, draws(x))
    rows = rows.exp() if output == "probs" else rows
    expected = np.stack(
        [torch.autograd.grad(rows[:, k].sum(), leaf, retain_graph=True)[0].numpy() for k in range(CLASSES)], axis=1
    )
    gradients = classifier.class_gradient(x)
    assert (gradients.shape, gradients.dtype) == ((5, CLASSES, *SHAPE), np.float32)
    np.testing.assert_allclose(gradients, expected, atol=1e-6, rtol=1e-4)
    for label in (2, np.int64(2), np.array(2)):
        np.testing.assert_array_equal(classifier.class_gradient(x, label), gradients[:, 2:3])
    for labels in ([0, 1, 2, 3, 0], np.array([0, 1, 2, 3, 0]), torch.tensor([0, 1, 2, 3, 0])):
        chosen = gradients[np.arange(5), [0, 1, 2, 3, 0]][:, None]
        np.testing.assert_array_equal(classifier.class_gradient(x, label=labels), chosen)


@pytest.mark.parametrize("label", [4, -1, [0, 1, 2, 3, 4], [0, 1], [[0, 1, 2, 3, 0]]], ids=repr)
def test_class_gradient_refuses_labels_out_of_range(label, x):
    with pytest.raises(InputError, match="label: expected"):
        setting()[0].class_gradient(x, label)


def test_compute_loss_is_what_predict_says(x, y):
    classifier, draws = setting(noise="fresh")
    with torch.no_grad():
        rows = log_p(cnn(3), torch.tensor(x), draws(x))
    expected = -rows[torch.arange(5), torch.tensor(y)].numpy()
    loss = classifier.compute_loss(x, y)
    assert loss.shape == (5,)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    np.testing.assert_allclose(classifier.compute_loss(x, y, reduction="mean"), expected.mean(), rtol=1e-5)
    np.testing.assert_allclose(classifier.compute_loss(x, y, "sum"), expected.sum(), rtol=1e-5)
    np.testing.assert_allclose(classifier.compute_loss(x, SOFT), -(SOFT * rows.numpy()).sum(axis=1), rtol=1e-5)
    np.testing.assert_array_equal(classifier.compute_losses(x, y)["total"], loss)
    with pytest.raises(InputError, match="reduction: expected 'none', 'mean' or 'sum', got 'max'"):
        classifier.compute_loss(x, y, "max")


def test_compute_loss_of_a_tensor_can_be_differentiated(x, y):
    classifier, _ = setting()
    leaf = torch.tensor(x).requires_grad_()
    (slope,) = torch.autograd.grad(classifier.compute_loss(leaf, y, "mean"), leaf)
    np.testing.assert_allclose(slope, classifier.loss_gradient(x, y), atol=1e-7, rtol=1e-4)
    assert not classifier.compute_loss(leaf.detach(), y).requires_grad
    rows, labels = classifier._predict_framework(leaf, torch.tensor(y))  # for ART's patch attacks
    assert rows.requires_grad
    assert torch.equal(labels, torch.tensor(y))


def test_gradients_see_new_noise_at_each_call_only_where_asked_to(x, y):
    fixed, fresh = setting()[0], setting(noise="fresh")[0]
    assert np.array_equal(fixed.loss_gradient(x, y), fixed.loss_gradient(x, y))
    assert not np.array_equal(fresh.loss_gradient(x, y), fresh.loss_gradient(x, y))
    assert not np.array_equal(fresh.class_gradient(x), fresh.class_gradient(x))
    assert np.array_equal(fresh.compute_loss(x, y), fixed.compute_loss(x, y))


def test_gradients_differ_from_the_base_models(x, y):
    classifier, _ = setting()
    leaf = torch.tensor(x).requires_grad_()
    (base,) = torch.autograd.grad(torch.nn.functional.cross_entropy(cnn(3)(leaf), torch.tensor(y)), leaf)
    assert np.abs(classifier.loss_gradient(x, y) - base.numpy()).max() > 0.01 * float(base.abs().max())


def test_one_loss_gradient_costs_one_pass_over_the_noisy_images(x, y):
    model = Recorder(cnn())
    classifier = SmoothedClassifier(model, 0.25, samples=6, chunk=4, input_shape=SHAPE)
    model.batches = []
    classifier.loss_gradient(x, y)
    assert model.inputs == 5 * 6
    assert max(map(len, model.batches)) == 4


def test_vectors_as_images():
    x = np.random.default_rng(0).random((3, 7), dtype=np.float32)
    classifier = SmoothedClassifier(mlp(), 0.25)
    assert classifier.loss_gradient(x, [0, 1, 2]).shape == (3, 7)
    assert classifier.loss_gradient(x, SOFT[:3]).shape == (3, 7)
    assert classifier.class_gradient(x).shape == (3, CLASSES, 7)
    assert classifier.compute_loss(x, np.eye(CLASSES)[[0, 1, 2]]).shape == (3,)


def test_keywords_that_hosts_pass_and_those_that_nobody_should(x, y):
    classifier, _ = setting()
    assert np.array_equal(classifier.loss_gradient(x=x, y=y, sampling=False), classifier.loss_gradient(x, y))
    assert not loss_gradient_check(classifier, x, y, training_mode=False).any()
    for call in (classifier.loss_gradient, classifier.compute_loss, classifier.class_gradient):
        with pytest.raises(TypeError, match="unexpected keyword argument 'smapling'"):
            call(x, 1, smapling=True)
    for call in (classifier.loss_gradient, classifier.class_gradient):
        with pytest.raises(InputError, match="training_mode: expected False"):
            call(x, y, training_mode=True)


def test_a_model_without_gradient_is_named_as_such(x, y):
    class Votes(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.network = cnn()

        def forward(self, x):
            return torch.nn.functional.one_hot(self.network(x).argmax(dim=1), CLASSES).float()

    with pytest.raises(ModelError, match="gradient"):
        SmoothedClassifier(Votes(), 0.25).loss_gradient(x, y)


def test_activations_are_the_base_models(x):
    model = cnn()
    classifier = SmoothedClassifier(model, 0.25)
    assert classifier.layer_names == [str(i) for i in range(6)]
    with torch.no_grad():
        expected = model[1](model[0](torch.tensor(x)))
    np.testing.assert_allclose(classifier.get_activations(x, 1), expected, atol=1e-6)
    np.testing.assert_allclose(classifier.get_activations(x, "1", batch_size=2), expected, atol=1e-6)
    leaf = torch.tensor(x).requires_grad_()
    assert classifier.get_activations(leaf, 1, framework=True).requires_grad
    for layer in (6, -1, "base", None):
        with pytest.raises(InputError, match=r"layer: expected a layer of the base model, one of .* got"):
            classifier.get_activations(x, layer)


def test_the_one_hot_rows_of_another_number_of_classes_are_refused(x):
    with pytest.raises(InputError, match=r"y: expected labels of shape \(5,\), \(5, 1\) or \(5, 4\), got"):
        setting()[0].loss_gradient(x, ROWS)


@pytest.mark.parametrize(("layer", "depth"), [("0", 1), (4, 5)])
def test_custom_loss_gradient_is_that_of_the_base_models_activations(layer, depth, x):
    aims = x[::-1].copy()

    def distance(difference, p):
        return (difference.abs() ** p).sum()

    leaf, part = torch.tensor(x, requires_grad=True), cnn()[:depth]
    distance(part(leaf) - part(torch.tensor(aims)), 2).backward()
    classifier = SmoothedClassifier(cnn(), 0.25)
    gradient = classifier.custom_loss_gradient(distance, x, aims, layer)
    np.testing.assert_allclose(gradient, leaf.grad.numpy(), atol=1e-5)
    assert gradient.dtype == np.float32
    of_tensors = classifier.custom_loss_gradient(distance, torch.tensor(x), torch.tensor(aims), layer)
    np.testing.assert_allclose(of_tensors.numpy(), gradient, atol=1e-6)
    with pytest.raises(InputError, match="training_mode: expected False"):
        classifier.custom_loss_gradient(distance, x, aims, layer, training_mode=True)
    with pytest.raises(InputError, match="layer: expected a layer of the base model"):
        classifier.custom_loss_gradient(distance, x, aims, "9")
