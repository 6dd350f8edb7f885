import json
import sys

import art.attacks.evasion
import torch
from art.estimators.classification import PyTorchClassifier

import victim

name, options = sys.argv[1:] if sys.argv[1:] else ("SmoothAdvPGD", '{"sigma": 0.25, "eps": 0.5}')
model, images, labels = victim.load()
classifier = PyTorchClassifier(
    model, loss=torch.nn.CrossEntropyLoss(), input_shape=(1, 10, 10), nb_classes=10, clip_values=(0, 1)
)
attack = getattr(art.attacks.evasion, name)(estimator=classifier, **json.loads(options))
victim.check(attack.generate(x=images.numpy(), y=labels.numpy()), images, 0.5)
