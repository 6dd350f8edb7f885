from torchattacks import *

import victim

model, images, labels = victim.load()
attacks = {"linf": PGD, "l2": SmoothAdvPGD}
victim.check(attacks["l2"](model)(images, labels), images, 1.0)
