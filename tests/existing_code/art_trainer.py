"""Trains with whatever trainers are named, and knows of them what ART's documentation says."""

import sys

import art.defences.trainer
import art.estimators.classification
import numpy as np
import torch
from art.data_generators import NumpyDataGenerator

import victim

names = sys.argv[1:] or ["SmoothMixTrainer"]
trainers = [getattr(art.defences.trainer, name) for name in names]
for cls in trainers:
    model, images, labels = victim.load()
    x, y = images.numpy(), labels.numpy()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    classifier = art.estimators.classification.SmoothedClassifier(model, sigma=0.25, optimizer=optimizer)
    before = classifier.predict(x)
    trainer = cls(classifier)
    assert isinstance(trainer, art.defences.trainer.Trainer)
    trainer.fit(x, np.eye(10)[y], batch_size=3, nb_epochs=2)
    fitted = trainer.predict(x)
    assert fitted.shape == (6, 10) and not np.allclose(fitted, before), cls
    x.setflags(write=False)
    trainer.fit_generator(NumpyDataGenerator(x, y, batch_size=3), nb_epochs=2)
    assert not np.allclose(trainer.predict(x, batch_size=2), fitted), cls
    assert trainer.get_classifier() is trainer.classifier is classifier
    print(cls.__name__, "accuracy", (trainer.predict(x).argmax(1) == y).mean())
