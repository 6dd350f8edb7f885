import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import nn

from rs_plugins.cli import main
from rs_plugins.core.attacks.evaluation import evaluate_attack
from rs_plugins.core.data_sets.opening import open_data_set
from rs_plugins.core.results.files import read_results
from rs_plugins.core.smoothing import SmoothedModel
from rs_plugins_torchattacks.attacks import SmoothAdvPGD

MODELS = """
import os, time, torch
from torch import nn
def linear():
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 4))
def slow():
    class Slow(nn.Sequential):
        def forward(self, x):
            if os.path.exists("slow"):
                time.sleep(0.01)
            return super().forward(x)
    return Slow(nn.Flatten(), nn.Linear(16, 4))
def fails():
    class Fails(nn.Sequential):
        def forward(self, x):
            if x.requires_grad:
                torch.zeros(3) + torch.zeros(4)
            return super().forward(x)
    return Fails(nn.Flatten(), nn.Linear(16, 4))
def interrupted():
    raise KeyboardInterrupt
"""
COMMAND = (
    "attack --model my_models:linear --weights w.pt --data npz:squares.npz --sigma 0.25 --n 200 --device cpu "
    "--attack SmoothAdvPGD:eps=0.5,steps=3,samples=4 --out out"
)


def network():
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 4))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with a model's code, its weights and data, as the current one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "my_models", raising=False)
    (tmp_path / "my_models.py").write_text(MODELS)
    images = np.random.default_rng(0).integers(0, 256, (12, 4, 4), dtype=np.uint8)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        weights = network().state_dict()
    torch.save({name: 4 * value for name, value in weights.items()}, "w.pt")
    model = network()
    model.load_state_dict(torch.load("w.pt"))
    labels = model(torch.from_numpy(images / 255).float()).argmax(1)
    np.savez("squares.npz", images=images, labels=labels.numpy())
    return tmp_path


def invoke(command, *more):
    return CliRunner().invoke(main, [*shlex.split(command), *more])


def written(name="out"):
    return json.loads(Path(name, "evaluation.json").read_text())


@pytest.mark.usefixtures("folder")
def test_an_attack_is_made_judged_and_kept():
    result = invoke(COMMAND)
    assert result.exit_code == 0, result.output
    data, model = open_data_set("npz:squares.npz"), network()
    model.load_state_dict(torch.load("w.pt"))
    smoothed, x = SmoothedModel(model.eval(), 0.25), data.read(range(12))
    attacked = SmoothAdvPGD(smoothed, eps=0.5, steps=3, samples=4)(x, torch.from_numpy(data.labels))
    expected = evaluate_attack(smoothed, x, attacked, data.labels, n=200)
    assert written()["figures"] == json.loads(json.dumps(expected.as_dict()["figures"]))
    assert expected.after.share.mean() < expected.before.share.mean() - 0.05
    assert result.stdout == (
        f"SmoothAdvPGD:eps=0.5,steps=3,samples=4 on 12 images\n\n{expected}\n\n"
        "  out/adversarial.npz\n  out/evaluation.json\n  out/attack.png\n"
    )
    assert result.stderr == ""
    again = open_data_set("npz:out/adversarial.npz")
    torch.testing.assert_close(again.read(range(12)), attacked, atol=1e-6, rtol=0)
    assert Path("out/attack.png").read_bytes().startswith(b"\x89PNG")
    made = written()["made_with"]
    assert (made["attack"], made["options"], made["on"], made["samples"]) == (
        "torchattacks.SmoothAdvPGD",
        {"eps": 0.5, "steps": 3, "samples": 4},
        "smoothed",
        32,
    )


@pytest.mark.usefixtures("folder")
def test_what_was_written_can_be_certified():
    assert invoke(COMMAND, "--stop", "3").exit_code == 0
    command = "certify --model my_models:linear --weights w.pt --data npz:out/adversarial.npz --sigma 0.25"
    assert invoke(command, "--plan", "fixed:n=100", "--out", "log.tsv", "--device", "cpu").exit_code == 0
    assert len(read_results("log.tsv")) == 3


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("more", "indices"),
    [(["--start", "9"], [9, 10, 11]), (["--stop", "2"], [0, 1]), (["--skip", "5"], [0, 5, 10])],
)
def test_options_choose_images(more, indices):
    assert invoke(COMMAND, *more).exit_code == 0
    assert written()["images"]["index"] == indices


