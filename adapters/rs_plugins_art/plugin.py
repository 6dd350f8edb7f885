"""What this host adapter offers to ART, as data: imports neither ART nor torch."""

from rs_plugins.hookspecs import Component, Export, hookimpl

_CLASSIFIER = "rs_plugins_art.classifier:SmoothedClassifier"
_PGD = "rs_plugins_art.attacks:SmoothAdvPGD"


@hookimpl
def rs_plugins_components() -> list[Component]:
    """Name the ART estimators and attacks."""
    return [
        Component("estimator", "art.SmoothedClassifier", _CLASSIFIER),
        Component("attack", "art.SmoothAdvPGD", _PGD),
    ]


@hookimpl
def rs_plugins_exports() -> list[Export]:
    """Place them where ART's users look for such names."""
    return [
        Export("art.estimators.classification", "SmoothedClassifier", _CLASSIFIER),
        Export("art.estimators.certification", "SmoothedClassifier", _CLASSIFIER),
        Export("art.estimators.certification.randomized_smoothing", "SmoothedClassifier", _CLASSIFIER),
        Export("art.attacks.evasion", "SmoothAdvPGD", _PGD),
    ]
