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
from rs_plugins.core.results.files import read_results

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
MODELS = """
import os, time, torch
from torch import nn
def linear():
    return nn.Sequential(nn.Flatten(), nn.Linear(9, 4))
def wide():
    return nn.Sequential(nn.Flatten(), nn.Linear(9, 7))
class Slow(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = linear()
    def forward(self, x):
        while os.path.exists("slow") and os.path.exists("log.tsv") and open("log.tsv").read().count("\\n") >= 3:
            time.sleep(0.01)
        return self.net(x)
def broken():
    raise ValueError("no weights")
def random():
    return linear()
class Fails(nn.Module):
    def __init__(self, after):
        super().__init__()
        self.net, self.left = linear(), after
    def forward(self, x):
        self.left -= os.path.exists("log.tsv") and os.path.getsize("log.tsv") > 300
        if self.left < 0:
            torch.zeros(3) + torch.zeros(4)
        return self.net(x)
def fails():
    torch.manual_seed(0)
    return Fails(0)
def fails_at_once():
    torch.manual_seed(0)
    return Fails(-1)
def interrupted():
    raise KeyboardInterrupt
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with a model's code, its weights and data, as the current one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "my_models", raising=False)
    (tmp_path / "my_models.py").write_text(MODELS)
    images = np.random.default_rng(0).integers(0, 256, (12, 3, 3), dtype=np.uint8)
    np.savez("squares.npz", images=images, labels=np.arange(12) % 4)
    torch.manual_seed(0)
    torch.save(nn.Sequential(nn.Flatten(), nn.Linear(9, 4)).state_dict(), "w.pt")
    return tmp_path


COMMAND = (
    "certify --model my_models:linear --weights w.pt --data npz:squares.npz --sigma 0.5 --plan fixed:n0=10,n=100 "
    "--device cpu --out log.tsv"
)


def invoke(command, *more):
    return CliRunner().invoke(main, [*shlex.split(command), *more])


def record():
    return json.loads(Path("log.tsv.json").read_text())


@pytest.mark.usefixtures("folder")
def test_a_data_set_is_certified():
    result = invoke(COMMAND)
    assert result.exit_code == 0, result.output
    results = read_results("log.tsv")
    assert re.fullmatch(
        r"log.tsv: 12 images, certified [\d.]+%, ACR [\d.]+, abstained [\d.]+%; more with: rs-plugins report log.tsv\n",
        result.stdout,
    )
    assert (
        f"certified {results.certified_accuracy([0])[0]:.2%}, ACR {results.average_certified_radius:.4f}"
        in result.stdout
    )
    assert results.samples.tolist() == [110] * 12
    assert (record()["sigma"], record()["seed"], record()["plan"]) == (0.5, 0, "FixedBudget(n0=10, n=100, alpha=0.001)")
    assert record()["data"] == "npz"
    assert result.stderr == ""


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("more", "indices"),
    [
        (["--start", "5"], [5, 6, 7, 8, 9, 10, 11]),
        (["--stop", "3"], [0, 1, 2]),
        (["--skip", "5"], [0, 5, 10]),
        (["--shard", "1/5"], [1, 6, 11]),
    ],
)
def test_options_choose_images(more, indices):
    assert invoke(COMMAND, *more).exit_code == 0
    assert read_results("log.tsv").idx.tolist() == indices


@pytest.mark.usefixtures("folder")
def test_further_options_reach_the_job():
    result = invoke(COMMAND, "--seed", "7", "--chunk", "0")
    assert result.exit_code == 1
    assert "Error: chunk: expected an integer >= 1, got 0" in result.output
    assert invoke(COMMAND, "--seed", "7", "--chunk", "3", "--quiet").exit_code == 0
    assert (record()["seed"], record()["dtype"]) == (7, "float32")
    assert invoke(COMMAND, "--dtype", "float64", "--out", "double.tsv").exit_code == 0
    assert json.loads(Path("double.tsv.json").read_text())["dtype"] == "float64"
    assert (
        "Error: log.tsv: begun by another run (" in invoke(COMMAND, "--seed", "7", "--channels-last", "--resume").output
    )
    result = invoke(COMMAND, "--seed", "8", "--resume")
    assert result.exit_code == 1
    assert "Error: log.tsv: begun by another run (seed: 7 -> 8); choose another file" in result.output


@pytest.mark.usefixtures("folder")
def test_a_log_is_gone_on_with_on_request():
    assert invoke(COMMAND).exit_code == 0
    whole = Path("log.tsv").read_bytes()
    result = invoke(COMMAND)
    assert result.exit_code == 1
    assert "log.tsv: it exists; to go on with it use resume (--resume), else choose another file" in result.output
    Path("log.tsv").write_bytes(whole[: whole.rindex(b"\n11\t") + 6])
    assert invoke(COMMAND, "--resume").exit_code == 0
    before, after = (re.sub(rb"\d:\d\d:\d\d\.\d{6}", b"", text) for text in (whole, Path("log.tsv").read_bytes()))
    assert before == after


@pytest.mark.usefixtures("folder")
@pytest.mark.filterwarnings("default::rs_plugins.errors.RSPluginsWarning")
def test_shards_are_merged():
    assert invoke(COMMAND, "--out", "whole.tsv").exit_code == 0
    for part in range(3):
        assert invoke(COMMAND, "--out", f"{part}.tsv", "--shard", f"{part}/3").exit_code == 0
    result = invoke("merge 2.tsv 0.tsv 1.tsv --out merged.tsv")
    assert (result.exit_code, result.stdout) == (0, "merged.tsv: 12 images of 3 logs\n")

    def strip(name):
        return re.sub(r"\d:\d\d:\d\d\.\d{6}", "", Path(name).read_text())

    assert strip("merged.tsv") == strip("whole.tsv")
    assert Path("merged.tsv.json").read_bytes() == Path("whole.tsv.json").read_bytes()
    result = invoke("merge 0.tsv 1.tsv --out some.tsv")
    assert result.exit_code == 1
    assert "4 images are missing, the first is image 2, so is shard 2/3; partial (--partial) merges" in result.output
    assert not Path("some.tsv").exists()
    result = invoke("merge 0.tsv 1.tsv --out some.tsv --partial")
    assert (result.exit_code, result.stdout) == (0, "some.tsv: 8 images of 2 logs\n")
    assert "warning: some.tsv: logs: 4 images are missing" in result.stderr
    result = invoke("merge 0.tsv 0.tsv --out twice.tsv")
    assert result.exit_code == 1
    assert "Error: 0.tsv: image 0 is in 0.tsv already" in result.output


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--model", "nowhere:net"], "model: cannot import nowhere: ModuleNotFoundError: No module named 'nowhere'"),
        (["--model", "my_models:square"], "model: my_models has no square; it offers linear, wide, Slow, broken"),
        (["--model", "my_models:broken"], "model: my_models:broken() failed: ValueError: no weights"),
        (["--model", "my_models:wide"], "weights: w.pt: 1.weight: expected shape (7, 9), got (4, 9)"),
        (["--weights", "no.pt"], "weights: there is no file no.pt"),
        (["--data", "mnist:."], "data: mnist: expected one of these files, found none"),
        (["--split", "train"], "split: npz has no parts"),
        (["--image-size", "32"], "image_size: only for imagefolder, got it with npz"),
        (["--sigma", "0"], "sigma: expected a finite number > 0, got 0"),
        (["--plan", "fast"], "plan: expected one of"),
        (["--start", "12"], "selection: expected at least one image, got none of 12"),
        (["--shard", "3/3"], "shard: expected I/N with 0 <= I < N, got 3/3"),
        (["--device", "abacus"], "device: expected a device of this machine, got 'abacus'"),
    ],
)
def test_mistakes_are_one_line_and_no_file(more, message):
    result = invoke(COMMAND, *more)
    assert result.exit_code == 1
    assert f"Error: {message}" in result.output
    assert not Path("log.tsv").exists()


@pytest.mark.usefixtures("folder")
def test_random_weights_are_refused():
    command = COMMAND.replace("--weights w.pt", "")
    result = invoke(command, "--model", "my_models:random")
    assert result.exit_code == 1
    assert result.stderr == "Error: model: my_models:random returns other weights each time; give --weights\n"
    assert not Path("log.tsv").exists()
    Path("my_models.py").write_text(MODELS.replace("def linear():", "def linear():\n    torch.manual_seed(0)"))
    sys.modules.pop("my_models")
    assert invoke(command, "--model", "my_models:random").exit_code == 0


@pytest.mark.usefixtures("folder")
def test_what_a_model_raises_is_a_line_and_the_place():
    reason = "RuntimeError: The size of tensor a (3) must match the size of tensor b (4) at non-singleton dimension 0"
    line = 1 + MODELS.splitlines().index("            torch.zeros(3) + torch.zeros(4)")
    place = f"  my_models.py:{line}, in forward: torch.zeros(3) + torch.zeros(4)\n"
    command = COMMAND.replace("--weights w.pt", "")
    result = invoke(command, "--model", "my_models:fails_at_once")
    assert result.exit_code == 1
    assert result.stderr == f"Error: model: it fails on an input of shape (1, 1, 3, 3): {reason}\n{place}"
    result = invoke(command, "--model", "my_models:fails", "--chunk", "50")
    assert result.exit_code == 1
    assert result.stderr == f"Error: model: it fails: {reason}\n{place}"
    assert 2 <= len(read_results("log.tsv")) < 12


@pytest.mark.usefixtures("folder")
def test_the_place_of_an_error_in_the_function_is_named():
    result = invoke(COMMAND, "--model", "my_models:broken")
    line = 1 + MODELS.splitlines().index('    raise ValueError("no weights")')
    assert f'\n  my_models.py:{line}, in broken: raise ValueError("no weights")\n' in result.stderr


@pytest.mark.usefixtures("folder")
def test_our_own_errors_are_not_those_of_a_model(monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("ours")

    monkeypatch.setattr("rs_plugins.core.job.certify_data_set", fail)
    result = invoke(COMMAND)
    assert str(result.exception) == "ours"


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("plan", "summary"),
    [
        ("at-radius:r=0.1,n=100", r"certified [\d.]+% at 0.1"),
        ("on-grid:radii=0/0.1,n=100", r"certified [\d.]+% at 0, [\d.]+% at 0.1"),
    ],
)
def test_the_summary_knows_the_plan(plan, summary):
    result = invoke(COMMAND, "--plan", plan, "--stop", "1")
    assert re.fullmatch(f"log.tsv: 1 image, {summary}; more with: rs-plugins report log.tsv\n", result.stdout)


@pytest.mark.usefixtures("folder")
def test_a_log_that_can_be_no_file():
    os.mkfifo("pipe")
    for out in ("pipe", os.devnull):
        result = invoke(COMMAND, "--out", out)
        assert result.exit_code == 2
        assert f"expected a file, got {out}, which is something else" in re.sub(r"\s+", " ", result.output)


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("text", ["1", "a/3", "-1/3", "1/"])
def test_a_shard_that_is_none(text):
    result = invoke(COMMAND, "--shard", text)
    assert result.exit_code == 2
    assert f"expected I/N such as 0/4, got '{text}'" in result.output


@pytest.mark.usefixtures("folder")
@pytest.mark.filterwarnings("default::rs_plugins.errors.RSPluginsWarning")
def test_warnings_are_one_line():
    torch.save(nn.Sequential(nn.Flatten(), nn.Linear(9, 4)).state_dict(), "w.pt")
    result = invoke(COMMAND, "--sigma", "30")
    assert result.exit_code == 0
    assert result.stderr == ("warning: sigma: 30 is for pixels in [0, 1]; for noise of 30 in [0, 255] give 0.117647\n")


@pytest.mark.usefixtures("folder")
def test_the_data_options_are_used():
    pytest.importorskip("sklearn")
    Path("my_models.py").write_text(MODELS.replace("Linear(9, 4)", "Linear(64, 10)"))
    torch.save(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).state_dict(), "w.pt")
    command = COMMAND.replace("npz:squares.npz", "digits")
    result = invoke(command, "--split", "train", "--stop", "2")
    assert result.exit_code == 0, result.output
    assert record()["data"] == "digits train"
    assert read_results("log.tsv").label.tolist() == [0, 1]


@pytest.mark.usefixtures("folder")
def test_image_folders_are_scaled():
    Image = pytest.importorskip("PIL.Image")
    for name, size in (("a", (9, 4)), ("b", (5, 5))):
        Path("pictures", name).mkdir(parents=True)
        Image.new("RGB", size).save(f"pictures/{name}/x.png")
    Path("my_models.py").write_text(MODELS.replace("Linear(9, 4)", "Linear(27, 2)"))
    torch.save(nn.Sequential(nn.Flatten(), nn.Linear(27, 2)).state_dict(), "w.pt")
    command = COMMAND.replace("npz:squares.npz", "imagefolder:pictures")
    assert "expected images of one size" in invoke(command).output
    assert invoke(command, "--image-size", "3").exit_code == 0
    assert record()["shape"] == "3x3x3"


@pytest.mark.slow
@pytest.mark.usefixtures("folder")
def test_the_model_is_compiled_on_request():
    result = invoke(COMMAND, "--compile", "--chunk", "16")
    if "needs a C++ compiler" in result.output:
        pytest.skip("torch.compile finds no C++ compiler here")
    assert result.exit_code == 0, result.output
    assert record()["execution"] == "compiled"


@pytest.mark.usefixtures("folder")
def test_interrupted_before_the_first_image():
    result = invoke(COMMAND, "--model", "my_models:interrupted")
    assert result.exit_code == 130
    assert "stopped; no image is done yet; go on with the same command and --resume" in result.stderr


def test_ctrl_c(folder):
    """In a process of its own, with a real signal."""
    command = [sys.executable, "-c", "from rs_plugins.cli import main; main()", *shlex.split(COMMAND)]
    words = [
        word.replace("my_models:linear", "my_models:Slow") for word in command if word not in ("--weights", "w.pt")
    ]
    # without weights each process would make another network
    (folder / "my_models.py").write_text(MODELS.replace("def linear():", "def linear():\n    torch.manual_seed(0)"))
    words += ["--chunk", "128"]
    (folder / "slow").touch()
    process = subprocess.Popen(words, cwd=folder, stderr=subprocess.PIPE, text=True, env=os.environ)
    log = folder / "log.tsv"
    while not (log.exists() and log.read_bytes().count(b"\n") >= 3):  # the header and two images
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 130
    written = len(read_results(log))
    assert f"stopped; {written} images are in log.tsv; go on with the same command and --resume" in errors
    assert 2 <= written < 12
    (folder / "slow").unlink()
    done = subprocess.run([*words, "--resume"], cwd=folder, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    assert len(read_results(log)) == 12


def test_help_has_an_example():
    for verb in ("certify", "merge", "report"):
        result = invoke(f"{verb} --help")
        assert result.exit_code == 0
        assert f"Example: rs-plugins {verb} " in " ".join(result.output.split())


def test_the_example_of_the_readme(tmp_path, monkeypatch):
    """A classifier is saved, then a file's content after ``cat``, then commands."""
    pytest.importorskip("art")
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    section = README.partition("## Certification as a job")[2].partition("\n## ")[0]
    console, *_ = re.findall(r"```console\n(.*?)```", section, flags=re.DOTALL)
    first, *commands = re.split(r"^\$ ", console.replace("\\\n", ""), flags=re.MULTILINE)[1:]
    words, _, source = first.partition("\n")
    Path(words.removeprefix("cat ")).write_text(source)
    from rs_plugins_art.classifier import SmoothedClassifier

    exec(compile(source, "README.md", "exec"), names := {})
    (save,) = re.findall(r"after\s+`(classifier\.save\(.*?\))`", section)
    exec(save, {"classifier": SmoothedClassifier(names["network"](), sigma=0.25)})
    for command in commands:
        result = CliRunner().invoke(main, shlex.split(command.partition("\n")[0], comments=True)[1:])
        assert result.exit_code == 0, result.output
    assert Path("digits.png").read_bytes().startswith(b"\x89PNG")
    assert len(read_results("digits.tsv")) == 297


def test_help_loads_neither_torch_nor_numpy():
    code = """
import sys
from rs_plugins.cli import certify, merge, plans, report
assert not {"torch", "numpy", "scipy", "rs_plugins.registry"} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
