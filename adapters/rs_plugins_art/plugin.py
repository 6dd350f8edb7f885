"""What this host adapter offers to ART, as data: imports neither ART nor torch."""

from rs_plugins.hookspecs import Component, Export, hookimpl

_CLASSIFIER = "rs_plugins_art.classifier:SmoothedClassifier"
_ADAPTED = "rs_plugins_art.certifying_adapter:CertifyingAdapterClassifier"
_BLACK_BOX = "rs_plugins_art.black_box:SmoothedBlackBox"
_BOUNDS = "rs_plugins_art.bounds_classifier:BoundsClassifier"
_ATTACKS = {name: f"rs_plugins_art.attacks:{name}" for name in ("SmoothAdvPGD", "SmoothAdvLinfPGD", "SmoothAdvDDN")}
_TRAINERS = {
    f"{method}Trainer": f"rs_plugins_art.trainers:{method}Trainer"
    for method in ("Consistency", "Gaussian", "Macer", "SmoothAdv", "SmoothMix", "Stability")
} | {
    "GlsTrainer": "rs_plugins_art.bounds_trainer:GlsTrainer",
    "SATTrainer": "rs_plugins_art.sat_trainer:SATTrainer",
}
_ESTIMATORS = (
    "art.estimators.classification",
    "art.estimators.certification",
    "art.estimators.certification.randomized_smoothing",
)
_OF_BOUNDS = (
    "art.estimators.classification",
    "art.estimators.certification",
    "art.estimators.certification.interval",
)


@hookimpl
def rs_plugins_components() -> list[Component]:
    """Name the ART estimators, attacks and trainers."""
    return [
        Component("estimator", "art.SmoothedClassifier", _CLASSIFIER),
        Component("estimator", "art.CertifyingAdapterClassifier", _ADAPTED),
        Component("estimator", "art.SmoothedBlackBox", _BLACK_BOX),
        Component("estimator", "art.BoundsClassifier", _BOUNDS),
        *(Component("attack", f"art.{name}", target) for name, target in _ATTACKS.items()),
        *(Component("trainer", f"art.{name}", target) for name, target in _TRAINERS.items()),
    ]


@hookimpl
def rs_plugins_exports() -> list[Export]:
    """Place them where ART's users look for such names."""
    return [
        *(Export(host, "SmoothedClassifier", _CLASSIFIER) for host in _ESTIMATORS),
        *(Export(host, "CertifyingAdapterClassifier", _ADAPTED) for host in _ESTIMATORS),
        *(Export(host, "SmoothedBlackBox", _BLACK_BOX) for host in _ESTIMATORS),
        *(Export(host, "BoundsClassifier", _BOUNDS) for host in _OF_BOUNDS),
        *(Export("art.attacks.evasion", name, target) for name, target in _ATTACKS.items()),
        *(Export("art.defences.trainer", name, target) for name, target in _TRAINERS.items()),
    ]
