# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Attacks on smoothed classifiers with torchattacks
#
# Attack a network, smooth it, attack it again with the noise in sight, and look whether
# certificates hold. The images are handwritten digits of 8 × 8 pixels, which come with scikit-
# learn. Everything runs on a CPU in a minute.

# %%
import torch
import torchattacks
from sklearn.datasets import load_digits
from torch import nn

import rs_plugins
from rs_plugins import FixedBudget, SmoothedModel, certify, evaluate_attack

rs_plugins.activate()  # not needed under `rs-plugins run` or `PYTHONPATH=$(rs-plugins site-dir)`
print([name for name in torchattacks.__all__ if name.startswith("SmoothAdv")])

# %% [markdown]
# ## Load data and model

# %%
data, target = load_digits(return_X_y=True)
x, y = torch.tensor(data / 16, dtype=torch.float32).reshape(-1, 1, 8, 8), torch.tensor(target)
images, labels = x[1500:1540], y[1500:1540]
print("[Data loaded]", "min", images.min().item(), "max", images.max().item())


def network(sigma):
    """Train a network on digits with noise."""
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(1, 16, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten()),
        *(nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, 10)),
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=0.003)
    for _ in range(15):
        for rows in torch.randperm(1500).split(64):
            noisy = x[rows] + sigma * torch.randn_like(x[rows])
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(noisy), y[rows]).backward()
            optimizer.step()
    return model.eval()


def clean_accuracy(model, images, labels):
    return (model(images).argmax(1) == labels).float().mean().item()


model = network(sigma=0.25)
print(f"[Model loaded] Acc: {clean_accuracy(model, images, labels):.0%}")

# %% [markdown]
# ## Adversarial attack on the network

# %%
for name, options in (("FGSM", {"eps": 0.1}), ("PGDL2", {"eps": 0.8, "alpha": 0.2, "steps": 10})):
    attack = getattr(torchattacks, name)(model, **options)
    adv_images = attack(images, labels)
    print(f"{name}: {clean_accuracy(model, adv_images, labels):.0%}")

# %% [markdown]
# ## On the smoothed classifier
#
# `SmoothedModel` is a module from pixels to log-probabilities: the mean over fixed noise draws. Any
# attack of torchattacks takes it. `SmoothAdvPGD` takes the network itself and draws new noise at
# each step.

# %%
smoothed = SmoothedModel(model, sigma=0.25)
found = {
    "PGDL2": torchattacks.PGDL2(smoothed, eps=0.8, alpha=0.2, steps=10)(images, labels),
    "SmoothAdvPGD": torchattacks.SmoothAdvPGD(model, eps=0.8, steps=10, sigma=0.25)(images, labels),
}

# %% [markdown]
# Both are judged by noise draws that neither has seen.

# %%
for name, adv_images in found.items():
    print(name, evaluate_attack(smoothed, images, adv_images, labels, n=500).robust_accuracy)

# %% [markdown]
# ## The nearest adversarial image, and certificates
#
# `SmoothAdvDDN` looks for the smallest change. No smaller change than the certified radius can turn
# the prediction, so what it finds has to be further away (but for one image in a thousand, or
# fewer).

# %%
nearest = torchattacks.SmoothAdvDDN(model, sigma=0.25, steps=20, confirm=0.001)
adv_images = nearest(images, labels)
distance = (adv_images - images).flatten(1).norm(dim=1)
certificates = list(certify(model, images, sigma=0.25, plan=FixedBudget(n=1000)))
found = zip(certificates, labels, strict=True)
radius = torch.tensor([c.radius if c.prediction == label else 0.0 for c, label in found])
print(f"turned: {nearest.success.float().mean():.0%}")
print(f"mean distance {distance[nearest.success].mean():.2f}, mean certified radius {radius.mean():.2f}")
print("closer than certified:", int((distance < radius)[nearest.success].sum()))
