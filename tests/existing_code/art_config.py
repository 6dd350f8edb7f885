"""A JSON scenario names a module and a class, and keywords for it."""

import importlib
import json

import victim

SCENARIO = """{
  "model": {"module": "art.estimators.classification", "name": "SmoothedClassifier", "kwargs": {"sigma": 0.25}},
  "attack": {"module": "art.attacks.evasion", "name": "SmoothAdvPGD", "kwargs": {}}
}"""


def load(section, *args):
    cls = getattr(importlib.import_module(section["module"]), section["name"])
    return cls(*args, **section["kwargs"])


scenario = json.loads(SCENARIO)
model, images, labels = victim.load()
classifier = load(scenario["model"], model)
x, y = images.numpy(), labels.numpy()
x.setflags(write=False)
adversarial = load(scenario["attack"], classifier).generate(x=x, y=y)
victim.check(adversarial, images)
assert classifier.predict(adversarial).shape == (6, 10)
