import json
import re
import shlex
import subprocess
import sys
import warnings
from dataclasses import fields
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from torch import nn

from rs_plugins.cli import adapt, main
from rs_plugins.core.certifying_adapters.design import AdapterDesign
from rs_plugins.core.certifying_adapters.job import Adaptation, default_recipe
from rs_plugins.core.certifying_adapters.job import adapt_data_set as train_for_real
from rs_plugins.core.data_sets.opening import open_data_set
from rs_plugins.core.results.files import read_results
from rs_plugins.core.results.writer import ResultsWriter
from rs_plugins.core.training.folder import checkpoints_in
from rs_plugins.core.training.trained import load_trained

MODELS = """
import torch
from torch import nn
def small():
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4))
def fixed():
    torch.manual_seed(0)
    return small()
def squashed():
    return nn.Sequential(small(), nn.Softmax(1))
class Transformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.Sequential(*(nn.TransformerEncoderLayer(4, 2, 8, batch_first=True) for _ in range(2)))
        self.head = nn.Linear(4, 4)
    def forward(self, x):
        return self.head(self.blocks(x.flatten(1, 2)).mean(1))
def transformer():
    torch.manual_seed(0)
    return Transformer()
"""
COMMAND = (
    "adapt --model my_models:small --weights clean.pt --data npz:squares.npz --sigma 0.25 --sigma 0.5 --kind feature "
    "--epochs 2 --batch-size 16 --lr 0.05 --certify-images 3 --n 100 --device cpu --out run"
)
TOKEN = "--model my_models:transformer --weights t.pt --kind token"

# on so few images there is often nothing to gain, and the networks are bad
pytestmark = [
    pytest.mark.filterwarnings("ignore:sigma .* with the certifying adapter:rs_plugins.errors.RSPluginsWarning"),
    pytest.mark.filterwarnings("ignore:model. it is right on:rs_plugins.errors.RSPluginsWarning"),
]


def squares(name, seed, n=40):
    pixels = np.random.default_rng(seed).integers(0, 256, (n, 4, 4), dtype=np.uint8)
    np.savez(name, images=pixels, labels=np.arange(n) % 4)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with networks, weights and data, as the current one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "my_models", raising=False)
    (tmp_path / "my_models.py").write_text(MODELS)
    squares("squares.npz", 0)
    squares("test.npz", 1, n=7)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        model = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4))
    torch.save(model.state_dict(), "clean.pt")
    return tmp_path


def write_transformer():
    sys.path.insert(0, "")
    torch.save(import_module("my_models").transformer().state_dict(), "t.pt")


def invoke(command, *more):
    return CliRunner().invoke(main, [*shlex.split(command), *more])


def done(command, *more):
    result = invoke(command, *more)
    assert result.exit_code == 0, result.output
    return result


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def certificates(path):
    log = read_results(path)
    return (log.idx.tolist(), log.predict.tolist(), log.radius.tolist())


@pytest.mark.usefixtures("folder")
def test_a_classifier_that_is_hardly_ever_right_is_told():
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        result = done(COMMAND.replace("--epochs 2", "--epochs 0"))
    assert "right on 0.0% of 2 images" in result.stdout
    text = "warning: model: it is right on 0.0% of the test images without noise; is --normalise that of its training"
    assert text in result.stderr


