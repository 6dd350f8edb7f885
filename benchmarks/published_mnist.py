"""What the papers' networks reach on MNIST: recomputed from the logs that Jeong et al. (2021) published.

A LeNet, 10,000 test images, 100,000 votes each, means over 5 seeds: the average certified radius and its standard
deviation over seeds, and certified accuracy in % at the radii 0, 0.25, 0.5, …, of what our presets train.
"""

from typing import NamedTuple


class Published(NamedTuple):
    """A row of the paper's table."""

    acr: float
    spread: float
    certified: tuple[float, ...]


PUBLISHED = {
    "gaussian-mnist-0.25": Published(0.911, 0.0003, (99.2, 98.5, 96.7, 93.1)),
    "gaussian-mnist-0.5": Published(1.558, 0.0016, (99.2, 98.3, 96.9, 94.3, 89.8, 82.0, 67.8, 44.9)),
    "gaussian-mnist-1.0": Published(1.618, 0.0021, (96.3, 94.4, 91.4, 86.8, 79.9, 71.0, 59.5, 46.1, 32.5, 19.6, 10.9)),
    "stability-mnist-0.25": Published(0.915, 0.0007, (99.3, 98.6, 97.1, 93.8)),
    "stability-mnist-0.5": Published(1.572, 0.0028, (99.3, 98.5, 97.3, 94.9, 90.8, 83.1, 69.2, 45.8)),
    "stability-mnist-1.0": Published(1.634, 0.0018, (96.4, 94.5, 91.6, 87.1, 80.4, 71.8, 60.5, 47.0, 33.4, 20.5, 11.1)),
    "smoothadv-mnist-0.25": Published(0.932, 0.0005, (99.4, 99.0, 98.2, 96.8)),
    "smoothadv-mnist-0.5": Published(1.687, 0.0007, (99.0, 98.4, 97.4, 95.7, 92.9, 88.5, 81.1, 67.5)),
    "smoothadv-mnist-1.0": Published(1.779, 0.0017, (95.8, 93.8, 90.7, 86.5, 80.8, 73.6, 64.4, 53.9, 43.3, 32.9, 22.6)),
    "macer-mnist-0.25": Published(0.920, 0.0006, (99.3, 98.7, 97.3, 94.7)),
    "macer-mnist-0.5": Published(1.590, 0.0069, (98.7, 97.8, 96.3, 93.9, 90.1, 83.5, 72.1, 52.3)),
    "macer-mnist-1.0": Published(1.595, 0.0051, (91.6, 88.1, 83.4, 77.7, 71.1, 63.8, 55.7, 47.1, 38.7, 29.5, 20.1)),
    "consistency-mnist-0.25": Published(0.928, 0.0002, (99.4, 98.9, 97.9, 96.0)),
    "consistency-mnist-0.5": Published(1.655, 0.0012, (99.2, 98.5, 97.5, 95.8, 92.9, 87.7, 78.3, 60.4)),
    "consistency-mnist-1.0": Published(
        1.738, 0.0019, (95.0, 92.9, 89.8, 85.4, 79.7, 72.8, 63.5, 53.0, 41.7, 31.0, 20.3)
    ),
    "smoothmix-mnist-0.25-w1": Published(0.930, 0.0003, (99.4, 98.9, 98.1, 96.3)),
    "smoothmix-mnist-0.5-w1": Published(1.678, 0.0007, (99.1, 98.5, 97.5, 95.7, 92.9, 88.2, 80.2, 65.5)),
    "smoothmix-mnist-1.0-w1": Published(
        1.787, 0.0020, (95.5, 93.6, 90.5, 86.1, 80.5, 73.5, 64.1, 53.6, 43.2, 33.3, 23.9)
    ),
    "smoothmix-mnist-0.25": Published(0.932, 0.0002, (99.4, 98.9, 98.2, 96.7)),
    "smoothmix-mnist-0.5": Published(1.693, 0.0007, (98.6, 98.0, 97.0, 95.2, 92.6, 88.4, 81.8, 69.8)),
    "smoothmix-mnist-1.0": Published(1.818, 0.0016, (93.7, 91.4, 88.0, 83.4, 78.0, 70.9, 62.8, 53.5, 44.9, 36.7, 28.9)),
    "smoothmix-mnist-0.25-onestep-w1": Published(0.933, 0.0004, (99.4, 98.9, 98.2, 97.0)),
    "smoothmix-mnist-0.5-onestep-w1": Published(1.693, 0.0009, (98.7, 98.0, 97.1, 95.4, 92.7, 88.4, 81.7, 69.5)),
    "smoothmix-mnist-1.0-onestep-w1": Published(
        1.817, 0.0011, (94.7, 92.5, 89.4, 84.9, 79.5, 72.6, 64.0, 54.4, 44.8, 36.1, 27.3)
    ),
    "smoothmix-mnist-0.25-onestep": Published(0.933, 0.0002, (99.4, 99.0, 98.2, 97.0)),
    "smoothmix-mnist-0.5-onestep": Published(1.685, 0.0003, (98.2, 97.4, 96.3, 94.4, 91.5, 87.4, 81.2, 70.7)),
    "smoothmix-mnist-1.0-onestep": Published(
        1.821, 0.0013, (93.1, 90.8, 87.2, 82.7, 77.2, 70.3, 62.5, 53.3, 44.8, 37.2, 29.7)
    ),
}
