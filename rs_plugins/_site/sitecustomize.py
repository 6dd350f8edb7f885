"""Activates rs-plugins in every Python process that has this folder on its PYTHONPATH.

`rs-plugins run` puts it there. Python imports ``sitecustomize`` before the user's program; only one module of that name
is found, so the one which this one hides is run first.
"""

import importlib.machinery
import importlib.util
import os
import sys


def _run_hidden_sitecustomize() -> None:
    """Execute the next ``sitecustomize`` on the path, under its own name, as Python would have done."""
    here = os.path.realpath(os.path.dirname(__file__))
    others = [entry for entry in sys.path if os.path.realpath(entry or os.curdir) != here]
    spec = importlib.machinery.PathFinder.find_spec("sitecustomize", others)
    if spec is None or spec.loader is None:
        return
    module = importlib.util.module_from_spec(spec)
    sys.modules["sitecustomize"] = module
    spec.loader.exec_module(module)


def _activate() -> None:
    """Activate and stay so. An interpreter in which rs-plugins is not installed is none of our business."""
    try:
        from rs_plugins.activation import hold
        from rs_plugins.errors import PluginError
    except ImportError as error:
        if error.name != "rs_plugins":
            sys.stderr.write(f"rs-plugins: not activated: {error}\n")
        return
    try:
        hold()
    except Exception as error:
        sys.stderr.write(f"rs-plugins: not activated: {error}\n")
        if isinstance(error, PluginError):  # only raised under RS_PLUGINS_STRICT
            sys.stderr.flush()
            os._exit(1)  # Python swallows what is raised here, and calls SystemExit a fatal error of its own


try:
    _run_hidden_sitecustomize()
finally:
    _activate()
