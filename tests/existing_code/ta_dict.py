import torchattacks

import victim

config = {"name": "SmoothAdvPGD", "kwargs": {"eps": 0.25, "alpha": 0.1, "steps": 4}}

model, images, labels = victim.load()
attack = torchattacks.__dict__[config["name"]](model=model, **config["kwargs"])
victim.check(attack(images, labels), images, 0.25)
