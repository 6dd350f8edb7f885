"""What this host adapter offers to torchattacks, as data: imports neither torchattacks nor torch."""

from rs_plugins.hookspecs import Component, Export, hookimpl

_ATTACKS = ("SmoothAdvPGD", "SmoothAdvLinfPGD", "SmoothAdvDDN")
_HOME = "rs_plugins_torchattacks.attacks"


@hookimpl
def rs_plugins_components() -> list[Component]:
    """Name the attacks."""
    return [Component("attack", f"torchattacks.{name}", f"{_HOME}:{name}") for name in _ATTACKS]


@hookimpl
def rs_plugins_exports() -> list[Export]:
    """Place them into the torchattacks namespace."""
    return [Export("torchattacks", name, f"{_HOME}:{name}") for name in _ATTACKS]
