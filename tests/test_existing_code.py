"""Unedited third-party code finds our names under `rs-plugins run`, and fails under plain python where it looks."""

import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "existing_code"
BIN = Path(sys.executable).parent
TORCHRUN = ("torchrun", "--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node", "2")

ARTS_TRAINERS = ["AdversarialTrainerMadryPGD", "AdversarialTrainerTRADESPyTorch", "AdversarialTrainerFBFPyTorch"]

# script → (its arguments, what plain python says)
SCRIPTS = {
    "ta_getattr.py": (
        ["--attack", "SmoothAdvPGD"],
        "AttributeError: module 'torchattacks' has no attribute 'SmoothAdvPGD'",
    ),
    "ta_from_import.py": ([], "ImportError: cannot import name 'SmoothAdvPGD' from 'torchattacks'"),
    "ta_star_import.py": ([], "NameError: name 'SmoothAdvPGD' is not defined"),
    "ta_dict.py": ([], "KeyError: 'SmoothAdvPGD'"),
    "ta_vars_choices.py": (["--attack", "SmoothAdvPGD"], "argument --attack: invalid choice: 'SmoothAdvPGD'"),
    "ta_in_all.py": ([], "ValueError: unknown attack SmoothAdvPGD"),
    "ta_eval_all.py": ([], "KeyError: 'SmoothAdvPGD'"),
    "ta_getmembers.py": ([], "KeyError: 'SmoothAdvPGD'"),
    "ta_multiattack.py": ([], "AttributeError: module 'torchattacks' has no attribute 'SmoothAdvPGD'"),
    "ta_subprocess.py": ([], "AttributeError: module 'torchattacks' has no attribute 'SmoothAdvPGD'"),
    "ta_spawn_pool.py": ([], "AttributeError: module 'torchattacks' has no attribute 'SmoothAdvPGD'"),
    "ta_torchrun.py": ([], "AttributeError: module 'torchattacks' has no attribute 'SmoothAdvPGD'"),
    "art_getattr.py": (
        ["SmoothAdvPGD", '{"sigma": 0.25, "eps": 0.5}'],
        "AttributeError: module 'art.attacks.evasion' has no attribute 'SmoothAdvPGD'",
    ),
    "art_trainer.py": (
        ["SmoothMixTrainer", "SmoothAdvTrainer"],
        "AttributeError: module 'art.defences.trainer' has no attribute 'SmoothMixTrainer'",
    ),
    "art_adversarial_training.py": (
        [*ARTS_TRAINERS, "SATTrainer"],
        "AttributeError: module 'art.defences.trainer' has no attribute 'SATTrainer'",
    ),
    "art_interval.py": (
        ["BoundsClassifier", "GlsTrainer"],
        "AttributeError: module 'art.estimators.certification.interval' has no attribute 'BoundsClassifier'",
    ),
    "art_config.py": (
        [],
        "AttributeError: module 'art.estimators.classification' has no attribute 'SmoothedClassifier'",
    ),
    "art_classification.py": (
        [],
        "ImportError: cannot import name 'SmoothedClassifier' from 'art.estimators.classification'",
    ),
    "art_certifying_adapter.py": (
        [],
        "AttributeError: module 'art.estimators.classification' has no attribute 'CertifyingAdapterClassifier'",
    ),
    "art_certification.py": ([], "module 'art.estimators.certification' has no attribute 'SmoothedClassifier'"),
    "art_randomized_smoothing.py": ([], "ImportError: cannot import name 'SmoothedClassifier'"),
}


def command(script: str) -> list[str]:
    """Return the words after ``rs-plugins run``."""
    arguments = [str(FOLDER / script), *SCRIPTS[script][0]]
    return [*TORCHRUN, *arguments] if script == "ta_torchrun.py" else arguments


def plainly(script: str) -> list[str]:
    words = command(script)
    return [str(BIN / "torchrun"), *words[1:]] if words[0] == "torchrun" else [sys.executable, *words]


def execute(words: list[str]) -> subprocess.CompletedProcess[str]:
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environ |= {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    return subprocess.run(words, cwd="/", env=environ, capture_output=True, text=True, timeout=600)


ALWAYS = ("ta_getattr.py", "art_trainer.py")  # the others start as many processes


@pytest.mark.parametrize(
    "script", [script if script in ALWAYS else pytest.param(script, marks=pytest.mark.slow) for script in SCRIPTS]
)
def test_existing_code(script):
    with ThreadPoolExecutor(2) as pool:
        plain = pool.submit(execute, plainly(script))
        activated = pool.submit(execute, [str(BIN / "rs-plugins"), "run", *command(script)])
    done = activated.result()
    assert done.returncode == 0, done.stdout + done.stderr
    failed = plain.result()
    assert failed.returncode != 0, failed.stdout
    assert SCRIPTS[script][1] in failed.stderr, failed.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "names"),
    [
        ("art_interval.py", ["PyTorchIBPClassifier", "AdversarialTrainerCertifiedIBPPyTorch"]),
        ("art_adversarial_training.py", ARTS_TRAINERS),
    ],
    ids=["interval", "adversarial"],
)
def test_a_script_for_arts_own_classes_runs_with_them(script, names):
    done = execute([sys.executable, str(FOLDER / script), *names])
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_script_is_run_and_none_knows_of_us():
    files = {path.name: path.read_text() for path in FOLDER.glob("*.py")}
    assert set(files) - {"victim.py"} == set(SCRIPTS)
    assert [name for name, text in files.items() if re.search(r"rs.plugins", text)] == []
