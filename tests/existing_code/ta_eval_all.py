"""Robust accuracy under the whole PGD family."""

import torchattacks

import victim

model, images, labels = victim.load()
accuracies = {}
for name in [name for name in torchattacks.__all__ if name not in torchattacks.__wrapper__]:
    attack = eval("torchattacks." + name)(model)  # every attack has to be constructible from the model alone
    if "PGD" in name:
        adversarial = attack(images, labels)
        accuracies[name] = (model(adversarial).argmax(1) == labels).float().mean().item()
        print(name, accuracies[name])

assert accuracies["SmoothAdvPGD"] <= 1
