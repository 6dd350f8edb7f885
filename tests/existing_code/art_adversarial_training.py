"""Trains against attacks with whatever trainers are named, as ART's examples do, and attacks what comes out."""

import inspect
import sys

import art.defences.trainer
import numpy as np
import torch
from art.attacks.evasion import ProjectedGradientDescent
from art.estimators.classification import PyTorchClassifier
from sklearn.datasets import load_digits
from torch import nn

torch.set_num_threads(1)
trainers = [getattr(art.defences.trainer, name) for name in sys.argv[1:]]

data = load_digits()
x = (data.images[:, None] / 16).astype(np.float32)
y = np.eye(10, dtype=np.float32)[data.target]
x_train, y_train, x_test, y_test = x[:600], y[:600], x[600:700], y[600:700]
EPS = 0.1


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 8, kernel_size=3, stride=2), nn.BatchNorm2d(8)
        self.hidden, self.last = nn.Linear(72, 32), nn.Linear(32, 10)

    def forward(self, x):
        x = torch.relu(self.norm(self.conv(x)))
        return self.last(torch.relu(self.hidden(torch.flatten(x, 1))))


def make_classifier():
    torch.manual_seed(0)
    np.random.seed(0)
    model = Network()
    return PyTorchClassifier(
        model=model,
        loss=nn.CrossEntropyLoss(),
        input_shape=(1, 8, 8),
        nb_classes=10,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9),
        clip_values=(0, 1),
        device_type="cpu",
    )


def accuracies(classifier):
    attack = ProjectedGradientDescent(classifier, eps=EPS, eps_step=EPS / 4, max_iter=10, verbose=False)
    adversarial = attack.generate(x_test, y_test)
    return [np.mean(np.argmax(classifier.predict(each), 1) == np.argmax(y_test, 1)) for each in (x_test, adversarial)]


standard = make_classifier()
standard.fit(x_train, y_train, batch_size=50, nb_epochs=6)
clean, robust = accuracies(standard)
print(f"without: accuracy {clean:.2f}, under attack {robust:.2f}")

for make_trainer in trainers:
    classifier = make_classifier()
    attack = ProjectedGradientDescent(
        classifier, eps=EPS, eps_step=EPS / 2, max_iter=3, num_random_init=1, verbose=False
    )
    settings = {"attack": attack, "beta": 6.0, "eps": EPS, "eps_step": EPS / 2, "max_iter": 3}
    known = inspect.signature(make_trainer).parameters
    trainer = make_trainer(classifier, **{name: value for name, value in settings.items() if name in known})
    assert isinstance(trainer, art.defences.trainer.Trainer)
    trainer.fit(x_train, y_train, validation_data=(x_test, y_test), batch_size=50, nb_epochs=6)
    assert trainer.get_classifier() is classifier
    found = accuracies(trainer.get_classifier())
    print(f"{make_trainer.__name__}: accuracy {found[0]:.2f}, under attack {found[1]:.2f}")
    assert found[1] > robust + 0.05, make_trainer
