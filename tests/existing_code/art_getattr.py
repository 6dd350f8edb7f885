import json
import sys

import art.attacks.evasion
import torch
from art.estimators.classification import PyTorchClassifier

import victim

model, images, labels = victim.load()
classifier = PyTorchClassifier(
    model, loss=torch.nn.CrossEntropyLoss(), input_shape=(1, 10, 10), nb_classes=10, clip_values=(0, 1)
)
attack = getattr(art.attacks.evasion, sys.argv[1])(estimator=classifier, **json.loads(sys.argv[2]))
victim.check(attack.generate(x=images.numpy(), y=labels.numpy()), images, 0.5)
