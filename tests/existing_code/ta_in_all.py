import torchattacks

import victim

name = "SmoothAdvPGD"
if name not in torchattacks.__all__:
    raise ValueError(f"unknown attack {name}")

model, images, labels = victim.load()
victim.check(torchattacks.__getattribute__(name)(model)(images, labels), images, 1.0)