@pytest.mark.usefixtures("folder")
def test_from_a_classifier_to_certified_ones():
    result = done(COMMAND)
    title, _, rest = result.stdout.partition("\n\n")
    assert re.fullmatch(
        r"my_models:small of 172 parameters: right on \d+\.\d% of 2 images of npz, 4 held out without noise; "
        r"certifying adapters on 36 images of npz, all but 4\n"
        r"sigma 0.25: epoch \d of 2 is kept, right under noise on \d+\.\d% of the images held out \(without the "
        r"certifying adapter \d+\.\d%\)\n"
        r"sigma 0.5: epoch \d of 2 is kept, right .*",
        title,
    )
    table, files, following = rest.split("\n\n")
    header, *rows = table.splitlines()
    assert header.split()[:4] == ["no", "noise", "%", "at"]
    assert header.split()[-9:] == ["ACR", "abstain", "%", "trained", "weights", "of", "the", "model's", "seconds"]
    names = [" ".join(row.split()[:3]) for row in rows]
    assert names == ["sigma 0.25 bare", "sigma 0.25 adapted", "sigma 0.5 bare", "sigma 0.5 adapted"]
    count = 8 * 4 + 4 + 4 * 8 + 8 + 8 + 8 * 4 + 4  # two layers, the gate, the head
    for sigma, bare, adapted in ((0.25, *rows[:2]), (0.5, *rows[2:])):
        out = Path(f"run/sigma-{sigma}")
        for row, name in ((bare, "bare.tsv"), (adapted, "certified.tsv")):
            log = read_results(out / name)
            assert log.idx.tolist() == [0, 2]
            assert f"  {log.average_certified_radius:.4f}  " in row
            assert row.split()[4] == f"{100 * log.certified_accuracy([0])[0]:.2f}"
            assert json.loads((out / f"{name}.json").read_text())["sigma"] == sigma
        assert re.search(rf" {count}  +{count / 172:.1%} +\d+\.\d$", adapted)
        assert bare.endswith("-")
        stored, clean = load_file(out / "model.safetensors"), torch.load("clean.pt")
        assert all(torch.equal(stored[f"extractor.{key}"], clean[key]) for key in ("1.weight", "1.bias"))
    assert files.splitlines() == [
        f"  run/sigma-{sigma}/{file}"
        for sigma in (0.25, 0.5)
        for file in ("model.safetensors", "model.json", "history.csv", "certified.tsv", "bare.tsv")
    ]
    certify, report, attack = (shlex.split(line)[1:] for line in following.removeprefix("next: ").strip().split("\n"))
    assert certify[:6] == ["certify", "--model", "run/sigma-0.25", "--trust-model", "--data", "npz:run/test.npz"]
    done(shlex.join(certify), "--plan", "fixed:n=100", "--device", "cpu")
    assert len(read_results("run/sigma-0.25/more.tsv")) == 4
    assert "run/sigma-0.5/bare.tsv" in done(shlex.join(report)).stdout
    done(shlex.join(attack), "--n", "100", "--device", "cpu", "--pictures", "0")
    # the same network, the same log: certify goes on with it
    log = Path("run/sigma-0.25/certified.tsv")
    before = log.read_text()
    more = "--skip 2 --plan fixed:n=100 --resume --device cpu"
    done(f"certify --model run/sigma-0.25 --trust-model --data npz:run/test.npz --out {log} {more}")
    assert log.read_text() == before
    lines = r"(sigma 0\.25, epoch \d/2: loss .* s\n){2}(sigma 0\.5, .* s\n){2}(run/.* s\n){4}"
    assert re.fullmatch(lines, result.stderr)


@pytest.mark.usefixtures("folder")
def test_test_images_are_neither_trained_on_nor_chosen_by():
    """Of data without parts."""
    done(COMMAND, "--certify-images", "0", "--epochs", "1", "--held-out", "9")
    whole = open_data_set("npz:squares.npz").read(range(40))
    test = open_data_set("npz:run/test.npz")
    assert torch.equal(test.read(range(4)), whole[::10])
    assert test.labels.tolist() == [0, 2, 0, 2]
    record = json.loads(Path("run/sigma-0.25/model.json").read_text())
    assert (record["images"], record["validation"]["images"]) == (27, 9)
    assert record["data"] == "npz, all but 4, all but 9"
    assert record["validation"]["data"] == "npz, all but 4, 9 held out"
    assert not list(Path("run").glob("*/*.tsv"))
    assert "no noise %" in (result := done(COMMAND, "--epochs", "0", "--out", "none")).stdout
    assert "warning" not in result.output


