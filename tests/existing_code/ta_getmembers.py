import inspect

import torchattacks

import victim

attacks = {
    name: cls
    for name, cls in inspect.getmembers(torchattacks, inspect.isclass)
    if issubclass(cls, torchattacks.attack.Attack)
}

model, images, labels = victim.load()
victim.check(attacks["SmoothAdvPGD"](model)(images, labels), images, 1.0)
