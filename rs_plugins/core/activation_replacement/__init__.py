"""Other activations in the place of ReLU, in any model: by surgery, by torch.fx, or while it runs."""
