"""Labelled images from files on disk, one format per module. Nothing is downloaded, nothing in a file is executed."""