@pytest.mark.usefixtures("folder")
def test_options_reach_the_judge():
    assert invoke(COMMAND, "--alpha", "0.01", "--confidence", "0.8", "--seed", "5", "--stop", "4").exit_code == 0
    settings = written()["settings"]
    assert settings == {"images": 4, "votes": 200, "sigma": 0.25, "alpha": 0.01, "confidence": 0.8, "seed": 5}


@pytest.mark.usefixtures("folder")
def test_options_reach_the_attack():
    assert invoke(COMMAND, "--stop", "4").exit_code == 0
    images = np.load("out/adversarial.npz")["images"]
    for name, more, same in [
        ("batch", ["--batch-size", "1"], True),
        ("base", ["--on", "base"], True),  # ours takes the sigma of the command
        ("samples", ["--samples", "7"], True),  # and has an option of its own for samples
        ("eps", ["--attack", "SmoothAdvPGD:eps=0.1,steps=3,samples=4"], False),
    ]:
        assert invoke(COMMAND, "--stop", "4", "--out", name, *more).exit_code == 0
        other = np.load(f"{name}/adversarial.npz")["images"]
        assert np.allclose(images, other, atol=1e-6) == same


@pytest.mark.usefixtures("folder")
def test_attacks_of_torchattacks_see_the_smoothing_with_that_many_draws():
    found = {}
    for name, more in {"32": [], "4": ["--samples", "4"], "again": [], "base": ["--on", "base"]}.items():
        command = COMMAND.replace("SmoothAdvPGD:eps=0.5,steps=3,samples=4", "torchattacks.PGDL2:eps=0.5,steps=3")
        assert invoke(command, "--stop", "4", "--out", name, *more).exit_code == 0
        found[name] = np.load(f"{name}/adversarial.npz")["images"]
    assert np.array_equal(found["32"], found["again"])  # though it draws its start from the global generator
    assert not np.allclose(found["32"], found["4"], atol=1e-4)
    assert not np.allclose(found["32"], found["base"], atol=1e-4)


@pytest.mark.usefixtures("folder")
def test_arts_attack():
    result = invoke(COMMAND, "--attack", "art.SmoothAdvPGD:eps=0.5,max_iter=3,samples=4", "--stop", "4")
    assert result.exit_code == 0, result.output
    assert invoke(COMMAND, "--stop", "4", "--out", "other").exit_code == 0
    images, others = (np.load(f"{name}/adversarial.npz")["images"] for name in ("out", "other"))
    assert np.allclose(images, others, atol=1e-5)


@pytest.mark.usefixtures("folder")
def test_an_infinite_option_is_text_in_the_record():
    command = [*shlex.split(COMMAND), "--attack", "art.SmoothAdvPGD:eps=1/2,norm=inf,max_iter=2,samples=2"]
    result = CliRunner().invoke(main, [*command, "--stop", "2"])
    assert result.exit_code == 0, result.output
    options = {"eps": 0.5, "norm": "inf", "max_iter": 2, "samples": 2}
    assert written()["made_with"]["options"] == options
    assert json.loads(Path("out/settings.json").read_text(), parse_constant=pytest.fail)["options"] == options
    assert written()["images"]["linf"] == pytest.approx([0.5, 0.5], abs=1e-5)
    result = CliRunner().invoke(main, [*command, "--resume"])
    assert result.exit_code == 0, result.output


@pytest.mark.usefixtures("folder")
def test_a_third_partys_attack_and_what_it_claims(site, monkeypatch):
    from rs_plugins import registry

    site.plugin(
        "theirs", "@hookimpl\ndef rs_plugins_components():\n    return [Component('attack', 'Dark', 'dark:Dark')]"
    )
    site.write(
        "dark.py",
        """
        class Dark:
            def __init__(self, model, by=0.5):
                self.by, self.success = by, None
            def __call__(self, images, labels):
                self.success = labels < 9
                return images * self.by
        """,
    )
    monkeypatch.setattr(registry, "_DEFAULT", registry.Registry(site.entry_points()))
    result = invoke(COMMAND, "--attack", "Dark:by=0.9")
    assert result.exit_code == 0, result.output
    figures = written()["figures"]
    wrong, undecided = (figures[f"{name}_after"]["count"] for name in ("wrong", "abstained"))
    judged = f"another class {wrong}, undecided {undecided}, still the label {12 - wrong - undecided}"
    assert f"\nthe attack itself claims 12 successes; judged: {judged}\n" in result.stdout
    images = open_data_set("npz:squares.npz").read(range(12)).numpy()[:, 0]
    assert np.allclose(np.load("out/adversarial.npz")["images"], images * 0.9, atol=1e-6)