@pytest.mark.usefixtures("folder")
def test_stopped_at_any_moment_and_gone_on_with(monkeypatch):
    done(COMMAND, "--out", "whole")
    tell, write, stops = adapt._tell, ResultsWriter.write, []

    def stop_in_the_second_training(recipe, epoch):
        tell(recipe, epoch)
        if recipe.sigma == 0.5:
            raise KeyboardInterrupt

    def stop_at_the_second_image(writer, *rest):
        write(writer, *rest)
        stops.append(writer.path.name)
        if stops.count(writer.path.name) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(adapt, "_tell", stop_in_the_second_training)
    result = invoke(COMMAND)
    assert result.exit_code == 130
    assert "stopped; done: run/sigma-0.25 is trained; go on with the same command and --resume" in result.stderr
    assert [path.name for path in checkpoints_in(Path("run/sigma-0.5"))] == ["epoch-0001"]
    monkeypatch.setattr(adapt, "_tell", tell)
    monkeypatch.setattr(ResultsWriter, "write", stop_at_the_second_image)
    result = invoke(COMMAND, "--resume")
    assert result.exit_code == 130
    assert "stopped; done: run/sigma-0.25 is trained, run/sigma-0.5 is trained; go on" in result.stderr
    assert len(read_results("run/sigma-0.25/certified.tsv")) == 2
    monkeypatch.setattr(ResultsWriter, "write", write)
    done(COMMAND, "--resume")
    for sigma in (0.25, 0.5):
        names = [f"{out}/sigma-{sigma}" for out in ("run", "whole")]
        assert same(*(load_file(f"{name}/model.safetensors") for name in names))
        for log in ("certified.tsv", "bare.tsv"):
            one, other = (certificates(f"{name}/{log}") for name in names)
            assert one == other
    result = invoke(COMMAND)
    assert result.exit_code == 1
    assert "Error: run/sigma-0.25/bare.tsv is there; to go on use resume (--resume), else choose" in result.output
    squares("squares.npz", 8)
    assert "Error: run/test.npz: it holds other test images than those of" in invoke(COMMAND, "--resume").output


@pytest.fixture
def call(monkeypatch, folder):
    """What the command asks of each training, which trains nothing."""
    asked = []

    def note(model, data, sigma, out, **more):
        asked.append({"model": model, "data": data, "sigma": sigma, "out": out, **more})
        nothing = {"design": more["design"], "recipe": default_recipe(sigma, 0), "network": more["network"]}
        return Adaptation(train_for_real(model, data, sigma, out, **nothing).model, [], None, None)

    monkeypatch.setattr("rs_plugins.core.certifying_adapters.job.adapt_data_set", note)

    def run(*more):
        asked.clear()
        done(COMMAND, "--certify-images", "0", "--out", f"run{len(list(folder.iterdir()))}", *more)
        return asked[0]

    return run


@pytest.mark.parametrize(
    ("more", "argument", "setting", "value"),
    [
        ("--kind image --size tiny", "design", "size", "tiny"),
        ("--hidden 3", "design", "hidden", 3),
        (f"{TOKEN} --sites blocks.1 --hidden 3", "design", "hidden", 3),
        (f"{TOKEN} --sites blocks.1,blocks.0", "design", "sites", ("blocks.1", "blocks.0")),
        (f"{TOKEN} --sites blocks.1 --sites blocks.0", "design", "sites", ("blocks.1", "blocks.0")),
        ("--combine add", "design", "combine", "add"),
        ("--head fresh", "design", "head", "fresh"),
        ("--head-name 3", "design", "head_name", "3"),
        ("--method smoothmix:steps=2", "recipe", "method", "smoothmix"),
        ("--method smoothmix:steps=2", "recipe", "options", {"steps": 2}),
        ("--epochs 7", "recipe", "epochs", 7),
        ("--batch-size 5", "recipe", "batch_size", 5),
        ("--parts 2", "recipe", "parts", 2),
        ("--lr 0.2", "recipe", "lr", 0.2),
        ("--optimizer adamw", "recipe", "algorithm", "adamw"),
        ("--schedule step", "recipe", "schedule", "step"),
        ("--weight-decay 0.01", "recipe", "weight_decay", 0.01),
        ("--augment", "recipe", "augment", True),
    ],
)
def test_options_reach_design_and_recipe(call, more, argument, setting, value):
    write_transformer()
    assert getattr(call(*shlex.split(more))[argument], setting) == value


