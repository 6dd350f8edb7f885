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
        Component("noise", "gaussian-linf", "rs_plugins.core.noise_families.gaussian_linf:GaussianLinfNoise"),
        Component("noise", "laplace", "rs_plugins.core.noise_families.laplace:LaplaceNoise"),
        Component("noise", "lattice-gaussian", "rs_plugins.core.noise_families.lattice:LatticeGaussianNoise"),
        Component("noise", "uniform", "rs_plugins.core.noise_families.uniform:UniformNoise"),
        Component("noise", "uniform-linf", "rs_plugins.core.noise_families.uniform:UniformLinfNoise"),
        Component("trainer", "consistency", "rs_plugins.core.training.consistency:Consistency"),
        Component("trainer", "gaussian", "rs_plugins.core.training.gaussian:Gaussian"),
        Component("trainer", "gls", "rs_plugins.core.training.gls:Gls"),
        Component("trainer", "macer", "rs_plugins.core.training.macer:Macer"),
        Component("trainer", "sat", "rs_plugins.core.training.sat:Sat"),
        Component("trainer", "smoothadv", "rs_plugins.core.training.smoothadv:SmoothAdv"),
        Component("trainer", "smoothmix", "rs_plugins.core.training.smoothmix:SmoothMix"),
        Component("trainer", "stability", "rs_plugins.core.training.stability:Stability"),
        Component("trainer", "stability-confseq", "rs_plugins.core.training.stability:StabilityConfSeq"),
        Component("trainer", "stability-rs4a", "rs_plugins.core.training.stability:StabilityRs4a"),
    ]
