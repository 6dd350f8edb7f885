import art.estimators.certification

import victim

model, images, labels = victim.load()
predicted, radii = art.estimators.certification.SmoothedClassifier(model, sigma=0.5).certify(images.numpy(), n=150)
assert predicted.shape == radii.shape == (6,), (predicted, radii)
print("mean radius", radii.mean())