def test_options_reach_the_job(call, folder):
    found = call()
    assert found["recipe"] == default_recipe(0.25, 2).changed(batch_size=16, lr=0.05, options={})
    assert (found["held_out"], found["resume"], found["seed"], found["sigma"]) == (None, False, 0, 0.25)
    assert found["network"] == {"name": "my_models:small", "classes": 4, "channels": 1, "seed": 0}
    more = "--held-out 3 --resume --seed 5 --precision bf16-mixed --channels-last --workers 2 --train-images 9"
    found = call(*shlex.split(more))
    assert [found[name] for name in ("held_out", "resume", "seed", "precision")] == [3, True, 5, "bf16-mixed"]
    assert (found["channels_last"], found["workers"], len(found["data"])) == (True, 2, 9)
    assert found["device"] == torch.device("cpu")
    found = call("--normalise", "data", "--test", "npz:test.npz")
    assert len(found["data"]) == 40
    assert found["network"]["mean"] == pytest.approx([float(open_data_set("npz:squares.npz").read(range(40)).mean())])
    torch.save(nn.Sequential(nn.Flatten(), nn.Linear(784, 7)).state_dict(), "seven.pt")
    assert call("--model", "my_models:fixed", "--classes", "7")["network"]["classes"] == 7


def test_parts_of_a_data_set(folder):
    pytest.importorskip("sklearn")
    (folder / "more_models.py").write_text(MODELS.replace("16, 8", "64, 8").replace("8, 4", "8, 10"))
    result = done(
        "adapt --model more_models:fixed --data digits --train-images 50 --kind feature --sigma 0.25 --epochs 1 "
        "--out run --n 100 --certify-images 10 --device cpu --quiet"
    )
    assert "% of 10 images of digits test without noise; certifying adapters on 50 images" in result.stdout
    assert "--data digits --skip 3 --plan" in result.stdout
    assert result.stderr == ""
    record = json.loads(Path("run/sigma-0.25/model.json").read_text())
    assert (record["images"], record["data"]) == (45, "digits train, all but 5")
    assert read_results("run/sigma-0.25/bare.tsv").idx.tolist() == list(range(0, 297, 30))


@pytest.mark.usefixtures("folder")
def test_a_folder_of_a_trained_network_is_adapted():
    train = "train --method gaussian --sigma 0.1 --data npz:squares.npz --arch my_models:small --epochs 1 --device cpu"
    done(train, "--out", "base")
    command = COMMAND.replace("--model my_models:small --weights clean.pt", "--model base") + " --epochs 1"
    assert "names a function, my_models:small, which would be imported" in invoke(command).output
    for option in ("--weights clean.pt", "--normalise data", "--classes 4"):
        message = f"{option.split()[0][2:]}: the folder base has its own, expected no {option.split()[0]} beside it"
        assert f"Error: {message}" in invoke(command, "--trust-model", *option.split()).output
    result = done(command, "--trust-model", "--certify-images", "0", "--test", "npz:test.npz")
    assert "--model run/sigma-0.25 --trust-model --data npz:test.npz" in result.stdout
    base, stored = load_file("base/model.safetensors"), load_file("run/sigma-0.25/model.safetensors")
    assert torch.equal(base["1.weight"], stored["extractor.1.weight"])
    assert load_trained("run/sigma-0.25", trust=True).record["network"]["name"] == "my_models:small"
    again = command.replace("--model base", "--model run/sigma-0.25 --trust-model")
    assert "Error: model: run/sigma-0.25 has a certifying adapter already" in invoke(again, "--out", "no").output
    assert not Path("no").exists()


