"""A connection to Ray: to a cluster that runs, or to one on this machine that ends with the job.

Ray sends statistics of its use to its makers unless told otherwise. The cluster that is started here is told so, has no
dashboard, a password of its own, and leaves no files.
"""

import logging
import os
import secrets
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any

from rs_plugins.errors import InputError, MissingDependencyError, WorkerError

STORE = (
    2**27
)  # bytes of Ray's object store: for images under way and the model, which may be larger and then go to disk
_LONG = 30  # characters of the path of temporary files that leave room for Ray's sockets, which may have about 100
_TRIES = 10  # to take away the files of a local cluster


def import_ray() -> Any:
    """Return the module ray.

    Raises:
        MissingDependencyError: If it is not installed.
    """
    try:
        import ray
    except ImportError as error:
        raise MissingDependencyError(
            f'engine: ray is not installed ({error}); install it with: pip install "rs-plugins[ray]"'
        ) from None
    return ray


@contextmanager
def connected(address: str | None, *, cpus: int, gpus: bool) -> Iterator[Any]:
    """Be connected to the cluster at ``address`` inside the block, or to a local one that is shut down afterwards.

    Where this process is connected to a cluster already, that one is used, and stays.

    Args:
        address: That of a cluster, as Ray writes it, such as ``"auto"`` or ``"10.0.0.1:6379"``; None for a local one.
        cpus: How many processors a local one says it has.
        gpus: Whether a local one may use the GPUs of this machine.

    Raises:
        InputError: If an address is given and this process is connected already.
        MissingDependencyError: If Ray is not installed.
        WorkerError: If there is no cluster there, or none can be started.
    """
    ray = import_ray()
    if ray.is_initialized():
        if address is not None:
            raise InputError(f"address: expected none, as this process is connected to Ray already, got {address!r}")
        yield ray
        return
    with _environment(address), _signals_restored(), _folder() as folder:
        local = {"num_cpus": cpus, "include_dashboard": False, "object_store_memory": STORE, "_temp_dir": folder}
        local |= {"_node_ip_address": "127.0.0.1"} | ({} if gpus else {"num_gpus": 0})
        try:
            _init(ray, address, {} if address is not None else local)
            yield ray
        finally:
            ray.shutdown()  # also of what was started in vain


def _init(ray: Any, address: str | None, settings: Mapping[str, Any]) -> None:
    """Connect, without a word on the terminal."""
    logger = logging.getLogger("ray")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        ray.init(address or "local", log_to_driver=False, configure_logging=False, **settings)
    except Exception as error:  # Ray raises many kinds, plain ones among them
        what = "no cluster could be started here" if address is None else f"no cluster answers at {address}"
        why = f"ray: {what}: {' '.join(str(error).split())}"
        if address is None:
            why += "; the machine may be too busy: try again, or leave the engine away (--engine)"
        raise WorkerError(why) from error
    finally:
        logger.setLevel(before)


@contextmanager
def _folder() -> Iterator[str]:
    """Make a folder for the files of a local cluster, and take it away afterwards."""
    short = None if len(tempfile.gettempdir()) < _LONG else "/tmp"
    folder = tempfile.mkdtemp(prefix="rs-", dir=short)
    try:
        yield folder
    finally:
        for _ in range(_TRIES):  # a process of Ray may write once more while it ends
            shutil.rmtree(folder, ignore_errors=True)
            if not os.path.exists(folder):
                break
            time.sleep(0.2)


@contextmanager
def _environment(address: str | None) -> Iterator[None]:
    """Set what a local cluster reads from the environment; afterwards, put back what Ray may have changed."""
    wanted = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1"}
    if "RAY_AUTH_TOKEN" not in os.environ and "RAY_AUTH_TOKEN_PATH" not in os.environ:
        wanted["RAY_AUTH_TOKEN"] = _token()  # else Ray writes one into the user's home
    before = dict(os.environ)
    if address is None:
        os.environ.update(wanted)
    try:
        yield
    finally:
        changed = {*before.items()} ^ {*os.environ.items()}
        for name in {name for name, _ in changed if name.startswith("RAY_") or name == "PYTHONBREAKPOINT"}:
            if name in before:
                os.environ[name] = before[name]
            else:
                del os.environ[name]


@cache
def _token() -> str:
    """Return the password of the local clusters of this process, of which Ray remembers the first."""
    return secrets.token_hex(32)


@contextmanager
def _signals_restored() -> Iterator[None]:
    """Put back what the process does on SIGTERM, which Ray changes."""
    main = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGTERM) if main else None
    try:
        yield
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)
