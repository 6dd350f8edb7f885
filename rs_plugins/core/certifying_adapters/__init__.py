"""Certifying adapters (Deng et al. 2024): a frozen classifier made certifiable by a small network beside it."""
