"""Labels that a network gives to images without: semi-supervised training (Carmon et al. 2019; Salman et al. 2019)."""

import hashlib
from dataclasses import replace

import torch
from torch import nn
from tqdm.auto import tqdm

from rs_plugins.core.checks import check_count
from rs_plugins.core.data_sets.data_set import DataSet
from rs_plugins.core.data_sets.opening import as_training_set
from rs_plugins.core.models import check_noiseless, device_and_dtype, evaluating, probe
from rs_plugins.errors import ModelError


def pseudo_labelled(data: DataSet | str, model: nn.Module, *, batch_size: int = 256, progress: bool = False) -> DataSet:
    """Return ``data`` with the classes that ``model`` finds in the images as labels.

    It is a data set to be handed to `train_data_set` as ``extra``; `rs_plugins.core.data_sets.npz.write_npz` keeps it.

    Args:
        data: The images, or a text as `open_training_set` takes it; their labels are not looked at.
        model: (n, *input) in pixels to logits (n, classes); usually trained on clean images, as it is the better judge.
        batch_size: Images per forward pass.
        progress: Whether to show a progress bar.

    Raises:
        InputError: If an argument has an impossible value.
        ModelError: If the model cannot be run on the images, or returns NaN.
    """
    batch_size, data = check_count(batch_size, "batch_size"), as_training_set(data)
    device, dtype = device_and_dtype(check_noiseless(model, "model"))
    classes = probe(model, data.read([0]).to(device, dtype))
    labels = torch.empty(len(data), dtype=torch.int64)
    with evaluating(model), torch.no_grad():
        for first in tqdm(range(0, len(data), batch_size), desc="label", unit="batch", disable=not progress):
            rows = range(first, min(first + batch_size, len(data)))
            logits = model(data.read(rows).to(device, dtype))
            if bool(logits.isnan().any()):
                raise ModelError(f"model: it returns NaN on an image between {rows.start} and {rows.stop - 1}")
            labels[rows.start : rows.stop] = logits.argmax(dim=1).cpu()
    digest = hashlib.sha256(data.digest.encode() + labels.numpy().tobytes()).hexdigest()
    return replace(data, name=f"{data.name}, pseudo-labels", labels=labels.numpy(), digest=digest, classes=classes)
