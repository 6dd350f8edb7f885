"""Converted models in attacks, compiled, and in several processes."""

import pytest
import torch
from torch import distributed, nn

from rs_plugins.core.activation_replacement.converting import smooth_activations
from rs_plugins.core.attacks.smoothadv import smooth_adv_pgd
from rs_plugins.core.certification import certify
from rs_plugins.core.plans.fixed_budget import FixedBudget
from rs_plugins.core.smooth_backward import ReLUWithSmoothBackward, gradient_for

MECHANISMS = ["fx", "mode"]
torchs_own_warnings = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # while it compiles


def gradients_of(model, x):
    return torch.autograd.grad(model(x).square().sum(), list(model.parameters()))


@pytest.mark.slow
@torchs_own_warnings
@pytest.mark.parametrize("network", ["Functions", "Statements"])
@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_compiled(networks, vectors, network, mechanism):
    model = smooth_activations(networks[network](), "smooth-relu", vectors, mechanism=mechanism).model
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=mechanism == "fx")
    torch.testing.assert_close(compiled(vectors), model(vectors))
    for got, expected in zip(gradients_of(compiled, vectors), gradients_of(model, vectors), strict=True):
        torch.testing.assert_close(got, expected)
    if mechanism == "mode":
        torch._dynamo.reset()
        with pytest.raises(torch._dynamo.exc.Unsupported):
            torch.compile(model, backend="eager", fullgraph=True)(vectors)


@pytest.mark.slow
@torchs_own_warnings
def test_compiled_modules_and_the_smooth_gradient(vectors):
    guest = nn.Sequential(nn.Linear(4, 5), nn.ReLU(inplace=True), nn.Linear(5, 3))
    torch._dynamo.reset()
    silu = smooth_activations(guest, "silu", vectors, mechanism="modules").model
    torch.testing.assert_close(torch.compile(silu, backend="aot_eager", fullgraph=True)(vectors), silu(vectors))
    model = smooth_activations(guest, lambda: ReLUWithSmoothBackward("attack_grad"), vectors).model
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    found = []
    for purpose in ("attack", "update"):
        with gradient_for(model, purpose):
            found.append(gradients_of(compiled, vectors))
            for got, expected in zip(found[-1], gradients_of(model, vectors), strict=True):
                torch.testing.assert_close(got, expected)
    assert not torch.allclose(found[0][0], found[1][0])


@pytest.fixture
def group(tmp_path):
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("mechanism", ["modules", *MECHANISMS])
def test_distributed_data_parallel(networks, vectors, pictures, mechanism):
    name, images = ("ResidualNetwork", pictures) if mechanism == "modules" else ("Functions", vectors)
    model = smooth_activations(networks[name](), "smooth-relu", images, mechanism=mechanism).model.eval()
    parallel = nn.parallel.DistributedDataParallel(model)
    expected = gradients_of(model, images)
    parallel(images).square().sum().backward()
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_an_attack_on_the_smoothed_classifier(networks, vectors, mechanism):
    guest = networks["Functions"]()
    x, y = vectors[:3].sigmoid(), torch.tensor([0, 1, 2])
    settings = {"eps": 0.5, "steps": 3, "samples": 4}
    model = smooth_activations(guest, "silu", x, mechanism=mechanism).model.eval()
    written = smooth_adv_pgd(lambda z: guest.written_out(z, nn.functional.silu), x, y, 0.25, **settings)
    torch.testing.assert_close(smooth_adv_pgd(model, x, y, 0.25, **settings), written, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(smooth_adv_pgd(guest, x, y, 0.25, **settings), written, atol=1e-3)


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_certificates_know_the_activation(networks, vectors, mechanism):
    x = vectors[:2].sigmoid()
    digests = set()
    for activation in ("silu", "gelu"):
        model = smooth_activations(networks["Functions"](), activation, x, mechanism=mechanism).model
        digests.add(certify(model, x, 0.25, plan=FixedBudget(n0=10, n=40)).made_with.model)
    assert len(digests) == 2
