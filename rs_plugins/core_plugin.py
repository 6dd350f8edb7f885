"""The library's own core, registered through the same hooks as anybody's plugin."""

from rs_plugins.hookspecs import Component, hookimpl


@hookimpl
def rs_plugins_components() -> list[Component]:
    """Name the components of `rs_plugins.core`."""
    return [
        Component("certifier", "fixed-budget", "rs_plugins.core.plans.fixed_budget:FixedBudget"),
        Component("noise", "gaussian", "rs_plugins.core.noise:GaussianNoise"),
    ]
