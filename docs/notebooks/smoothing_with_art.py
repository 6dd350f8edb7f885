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
# # Randomized smoothing with ART
#
# Train a classifier with ART, attack it, smooth it, certify it. The images are handwritten digits
# of 8 × 8 pixels, which come with scikit-learn. Everything runs on a CPU in a minute.

# %%
import numpy as np
import torch
from art.attacks.evasion import FastGradientMethod, ProjectedGradientDescent
from art.estimators.classification import PyTorchClassifier
from art.utils import compute_accuracy
from sklearn.datasets import load_digits
from torch import nn

import rs_plugins

rs_plugins.activate()  # not needed under `rs-plugins run` or `PYTHONPATH=$(rs-plugins site-dir)`

# %% [markdown]
# ## Step 1: Load the data

# %%
images, labels = load_digits(return_X_y=True)
x = (images / 16).astype(np.float32).reshape(-1, 1, 8, 8)
x_train, y_train = x[:1500], np.eye(10, dtype=np.float32)[labels[:1500]]
x_test, y_test = x[1500:1550], np.eye(10, dtype=np.float32)[labels[1500:1550]]
min_pixel_value, max_pixel_value = 0.0, 1.0

# %% [markdown]
# ## Step 2: Create the model


# %%
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 16, 3, padding=1)
        self.fc_1 = nn.Linear(16 * 4 * 4, 64)
        self.fc_2 = nn.Linear(64, 10)

    def forward(self, x):
        x = torch.max_pool2d(torch.relu(self.conv(x)), 2)
        return self.fc_2(torch.relu(self.fc_1(torch.flatten(x, 1))))


torch.manual_seed(0)
np.random.seed(0)
model = Net()
criterion = nn.CrossEntropyLoss()
optimizer = torch.optim.Adam(model.parameters(), lr=0.005)

# %% [markdown]
# ## Step 3: Create and train the ART classifier

# %%
classifier = PyTorchClassifier(
    model=model,
    clip_values=(min_pixel_value, max_pixel_value),
    loss=criterion,
    optimizer=optimizer,
    input_shape=(1, 8, 8),
    nb_classes=10,
    device_type="cpu",
)
classifier.fit(x_train, y_train, batch_size=64, nb_epochs=5)


def accuracy(estimator, x, y):
    return compute_accuracy(estimator.predict(x), y)[0]


print(f"Accuracy on benign test examples: {accuracy(classifier, x_test, y_test):.0%}")

# %% [markdown]
# ## Step 4: Attack it

# %%
for attack in (
    FastGradientMethod(estimator=classifier, norm=2, eps=0.8),
    ProjectedGradientDescent(estimator=classifier, norm=2, eps=0.8, eps_step=0.2, max_iter=10, verbose=False),
):
    x_adv = attack.generate(x=x_test, y=y_test)
    print(f"{type(attack).__name__}: {accuracy(classifier, x_adv, y_test):.0%}")

# %% [markdown]
# ## Step 5: Smooth it
#
# `SmoothedClassifier` is an ART classifier as well: `fit` trains with noise, `predict` is the mean
# over noise. It is now a name of ART's. ART's attacks run on it, and see the noise.

# %%
from art.estimators.classification import SmoothedClassifier

smoothed_model = Net()
smoothed = SmoothedClassifier(
    smoothed_model,
    sigma=0.25,
    clip_values=(min_pixel_value, max_pixel_value),
    loss=criterion,
    optimizer=torch.optim.Adam(smoothed_model.parameters(), lr=0.005),
    input_shape=(1, 8, 8),
    nb_classes=10,
)
smoothed.fit(x_train, y_train, batch_size=64, nb_epochs=10)
print(f"Accuracy on benign test examples: {accuracy(smoothed, x_test, y_test):.0%}")
attack = ProjectedGradientDescent(estimator=smoothed, norm=2, eps=0.8, eps_step=0.2, max_iter=10, verbose=False)
x_adv = attack.generate(x=x_test, y=y_test)
print(f"PGD that sees the noise: {accuracy(smoothed, x_adv, y_test):.0%}")

# %%
from art.attacks.evasion import SmoothAdvPGD

x_adv = SmoothAdvPGD(smoothed, eps=0.8, max_iter=10).generate(x=x_test, y=y_test)
print(rs_plugins.evaluate_attack(smoothed, x_test, x_adv, y_test.argmax(1), n=500))

# %% [markdown]
# ## Step 6: Certify it
#
# A radius for each image: no change that is shorter, in l2, alters the prediction of the smoothed
# classifier; wrong with probability at most 0.001 for each image. -1 abstains.

# %%
prediction, radius = smoothed.certify(x_test, n=1000)
right = prediction == y_test.argmax(1)
for r in (0, 0.25, 0.5):
    print(f"right, and certified at {r}: {(right & (radius >= r)).mean():.0%}")

# %% [markdown]
# The same votes for the network that was trained without noise:

# %%
bare = SmoothedClassifier(model, sigma=0.25, input_shape=(1, 8, 8), nb_classes=10)
bare_prediction, bare_radius = bare.certify(x_test, n=1000)
bare_right = bare_prediction == y_test.argmax(1)
for r in (0, 0.25, 0.5):
    print(f"right, and certified at {r}: {(bare_right & (bare_radius >= r)).mean():.0%}")