@pytest.mark.usefixtures("folder")
@pytest.mark.filterwarnings("always:base was trained on:rs_plugins.errors.ResultsWarning")
@pytest.mark.parametrize(
    ("trained_on", "count"),
    [
        ("", 4),
        ("--held-out 4", 0),  # the very same
        ("--held-out 3", 3),  # 0, 13 and 26 are held out; set aside are 0, 10, 20 and 30
        ("--train-images 8", 4),  # every fifth
        ("--held-out 8 --train-images 9", 0),
        ("--held-out 10 --train-images 15", 1),  # every fourth is held out; of the others every second is trained on
        ("--data npz:test.npz", 0),
        ("--data npz:test.npz --extra npz:squares.npz", 4),
    ],
)
def test_images_that_the_classifier_was_trained_on_are_told(trained_on, count):
    train = "train --method gaussian --sigma 0.1 --data npz:squares.npz --arch my_models:small --epochs 0 --device cpu"
    done(f"{train} --out base {trained_on}")
    command = COMMAND.replace("--model my_models:small --weights clean.pt", "--model base --trust-model")
    result = done(command, *shlex.split("--epochs 0 --certify-images 0"))
    found = re.findall(
        r"^warning: base was trained on (\d) of the 4 images of .*too good; .*--test$", result.stderr, re.M
    )
    assert found == ([str(count)] if count else [])
    other = done(command, *shlex.split("--epochs 0 --certify-images 0 --test npz:test.npz --out other"))
    assert "was trained on" not in other.output


@pytest.mark.usefixtures("folder")
def test_images_that_are_set_aside_do_not_count_for_normalisation(call):
    whole = open_data_set("npz:squares.npz").read(range(40))
    found = call("--normalise", "data", "--train-images", "9")
    trained_on = [place for place in range(40) if place % 10]
    assert found["network"]["mean"] == pytest.approx([float(whole[trained_on].mean())])
    assert found["network"]["classes"] == 4


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("--sigma 0", "sigma: expected a finite number > 0, got 0"),
        ("--sigma 0.25", "expected each once, got 0.25 twice"),
        ("--kind relu", "Invalid value for '--kind'"),
        ("--hidden 0", "hidden: expected an integer >= 1, got 0"),
        ("--sites 1", r"sites: only for the kind 'token', got \('1',\) for 'feature'"),
        ("--kind token", "sites: expected names of blocks that return tokens, .*; the blocks are named with --sites"),
        (f"{TOKEN} --combine gated", "combine: a 'token' certifying adapter works inside the extractor, 'add' alone"),
        ("--head-name 1", "head_name: expected the layer whose output is the logits, but something comes after '1'"),
        (
            "--model my_models:squashed --weights inside.pt",
            "model: expected a torch.nn.Linear .*; take off what comes after it, such as a softmax",
        ),
        ("--weights no.pt", "weights: there is no file no.pt\n"),
        (
            "--model my_models:transformer",
            "weights: clean.pt does not fit .*; by name: --classes and --normalise are those of",
        ),
        ("--model lenet", "weights: clean.pt does not fit the model"),
        ("--model nowhere:net", "model: cannot import nowhere"),
        ("--model nowhere", "model: .*nowhere"),
        (
            "--normalise cifar10",
            "model: it fails on an input of shape .*; --model, or --normalise, may be for other images",
        ),
        ("--classes 1", "classes: expected an integer >= 2, got 1"),
        ("--method smooth", "method: expected one of consistency, gaussian"),
        ("--epochs -1", "epochs: expected an integer >= 0, got -1"),
        ("--lr 0", "lr: expected a finite number > 0, got 0.0"),
        ("--held-out 36", "held_out: expected fewer images than npz, all but 4 has, 36, got 36"),
        ("--workers -1", "workers: expected an integer >= 0, got -1"),
        ("--train-images 0", "train_images: expected an integer >= 1, got 0"),
        ("--certify-images -1", "certify_images: expected an integer >= 0, got -1"),
        ("--n 5", "n: expected at least 10, got 5"),
        ("--alpha 0", r"alpha: expected a number in \(0, 1\), got 0"),
        ("--test npz:squares.npz", "test: expected other images than those that are trained on, got npz:squares.npz"),
        ("--test npz:wide.npz", r"test: expected images of shape \(1, 4, 4\) as of --data, got \(1, 4, 5\)"),
        ("--test npz:no.npz", "data: npz: there is no no.npz"),
        ("--data nothing", "data: expected digits, mnist:DIR, "),
        ("--device abacus", "device: expected a device of this machine, got 'abacus'"),
        ("--out no/where", "out: there is no folder no"),
    ],
)
def test_mistakes_are_one_line_and_no_folder(more, message):
    np.savez("wide.npz", images=np.zeros((2, 4, 5), dtype=np.uint8), labels=np.arange(2))
    torch.save({f"0.{key}": value for key, value in torch.load("clean.pt").items()}, "inside.pt")
    write_transformer()
    result = invoke(COMMAND, *shlex.split(more))
    assert result.exit_code in (1, 2)
    assert re.search(f"Error: .*({message})", result.output), result.output
    assert len(result.stderr.splitlines()) <= 4
    assert not Path("run").exists()


