"""What can go wrong, one class per kind of mistake, so that callers can catch exactly what they mean."""


class RSPluginsError(Exception):
    """Base of every error that rs-plugins raises on purpose."""


class InputError(RSPluginsError, ValueError):
    """An argument has a value that makes no sense: wrong shape, range, dtype, or a NaN."""


class ModelError(RSPluginsError, ValueError):
    """The model does not behave as a classifier of (n, classes) finite logits on the given inputs."""


class DivergedError(ModelError):
    """Training left the finite numbers: the loss or a weight is NaN or infinite."""


class ResultsError(RSPluginsError, ValueError):
    """A results file cannot be read, or belongs to another run."""


class WorkerError(RSPluginsError, RuntimeError):
    """The workers of a job cannot be started, are not alike, or end again and again."""


class PluginError(RSPluginsError):
    """A plugin cannot be loaded, has a wrong hook signature, or raised."""


class UnknownNameError(PluginError, LookupError):
    """No plugin offers a component of that name."""


class MissingDependencyError(RSPluginsError, ImportError):
    """An optional package is needed for what was asked; the message says how to install it."""


class RSPluginsWarning(UserWarning):
    """Base of every warning that rs-plugins issues."""


class PluginWarning(RSPluginsWarning):
    """A plugin was left out, or one of its exports could not be placed."""


class ModelWarning(RSPluginsWarning):
    """The model returned something that cannot be counted as a vote, such as NaN logits."""


class ResultsWarning(RSPluginsWarning):
    """A results file is usable but something in it was left out, such as a line cut off by a crash."""
