import os
from pathlib import Path

import pytest

from rs_plugins.core.data_sets.opening import open_data_set

SHARED = Path(__file__).parents[4] / "shared"
CIFAR = Path(os.environ.get("RS_PLUGINS_DATA", SHARED / "data")) / "cifar10_jpeg.npz"
MODELS = Path(os.environ.get("RS_PLUGINS_MODELS", SHARED / "models"))


@pytest.fixture(scope="session")
def cifar():
    """The JPEG test images of CIFAR-10."""
    if not CIFAR.is_file():
        pytest.skip("CIFAR-10 is not here; RS_PLUGINS_DATA says where it is")
    pytest.importorskip("PIL")
    return open_data_set(f"npz-jpeg:{CIFAR}")


@pytest.fixture(scope="session")
def models():
    """The folder of published weights."""
    if not (MODELS / "cifar10_resnet20.safetensors").is_file():
        pytest.skip("the published weights are not here; RS_PLUGINS_MODELS says where they are")
    return MODELS
