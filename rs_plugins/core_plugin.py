"""The library's own core, registered through the same hooks as anybody's plugin."""

from rs_plugins.hookspecs import Component, hookimpl


@hookimpl
def rs_plugins_components() -> list[Component]:
    """Name the components of `rs_plugins.core`."""
    return [
        Component("certifier", "anytime", "rs_plugins.core.plans.anytime:Anytime"),
        Component("certifier", "at-radius", "rs_plugins.core.plans.at_radius:AtRadius"),
        Component("certifier", "fixed-budget", "rs_plugins.core.plans.fixed_budget:FixedBudget"),
        Component("certifier", "on-grid", "rs_plugins.core.plans.on_grid:OnGrid"),
        Component("noise", "gaussian", "rs_plugins.core.noise:GaussianNoise"),
    ]
