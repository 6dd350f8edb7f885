"""An attack on a data set as a job that can be stopped and gone on with; each batch is attacked, then judged."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from tqdm.auto import tqdm

import rs_plugins
from rs_plugins.core.attacks.evaluation import AttackEvaluation, check_votes, evaluate_attack
from rs_plugins.core.attacks.figures import Predictions
from rs_plugins.core.attacks.folder import FINISHED, AttackFolder, Columns
from rs_plugins.core.certification import majority
from rs_plugins.core.checks import PIXEL_TOLERANCE, check_count, check_probability, check_seed, check_sigma
from rs_plugins.core.data_sets.data_set import DataSet
from rs_plugins.core.data_sets.opening import as_data_set, check_classes
from rs_plugins.core.global_randomness import global_randomness
from rs_plugins.core.identity import identity, numerics
from rs_plugins.core.models import device_and_dtype, probe
from rs_plugins.core.noise import make_noise
from rs_plugins.core.selection import Selection
from rs_plugins.core.smoothing import SmoothedModel
from rs_plugins.core.streams import stream
from rs_plugins.errors import InputError, PluginError, ResultsError, RSPluginsError

Attack = Callable[[Tensor, Tensor], Any]  # images (n, *input) and labels (n,) → images; may have ``success``, (n,)


@dataclass(frozen=True, eq=False)
class AttackedImages:
    """What an attack on a data set left.

    Attributes:
        evaluation: The figures; its ``indices`` are positions in the data set.
        images: The attacked images, (n, *input), float32.
        claimed: Which of them the attack itself takes for successes, (n,); None if it does not say.
    """

    evaluation: AttackEvaluation
    images: npt.NDArray[np.float32]
    claimed: npt.NDArray[np.bool_] | None


def attack_data_set(
    attack: Attack,
    smoothed: SmoothedModel,
    data: DataSet | str,
    folder: str | Path,
    *,
    settings: Mapping[str, Any],
    selection: Selection | None = None,
    batch_size: int = 64,
    batches_matter: bool = True,
    n: int = 10_000,
    alpha: float = 0.001,
    confidence: float = 0.95,
    seed: int = 0,
    device: torch.device | str | None = None,
    resume: bool = False,
    progress: bool = False,
) -> AttackedImages:
    """Attack images of ``data``, judge the attack by `evaluate_attack`, and keep all of it in ``folder``.

    A finished batch, attacked and judged, is on disk before the next begins. Stopped at any moment and called again
    with ``resume``, it goes on. The judge's votes do not depend on how images are batched.

    Args:
        attack: Called with copies of images (k, *input) and labels (k,) on the model's device; its attribute
            ``success``, if it has one after a call, is kept beside the judge's figures.
        smoothed: The classifier by which the attack is judged.
        data: The images with their labels, as `open_data_set` returns them, or the text that it takes.
        folder: Where results are kept (`rs_plugins.core.attacks.folder`); ``adversarial.npz`` in it can be opened as a
            data set again.
        settings: What makes the attack what it is, as plain data without infinite numbers: its name and options.
        selection: Which images; all by default. Other images can be added to a folder later.
        batch_size: Images attacked at once.
        batches_matter: Whether what ``attack`` finds for an image may depend on the images beside it, as it does where
            it draws from the global generators. Then a folder is gone on with at the same ``batch_size`` only. Our
            attacks do not depend on it.
        n: Votes an image of the judge, before and after each.
        alpha: Level of PREDICT.
        confidence: Of the intervals over images.
        seed: Seed of the judge, and of the global generators while ``attack`` runs, which many attacks draw from; the
            caller's state is put back.
        device: Only needed for a model without parameters.
        resume: Go on with what is in ``folder``. Without, a folder with results is refused.
        progress: Whether to show a progress bar.

    Raises:
        InputError: If an argument has an impossible value.
        ModelError: If the model cannot be run on the images, or gives fewer classes than there are labels.
        PluginError: If ``attack`` raises anything else.
        ResultsError: If ``folder`` holds results of another attack, model, data set or judge, or of other images, or
            files that are not ours; if another process is writing it.
    """
    size, data = check_count(batch_size, "batch_size"), as_data_set(data)
    check_votes(n, alpha)
    check_probability(confidence, "confidence")
    check_sigma(smoothed.sigma)
    positions = (selection or Selection()).positions(len(data))
    home, dtype = device_and_dtype(smoothed.base, device)
    check_classes(probe(smoothed.base, data.read(positions[:1]).to(home, dtype)), data)
    judge = {"n": n, "alpha": alpha, "seed": check_seed(seed)}
    batches = {"batch_size": size} if batches_matter else {}
    name = f"attack {settings['attack']}" if "attack" in settings else "attack"
    made_with = {**settings, **batches, **judge, **_provenance(smoothed, home), **data.identity}
    with AttackFolder(folder, made_with, resume=resume, columns=FINISHED) as kept:
        done = set(_indices(kept.read(), positions, kept.path))
        left = [position for position in positions if position not in done]
        with tqdm(total=len(positions), initial=len(done), desc="attack", unit="image", disable=not progress) as bar:
            for start in range(0, len(left), size):
                part = left[start : start + size]
                kept.add(_batch(attack, smoothed, data, part, home, {**judge, "progress": progress}, name))
                bar.update(len(part))
        results = kept.read()
        evaluation = _evaluation(results, smoothed.sigma, judge, confidence)
        kept.finish(results, {"made_with": made_with, **_with_claims(evaluation, results.get("claimed"))})
    images = results["images"].reshape(-1, *data.shape)
    return AttackedImages(evaluation, images, results.get("claimed"))


def _provenance(smoothed: SmoothedModel, device: torch.device) -> dict[str, Any]:
    noise = make_noise(smoothed.family, smoothed.sigma)
    return {
        "sigma": smoothed.sigma,
        "noise": repr(noise),
        "model": identity(smoothed.base),
        "device": device.type,
        "numerics": numerics(device),
        "versions": f"rs-plugins {rs_plugins.__version__}, torch {torch.__version__}, numpy {np.__version__}",
    }


def _indices(results: Columns, positions: list[int], folder: Path) -> list[int]:
    """Return the images that are done.

    Raises:
        ResultsError: If there is one that is not asked for: the figures would be of other images.
    """
    done: list[int] = results["index"].tolist() if results else []
    if others := sorted(set(done) - set(positions)):
        raise ResultsError(
            f"{folder}: begun with other images (image {others[0]}, which this selection has not); give the same "
            "start, stop and skip, or choose another folder"
        )
    return done


def _batch(
    attack: Attack,
    smoothed: SmoothedModel,
    data: DataSet,
    positions: list[int],
    device: torch.device,
    judge: Mapping[str, Any],
    name: str,
) -> Columns:
    """Attack and judge the images at ``positions``; ``name`` is what messages call the attack."""
    images, labels = data.read(positions), torch.from_numpy(data.labels[positions])
    attacked = _attacked(attack, name, images.to(device), labels.to(device), judge["seed"], positions[0])
    found = evaluate_attack(smoothed, images, attacked, labels, indices=positions, device=device, **judge)
    columns: Columns = {
        "index": found.indices,
        # of a grey image without its channel: of 1 x 3 x 3 nobody could tell which of them are channels
        "images": (attacked.squeeze(1) if data.shape[0] == 1 else attacked).numpy(),
        "labels": found.before.label,
        "counts_before": found.before.counts,
        "counts_after": found.after.counts,
        "l2": found.l2,
        "linf": found.linf,
    }
    claimed = getattr(attack, "success", None)
    if claimed is not None:
        columns["claimed"] = _claims(claimed, len(positions), name)
    return columns


def _attacked(attack: Attack, name: str, images: Tensor, labels: Tensor, seed: int, first: int) -> Tensor:
    try:
        with global_randomness(stream(seed, "global", first).initial_seed()):
            attacked = attack(images.clone(), labels.clone())  # it may write into what it is given
    except RSPluginsError:
        raise
    except Exception as error:  # somebody else's attack may raise anything
        raise PluginError(f"{name}: it fails: {type(error).__name__}: {str(error) or 'no message'}") from error
    return _check_attacked(attacked, name, images).detach().to("cpu", torch.float32)


def _check_attacked(attacked: object, name: str, images: Tensor) -> Tensor:
    """Return what an attack made of ``images`` if it can be judged.

    Raises:
        InputError: If it is no tensor of such images, with pixels in [0, 1].
    """
    if not isinstance(attacked, Tensor):
        got = type(attacked).__name__
    elif attacked.shape != images.shape:
        got = f"shape {tuple(attacked.shape)}"
    elif not bool(attacked.isfinite().all()):
        got = "NaN or infinity"
    else:
        low, high = (float(bound) for bound in attacked.detach().aminmax())
        if low >= -PIXEL_TOLERANCE and high <= 1 + PIXEL_TOLERANCE:
            return attacked
        got = f"pixels from {low:.6g} to {high:.6g}"
    raise InputError(f"{name}: it returned {got}; expected a tensor {tuple(images.shape)} of pixels in [0, 1]")


def _claims(claimed: Any, n: int, name: str) -> npt.NDArray[np.bool_]:
    flags = np.asarray(claimed.cpu() if isinstance(claimed, Tensor) else claimed)
    if flags.shape != (n,) or flags.dtype != np.bool_:
        got = f"{flags.dtype} of shape {flags.shape}"
        raise InputError(f"{name}: expected its success to be boolean, one per image ({n},), got {got}")
    return flags


def _evaluation(results: Columns, sigma: float, judge: Mapping[str, Any], confidence: float) -> AttackEvaluation:
    counts = results["counts_before"], results["counts_after"]
    before, after = (
        Predictions(results["labels"], majority(found, judge["alpha"]), found, judge["n"]) for found in counts
    )
    return AttackEvaluation(
        *(before, after, results["l2"], results["linf"], results["index"]),
        sigma=sigma,
        alpha=judge["alpha"],
        confidence=confidence,
        seed=judge["seed"],
    )


def _with_claims(evaluation: AttackEvaluation, claimed: Any) -> dict[str, Any]:
    content = evaluation.as_dict()
    if claimed is not None:
        content["images"]["claimed"] = claimed.tolist()
    return content