@pytest.mark.usefixtures("folder")
def test_a_classifier_without_weights():
    without = COMMAND.replace("--weights clean.pt", "--certify-images 0 --epochs 0")
    for name, why in (("my_models:small", "returns other weights each time"), ("lenet", "has initial weights alone")):
        result = invoke(without.replace("my_models:small", name))
        assert f"Error: weights: expected --weights beside --model {name}, got none; it {why}" in result.output
    assert not Path("run").exists()
    done(without.replace("my_models:small", "my_models:fixed"))


@pytest.mark.usefixtures("folder")
def test_torchrun_is_not_for_it(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    assert "Error: adapt: expected one process, got several by torchrun" in invoke(COMMAND).output


def test_help_says_the_defaults_and_loads_neither_torch_nor_numpy():
    text = " ".join(invoke("adapt --help").output.split())
    assert "Example: rs-plugins adapt --model" in text
    helps = {option.name: option for option in adapt.adapt.params}
    recipe, design = default_recipe(0.5), AdapterDesign()
    for name in ("epochs", "batch_size", "parts", "schedule"):
        assert helps[name].help.endswith(f"[{getattr(recipe, name)}]")
    token = default_recipe(0.5, kind="token")
    for name in ("algorithm", "lr", "weight_decay"):
        both = (str(getattr(one, name)).removesuffix(".0") for one in (recipe, token))
        assert helps[name].help.endswith("[{}; token: {}]".format(*both))
    assert recipe.augment is False
    for name in ("kind", "size", "head"):
        assert helps[name].help.endswith(f"[{getattr(design, name)}]")
    assert helps["combine"].help.endswith(f"[{design.combine}; token: {AdapterDesign(kind='token').combine}]")
    assert {field.name for field in fields(AdapterDesign)} <= helps.keys()
    code = "import sys, rs_plugins.cli.adapt; assert not {'torch', 'numpy', 'lightning_fabric'} & set(sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600, check=False)
    assert found.returncode == 0, found.stderr


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("more", [TOKEN, "--kind image --combine add", "--kind image --size tiny --head fresh"])
def test_every_kind_is_certified_and_attacked_from_its_folder(more):
    write_transformer()
    done(COMMAND.replace(" --sigma 0.5", ""), *shlex.split(more), "--epochs", "1")
    model = "--model run/sigma-0.25 --trust-model --data npz:run/test.npz --device cpu"
    done(f"certify {model} --skip 2 --plan fixed:n=100 --out again.tsv")
    assert certificates("again.tsv") == certificates("run/sigma-0.25/certified.tsv")
    records = [json.loads(Path(f"{name}.json").read_text()) for name in ("again.tsv", "run/sigma-0.25/certified.tsv")]
    assert records[0] == records[1]
    done(f"attack {model} --attack SmoothAdvPGD:steps=1 --n 100 --pictures 0 --out attacked")
