"""A JSON scenario names an estimator; it is trained, attacked and certified around a classifier that is there."""

import importlib
import json

import numpy as np
import torch
from art.attacks.evasion import ProjectedGradientDescent
from art.data_generators import NumpyDataGenerator
from art.estimators.classification import PyTorchClassifier

import victim

SCENARIO = """{
  "module": "art.estimators.classification",
  "name": "CertifyingAdapterClassifier",
  "kwargs": {"sigma": 0.25, "input_shape": [1, 10, 10], "kind": "image", "size": "tiny", "lr": 0.01}
}"""

section = json.loads(SCENARIO)
model, images, labels = victim.load()
x, y = images.numpy(), labels.numpy()
x.setflags(write=False)
before = {name: value.clone() for name, value in model.state_dict().items()}
classifier = getattr(importlib.import_module(section["module"]), section["name"])(model, **section["kwargs"])
assert isinstance(classifier, PyTorchClassifier)
rows = classifier.predict(x)
classifier.fit(x, np.eye(10)[y], batch_size=3, nb_epochs=2)
classifier.fit_generator(NumpyDataGenerator(x, y, batch_size=3), nb_epochs=2)
assert not np.allclose(classifier.predict(x), rows)
assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
attack = ProjectedGradientDescent(classifier, norm=2, eps=0.5, eps_step=0.2, max_iter=3, verbose=False)
victim.check(attack.generate(x, y), images, 0.5)
predicted, radii = classifier.certify(x, n=200)
assert predicted.shape == radii.shape == (6,) and (radii >= 0).all() and (radii < 1).all(), radii
print("certified", (predicted == y).mean(), "mean radius", radii.mean())
