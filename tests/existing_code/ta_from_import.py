from torchattacks import PGDL2, SmoothAdvPGD

import victim

model, images, labels = victim.load()
for attack in [PGDL2(model, eps=0.5), SmoothAdvPGD(model, eps=0.5)]:
    victim.check(attack(images, labels), images, 0.5)
