"""Attacks on a smoothed classifier, as functions."""
