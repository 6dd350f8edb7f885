"""Interval and linear bounds on the logits of a network over a region around its input: IBP, CROWN-IBP, CROWN."""
