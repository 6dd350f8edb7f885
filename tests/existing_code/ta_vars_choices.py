import argparse

import torchattacks

import victim

parser = argparse.ArgumentParser()
parser.add_argument("--attack", default="SmoothAdvPGD", choices=vars(torchattacks)["__all__"])
args = parser.parse_args()

model, images, labels = victim.load()
victim.check(vars(torchattacks)[args.attack](model)(images, labels), images, 1.0)
