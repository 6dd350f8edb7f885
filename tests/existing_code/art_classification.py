from art.attacks.evasion import FastGradientMethod
from art.estimators.classification import PyTorchClassifier, SmoothedClassifier

import victim

model, images, labels = victim.load()
x = images.numpy()
classifier = SmoothedClassifier(model, sigma=0.25)
assert isinstance(classifier, PyTorchClassifier)
predicted, radii = classifier.certify(x, n=200)
assert predicted.shape == radii.shape == (6,) and (radii >= 0).all() and (radii < 1).all(), radii
assert ((predicted >= -1) & (predicted < 10)).all() and (radii[predicted == -1] == 0).all()
print("certified", (predicted == labels.numpy()).mean(), "mean radius", radii.mean())
victim.check(FastGradientMethod(classifier, norm=2, eps=0.5).generate(x), images, 0.5)
