"""Noise families beside the Gaussian one for l2 (`rs_plugins.core.noise`), each with a certificate that is proved."""
