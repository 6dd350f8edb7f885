import torchattacks

import victim

model, images, labels = victim.load()
attack = torchattacks.MultiAttack(
    [torchattacks.PGDL2(model, eps=0.5, steps=2), torchattacks.SmoothAdvPGD(model, eps=4.0, alpha=1.0)]
)
victim.check(attack(images, labels), images, 4.0)