@pytest.mark.usefixtures("folder")
def test_a_folder_is_gone_on_with_on_request():
    assert invoke(COMMAND, "--stop", "5").exit_code == 0
    result = invoke(COMMAND)
    assert result.exit_code == 1
    assert "Error: out: it holds adversarial.npz; to go on with it use resume (--resume)" in result.output
    assert invoke(COMMAND, "--resume").exit_code == 0
    assert invoke(COMMAND, "--out", "whole").exit_code == 0
    assert Path("out/adversarial.npz").read_bytes() == Path("whole/adversarial.npz").read_bytes()
    result = invoke(COMMAND, "--resume", "--attack", "SmoothAdvPGD:eps=0.6")
    assert "Error: out: begun by another run (options: {'eps': 0.5, 'steps': 3, 'samples': 4} -> " in result.output


@pytest.mark.usefixtures("folder")
def test_another_batch_size_goes_on_with_attacks_of_ours_alone():
    for name, options in {
        "torchattacks.PGDL2": "steps=1",
        "SmoothAdvPGD": "steps=1",
        "art.SmoothAdvPGD": "max_iter=1",
    }.items():
        more = ["--attack", f"{name}:{options}", "--out", name]
        assert invoke(COMMAND, *more, "--stop", "2").exit_code == 0
        result = invoke(COMMAND, *more, "--stop", "4", "--resume", "--batch-size", "2")
        if name == "torchattacks.PGDL2":
            assert f"Error: {name}: begun by another run (batch_size: 64 -> 2); choose another folder" in result.output
            result = invoke(COMMAND, *more, "--stop", "4", "--resume")
        assert result.exit_code == 0, result.output


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--attack", "Smooth"], "attack: expected one of art."),
        (
            ["--attack", "SmoothAdvPGD:epz=1"],
            "attack: torchattacks.SmoothAdvPGD has no option 'epz'; it has eps, alpha",
        ),
        (
            ["--attack", "SmoothAdvPGD:sigma=1"],
            "sigma: expected 0.25, which the SmoothedModel brings, or None; got 1.0",
        ),
        (["--attack", "art.SmoothAdvPGD", "--on", "base"], "on: art.SmoothAdvPGD attacks the smoothed classifier only"),
        (["--attack", "art.SmoothAdvPGD:norm=1"], "norm: expected "),
        (["--attack", "art.SmoothAdvPGD:targeted=true"], "attack: art.SmoothAdvPGD is set up as targeted: it would"),
        (["--samples", "0"], "samples: expected an integer >= 1, got 0"),
        (["--pictures", "-1"], "pictures: expected an integer >= 0, got -1"),
        (["--batch-size", "0"], "batch_size: expected an integer >= 1, got 0"),
        (["--n", "5"], "n: 5 votes are too few at alpha = 0.001"),
        (["--sigma", "0"], "sigma: expected a finite number > 0, got 0"),
        (["--model", "nowhere:net"], "model: cannot import nowhere"),
        (["--data", "mnist:."], "data: mnist: expected one of these files, found none"),
        (["--split", "train"], "split: npz has no parts"),
        (["--image-size", "32"], "image_size: only for imagefolder, got it with npz"),
        (["--start", "12"], "selection: expected at least one image, got none of 12"),
        (["--device", "abacus"], "device: expected a device of this machine, got 'abacus'"),
        (["--out", "no/where"], "out: there is no folder no"),
    ],
)
def test_mistakes_are_one_line_and_no_folder(more, message):
    result = invoke(COMMAND, *more)
    assert result.exit_code == 1
    assert f"Error: {message}" in result.output
    assert not Path("out").exists()


@pytest.mark.usefixtures("folder")
def test_the_attack_is_looked_up_before_anything_is_read():
    result = invoke(COMMAND, "--attack", "Smooth", "--data", "mnist:nowhere", "--model", "nowhere:net")
    assert "Error: attack: expected one of" in result.output


@pytest.mark.usefixtures("folder")
def test_what_an_attack_or_a_model_raises_is_a_line_and_the_place():
    result = invoke(COMMAND, "--attack", "torchattacks.APGD:norm=L7")
    assert (result.exit_code, result.stderr) == (
        1,
        "Error: attack torchattacks.APGD: it fails: AssertionError: no message\n",
    )
    result = invoke(COMMAND, "--model", "my_models:fails")
    assert result.exit_code == 1
    line = 1 + MODELS.splitlines().index("                torch.zeros(3) + torch.zeros(4)")
    assert ": it fails: RuntimeError: The size of tensor a (3) must match" in result.stderr
    assert f"\n  my_models.py:{line}, in forward: torch.zeros(3) + torch.zeros(4)\n" in result.stderr


