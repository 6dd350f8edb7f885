"""What this host adapter offers to torchattacks, as data: imports neither torchattacks nor torch."""

from rs_plugins.hookspecs import Component, Export, hookimpl

_PGD = "rs_plugins_torchattacks.attacks:SmoothAdvPGD"


@hookimpl
def rs_plugins_components() -> list[Component]:
    """Name the attacks."""
    return [Component("attack", "torchattacks.SmoothAdvPGD", _PGD)]


@hookimpl
def rs_plugins_exports() -> list[Export]:
    """Place them into the torchattacks namespace."""
    return [Export("torchattacks", "SmoothAdvPGD", _PGD)]
