"""The LeNet for MNIST of Jeong et al. (2021), SmoothMix."""

from torch import nn

from rs_plugins.core.checks import check_count


def lenet(*, classes: int = 10) -> nn.Sequential:
    """Return the LeNet of Jeong et al. (2021): (n, 1, 28, 28) to logits (n, classes).

    It has 431,080 parameters for 10 classes, initial ones as in PyTorch's layers, and no normalisation.

    Raises:
        InputError: If ``classes`` is no integer >= 2.
    """
    return nn.Sequential(
        *(nn.Conv2d(1, 20, 5), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(20, 50, 5), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(800, 500), nn.ReLU(), nn.Linear(500, check_count(classes, "classes", least=2))),
    )