@pytest.mark.usefixtures("folder")
@pytest.mark.filterwarnings("default::rs_plugins.errors.RSPluginsWarning")
def test_without_matplotlib_there_is_no_picture(monkeypatch):
    import rs_plugins.cli.attack as verb

    find_spec = verb.find_spec
    monkeypatch.setattr(verb, "find_spec", lambda name: None if name == "matplotlib" else find_spec(name))
    result = invoke(COMMAND, "--stop", "1")
    assert result.exit_code == 0
    assert result.stderr == "warning: attack.png needs matplotlib: pip install 'rs-plugins[plots]'\n"
    assert "attack.png" not in result.stdout
    assert not Path("out/attack.png").exists()


@pytest.mark.usefixtures("folder")
def test_no_picture_on_request():
    result = invoke(COMMAND, "--stop", "1", "--pictures", "0")
    assert (result.exit_code, result.stderr) == (0, "")
    assert not Path("out/attack.png").exists()


@pytest.mark.usefixtures("folder")
def test_the_table_is_shown_though_the_picture_cannot_be_written():
    Path("out/attack.png").mkdir(parents=True)
    result = invoke(COMMAND, "--stop", "2")
    assert result.exit_code == 1
    assert result.stdout.startswith("SmoothAdvPGD:eps=0.5,steps=3,samples=4 on 2 images\n\n")
    assert result.stdout.endswith("\n\n  out/adversarial.npz\n  out/evaluation.json\n")
    assert result.stderr == "Error: out/attack.png: cannot be written (Is a directory); the rest is complete\n"
    Path("out/attack.png").rmdir()
    assert invoke(COMMAND, "--stop", "2", "--resume").stdout == result.stdout + "  out/attack.png\n"


@pytest.mark.usefixtures("folder")
def test_the_picture_shows_successes_first(monkeypatch):
    shown = []
    monkeypatch.setattr("rs_plugins.plots.save_attacked_images", lambda path, rows: shown.extend(rows))
    assert invoke(COMMAND, "--pictures", "12", "--attack", "SmoothAdvPGD:eps=2").exit_code == 0
    found = written()["images"]
    rows = zip(*(found[k] for k in ("label", "prediction_before", "prediction_after", "l2")), strict=True)
    turned, others = [], []
    for label, before, after, l2 in rows:
        (turned if before == label and after not in (-1, label) else others).append((label, before, after, l2))
    assert turned
    assert others
    assert [(s.label, s.before, s.after, s.l2) for s in shown] == [*turned, *others]
    assert all(np.linalg.norm(s.attacked - s.clean) == pytest.approx(s.l2, abs=1e-5) for s in shown)


@pytest.mark.usefixtures("folder")
def test_interrupted_before_the_first_image():
    result = invoke(COMMAND, "--model", "my_models:interrupted")
    assert result.exit_code == 130
    assert "stopped; no image is done yet; go on with the same command and --resume" in result.stderr


@pytest.mark.slow
def test_ctrl_c(folder):
    """In a process of its own, with a real signal."""
    words = [sys.executable, "-c", "from rs_plugins.cli import main; main()", *shlex.split(COMMAND)]
    words = [word.replace("my_models:linear", "my_models:slow") for word in words] + ["--batch-size", "2"]
    (folder / "slow").touch()
    process = subprocess.Popen(words, cwd=folder, stderr=subprocess.PIPE, text=True, env=os.environ)
    parts = folder / "out" / "parts"
    while not list(parts.glob("*.npz")):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 130
    (stopped,) = re.findall(r"stopped; (\d+) images are in out; go on with the same command and --resume", errors)
    assert 2 <= int(stopped) < 12
    (folder / "slow").unlink()
    done = subprocess.run([*words, "--resume"], cwd=folder, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    assert len(written()["images"]["index"]) == 12


def test_help_has_an_example_and_loads_neither_torch_nor_numpy():
    result = invoke("attack --help")
    assert result.exit_code == 0
    assert "Example: rs-plugins attack " in " ".join(result.output.split())
    code = """
import sys
from rs_plugins.cli import attack
assert not {"torch", "numpy", "scipy", "torchattacks", "art"} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    assert "  attack " in invoke("--help").output
