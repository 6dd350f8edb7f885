import argparse

import torchattacks

import victim

parser = argparse.ArgumentParser()
parser.add_argument("--attack", default="SmoothAdvPGD")
parser.add_argument("--eps", type=float, default=0.5)
args = parser.parse_args()

model, images, labels = victim.load()
attack = getattr(torchattacks, args.attack)(model, eps=args.eps, steps=3)
victim.check(attack(images, labels), images, args.eps)
