from art.estimators.certification.randomized_smoothing import PyTorchRandomizedSmoothing, SmoothedClassifier

import victim

assert PyTorchRandomizedSmoothing is not SmoothedClassifier
model, images, labels = victim.load()
predicted, radii = SmoothedClassifier(model, 0.12).certify(images.numpy(), n=150)
assert predicted.shape == radii.shape == (6,), (predicted, radii)
print("mean radius", radii.mean())
