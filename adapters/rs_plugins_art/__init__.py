"""The host adapter for the Adversarial Robustness Toolbox."""
