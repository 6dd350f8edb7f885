"""Trains for certificates and certifies as ART's notebooks do, with the classifier and the trainer that are named."""

import sys

import art.defences.trainer
import art.estimators.certification.interval
import numpy as np
import torch
from art.attacks.evasion import ProjectedGradientDescent
from sklearn.datasets import load_digits
from torch import nn

torch.set_num_threads(1)
torch.manual_seed(0)
np.random.seed(0)
make_classifier = getattr(art.estimators.certification.interval, sys.argv[1])
make_trainer = getattr(art.defences.trainer, sys.argv[2])

data = load_digits()
x = (data.images[:, None] / 16).astype(np.float32)
y = data.target
x_train, y_train, x_test, y_test = x[:600], y[:600], x[600:700], y[600:700]


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, kernel_size=3, stride=2)
        self.relu = nn.ReLU()
        self.fc = nn.Linear(36, 10)

    def forward(self, x):
        x = self.relu(self.conv(x))
        return self.fc(torch.flatten(x, 1))


model = Network()
optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
classifier = make_classifier(
    model=model,
    clip_values=(0, 1),
    loss=nn.CrossEntropyLoss(),
    optimizer=optimizer,
    input_shape=(1, 8, 8),
    nb_classes=10,
)
trainer = make_trainer(classifier=classifier, bound=0.03, batch_size=50)
trainer.fit(x_train, y_train, limits=[0.0, 1.0], nb_epochs=4, batch_size=50, verbose=False)
classifier.model.re_convert()

trainer.set_forward_mode("concrete")
predictions = trainer.predict(x_test)
print("accuracy", np.mean(np.argmax(predictions, axis=1) == y_test))

classifier.model.set_forward_mode("attack")
attack = ProjectedGradientDescent(classifier, eps=0.03, eps_step=0.01, max_iter=5, verbose=False)
adversarial = attack.generate(x_test, np.eye(10)[y_test])
classifier.model.set_forward_mode("concrete")
robust = np.argmax(classifier.predict(adversarial), axis=1) == y_test
print("accuracy under attack", np.mean(robust))

classifier.model.set_forward_mode("abstract")
intervals = classifier.predict_intervals(x_test, is_interval=False, bounds=0.03, limits=[0.0, 1.0], batch_size=30)
assert intervals.shape == (100, 2, 10)
certified = classifier.certify(preds=intervals, labels=y_test)
boxes = np.stack([np.clip(x_test - 0.03, 0, 1), np.clip(x_test + 0.03, 0, 1)], axis=1)
same = trainer.predict_intervals(x_test, bounds=0.03, limits=[0.0, 1.0])
assert np.allclose(classifier.predict_intervals(boxes, is_interval=True), intervals, atol=1e-4)
assert np.allclose(same, intervals, atol=1e-4)
assert not np.any(certified & ~robust)
print("certified accuracy", np.mean(certified))
assert np.mean(certified) > 0.1
