"""The host adapter for torchattacks."""
