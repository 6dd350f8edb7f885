"""Certified robustness by randomized smoothing, plugged into ART and torchattacks.

Importing this package loads neither torch nor a host; each name is imported when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rs_plugins.activation import activate as activate
    from rs_plugins.activation import activated as activated
    from rs_plugins.activation import deactivate as deactivate
    from rs_plugins.core.activation_replacement.converting import smooth_activations as smooth_activations
    from rs_plugins.core.attacks.evaluation import evaluate_attack as evaluate_attack
    from rs_plugins.core.black_box import BlackBox as BlackBox
    from rs_plugins.core.certification import Certificate as Certificate
    from rs_plugins.core.certification import certify as certify
    from rs_plugins.core.certifying_adapters.adapted import AdaptedClassifier as AdaptedClassifier
    from rs_plugins.core.certifying_adapters.design import AdapterDesign as AdapterDesign
    from rs_plugins.core.certifying_adapters.design import adapt as adapt
    from rs_plugins.core.certifying_adapters.ensemble import AdapterEnsemble as AdapterEnsemble
    from rs_plugins.core.ensembles import ConsensusEnsemble as ConsensusEnsemble
    from rs_plugins.core.ensembles import SoftEnsemble as SoftEnsemble
    from rs_plugins.core.noise import GaussianNoise as GaussianNoise
    from rs_plugins.core.noise_families.gaussian_linf import GaussianLinfNoise as GaussianLinfNoise
    from rs_plugins.core.noise_families.laplace import LaplaceNoise as LaplaceNoise
    from rs_plugins.core.noise_families.lattice import LatticeGaussianNoise as LatticeGaussianNoise
    from rs_plugins.core.noise_families.uniform import UniformLinfNoise as UniformLinfNoise
    from rs_plugins.core.noise_families.uniform import UniformNoise as UniformNoise
    from rs_plugins.core.plans.anytime import Anytime as Anytime
    from rs_plugins.core.plans.at_radius import AtRadius as AtRadius
    from rs_plugins.core.plans.fixed_budget import FixedBudget as FixedBudget
    from rs_plugins.core.plans.on_grid import OnGrid as OnGrid
    from rs_plugins.core.relaxations.certifying import certify_bounds as certify_bounds
    from rs_plugins.core.smoothing import SmoothedModel as SmoothedModel
    from rs_plugins.core.training.trained import load_trained as load_trained
    from rs_plugins_art.black_box import SmoothedBlackBox as SmoothedBlackBox
    from rs_plugins_art.bounds_classifier import BoundsClassifier as BoundsClassifier
    from rs_plugins_art.bounds_trainer import GlsTrainer as GlsTrainer
    from rs_plugins_art.certifying_adapter import CertifyingAdapterClassifier as CertifyingAdapterClassifier
    from rs_plugins_art.classifier import SmoothedClassifier as SmoothedClassifier
    from rs_plugins_art.sat_trainer import SATTrainer as SATTrainer
    from rs_plugins_art.trainers import ConsistencyTrainer as ConsistencyTrainer
    from rs_plugins_art.trainers import GaussianTrainer as GaussianTrainer
    from rs_plugins_art.trainers import MacerTrainer as MacerTrainer
    from rs_plugins_art.trainers import SmoothAdvTrainer as SmoothAdvTrainer
    from rs_plugins_art.trainers import SmoothMixTrainer as SmoothMixTrainer
    from rs_plugins_art.trainers import StabilityTrainer as StabilityTrainer
    from rs_plugins_torchattacks.attacks import SmoothAdvDDN as SmoothAdvDDN
    from rs_plugins_torchattacks.attacks import SmoothAdvLinfPGD as SmoothAdvLinfPGD
    from rs_plugins_torchattacks.attacks import SmoothAdvPGD as SmoothAdvPGD

__version__ = "0.1.0"

_HOME = {
    "AdaptedClassifier": "rs_plugins.core.certifying_adapters.adapted",
    "AdapterDesign": "rs_plugins.core.certifying_adapters.design",
    "AdapterEnsemble": "rs_plugins.core.certifying_adapters.ensemble",
    "Anytime": "rs_plugins.core.plans.anytime",
    "AtRadius": "rs_plugins.core.plans.at_radius",
    "BlackBox": "rs_plugins.core.black_box",
    "BoundsClassifier": "rs_plugins_art.bounds_classifier",
    "Certificate": "rs_plugins.core.certification",
    "CertifyingAdapterClassifier": "rs_plugins_art.certifying_adapter",
    "ConsensusEnsemble": "rs_plugins.core.ensembles",
    "ConsistencyTrainer": "rs_plugins_art.trainers",
    "FixedBudget": "rs_plugins.core.plans.fixed_budget",
    "GaussianLinfNoise": "rs_plugins.core.noise_families.gaussian_linf",
    "GaussianNoise": "rs_plugins.core.noise",
    "GaussianTrainer": "rs_plugins_art.trainers",
    "GlsTrainer": "rs_plugins_art.bounds_trainer",
    "LaplaceNoise": "rs_plugins.core.noise_families.laplace",
    "LatticeGaussianNoise": "rs_plugins.core.noise_families.lattice",
    "MacerTrainer": "rs_plugins_art.trainers",
    "OnGrid": "rs_plugins.core.plans.on_grid",
    "SATTrainer": "rs_plugins_art.sat_trainer",
    "SmoothAdvDDN": "rs_plugins_torchattacks.attacks",
    "SmoothAdvLinfPGD": "rs_plugins_torchattacks.attacks",
    "SmoothAdvPGD": "rs_plugins_torchattacks.attacks",
    "SmoothAdvTrainer": "rs_plugins_art.trainers",
    "SmoothMixTrainer": "rs_plugins_art.trainers",
    "SmoothedBlackBox": "rs_plugins_art.black_box",
    "SmoothedClassifier": "rs_plugins_art.classifier",
    "SmoothedModel": "rs_plugins.core.smoothing",
    "SoftEnsemble": "rs_plugins.core.ensembles",
    "StabilityTrainer": "rs_plugins_art.trainers",
    "UniformLinfNoise": "rs_plugins.core.noise_families.uniform",
    "UniformNoise": "rs_plugins.core.noise_families.uniform",
    "activate": "rs_plugins.activation",
    "activated": "rs_plugins.activation",
    "adapt": "rs_plugins.core.certifying_adapters.design",
    "certify": "rs_plugins.core.certification",
    "certify_bounds": "rs_plugins.core.relaxations.certifying",
    "deactivate": "rs_plugins.activation",
    "evaluate_attack": "rs_plugins.core.attacks.evaluation",
    "load_trained": "rs_plugins.core.training.trained",
    "smooth_activations": "rs_plugins.core.activation_replacement.converting",
}
_EXTRA = {"rs_plugins_art": "art", "rs_plugins_torchattacks": "torchattacks"}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    """Import a public name from the module that defines it (PEP 562)."""
    if name not in _HOME:
        raise AttributeError(f"module 'rs_plugins' has no attribute {name!r}; it offers {', '.join(__all__)}")
    try:
        value = getattr(import_module(_HOME[name]), name)
    except ModuleNotFoundError as error:
        extra = _EXTRA.get(_HOME[name].partition(".")[0])
        if extra is None or error.name is None or error.name.startswith("rs_plugins"):
            raise
        from rs_plugins.errors import MissingDependencyError

        raise MissingDependencyError(
            f"rs_plugins.{name} needs {error.name!r}, which is not installed: pip install 'rs-plugins[{extra}]'"
        ) from error
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
