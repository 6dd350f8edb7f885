"""Activates the plugins for a test run: ``pytest -p rs_plugins.pytest_plugin``.

``-p`` may also stand in ``addopts``, and ``PYTEST_PLUGINS=rs_plugins.pytest_plugin`` does the same. It is not
registered under ``pytest11``: that would load it into every test run of the environment.
"""

from typing import Any

import pluggy

from rs_plugins.activation import hold

_hookimpl = pluggy.HookimplMarker("pytest")


@_hookimpl(tryfirst=True)
def pytest_load_initial_conftests(early_config: Any) -> None:
    """Activate before any ``conftest.py`` is imported: one may look our names up while it is."""
    early_config.add_cleanup(hold())


@_hookimpl(tryfirst=True)
def pytest_configure(config: Any) -> None:
    """Activate also where the plugin is named too late for the hook above, in a ``pytest_plugins`` variable."""
    config.add_cleanup(hold())
