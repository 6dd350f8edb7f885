import json
import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import nn

from rs_plugins.cli import main
from rs_plugins.core.relaxations import export
from rs_plugins.core.relaxations.bound_files import read_bounds

MODELS = """
from torch import nn
def small():
    return nn.Sequential(nn.Flatten(), nn.Linear(9, 12), nn.ReLU(), nn.Linear(12, 4))
"""
COMMAND = (
    "certify --model my_nets:small --weights w.pt --data npz:squares.npz --device cpu --out log.tsv "
    "--bounds crown --eps 1/16 --attack-steps 3"
)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with a model's code, its weights and data, as the current one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "my_nets", raising=False)
    Path("my_nets.py").write_text(MODELS)
    images = np.random.default_rng(0).integers(0, 256, (14, 3, 3), dtype=np.uint8)
    pixels = torch.from_numpy(images).float().unsqueeze(1) / 255
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(9, 12), nn.ReLU(), nn.Linear(12, 4))
    with torch.no_grad():
        model[1].weight *= 3
        model[3].bias -= model(pixels).mean(dim=0)
        labels = model(pixels).argmax(dim=1).numpy()
    labels[-2:] = (labels[-2:] + 1) % 4
    np.savez("squares.npz", images=images, labels=labels)
    torch.save(model.state_dict(), "w.pt")
    return tmp_path


def invoke(command, *more):
    return CliRunner().invoke(main, [*shlex.split(command), *more])


def record(log="log.tsv"):
    return json.loads(Path(f"{log}.json").read_text())


@pytest.mark.usefixtures("folder")
def test_a_data_set_is_certified_and_reported():
    result = invoke(COMMAND)
    assert result.exit_code == 0, result.output
    results = read_bounds("log.tsv")
    counts = ", ".join(f"{count} {status}" for status, count in results.counts.items())
    certified = f"{results.certified_accuracy().share:.2%}"
    at_most = f"{results.robust_accuracy_at_most().share:.2%}"
    assert result.stdout == (
        f"log.tsv: 14 images, natural 85.71%, certified {certified}, at most {at_most} ({counts}); "
        "more with: rs-plugins report log.tsv\n"
    )
    assert results.counts["misclassified"] == 2
    assert min(results.counts["verified"], results.counts["falsified"]) > 0
    assert (record()["eps"], record()["cascade"], record()["dtype"]) == (0.0625, "ibp, crown-ibp, crown", "float64")
    shown = invoke("report log.tsv").stdout
    assert re.search(rf"log +14 +0.0625 +linf +float64 +85.71 +{certified[:-1]} +[\d.]+-[\d.]+ +{at_most[:-1]} ", shown)
    by = results.verified_by
    numbers = " +".join(map(str, [*by.values(), *results.counts.values()]))
    assert re.search(rf"images +by ibp +by crown-ibp .* failed\n.*\nlog +{numbers}\n|\nlog +{numbers}\n", shown)


@pytest.mark.usefixtures("folder")
def test_options_reach_the_job():
    more = "--norm l2 --cascade ibp,crown --attack-restarts 2 --seed 3 --dtype float32 --batch-size 5 --skip 3 --quiet"
    assert invoke(COMMAND, *more.split()).exit_code == 0
    assert read_bounds("log.tsv").idx.tolist() == [0, 3, 6, 9, 12]
    run = {"norm": "l2", "cascade": "ibp, crown", "attack": "pgd, 2 runs of 3 steps", "seed": 3, "dtype": "float32"}
    assert record().items() >= run.items()
    assert invoke(COMMAND, "--bounds", "alpha-crown", "--alpha-steps", "2", "--out", "b.tsv").exit_code == 0
    assert record("b.tsv")["cascade"] == "ibp, crown-ibp, crown, alpha-crown (2 steps)"


@pytest.mark.usefixtures("folder")
def test_a_log_is_gone_on_with_and_shards_are_merged():
    assert invoke(COMMAND).exit_code == 0
    whole = Path("log.tsv").read_bytes()
    assert "it exists; to go on with it use resume (--resume)" in invoke(COMMAND).output
    Path("log.tsv").write_bytes(whole[: whole.rindex(b"\n11\t") + 6])
    assert invoke(COMMAND, "--resume").exit_code == 0
    before, after = (re.sub(rb"\d:\d\d:\d\d\.\d{6}", b"", text) for text in (whole, Path("log.tsv").read_bytes()))
    assert before == after
    assert "begun by another run (eps: 0.0625 -> 0.1)" in invoke(COMMAND, "--eps", "0.1", "--resume").output
    for part in range(2):
        assert invoke(COMMAND, "--shard", f"{part}/2", "--out", f"{part}.tsv").exit_code == 0
    assert invoke("merge 0.tsv 1.tsv --out merged.tsv").stdout == "merged.tsv: 14 images of 2 logs\n"
    assert read_bounds("merged.tsv").status.tolist() == read_bounds("log.tsv").status.tolist()


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(("text", "eps"), [("8/255", 8 / 255), ("0.1", 0.1), ("1e-3", 0.001), ("2.5/255", 2.5 / 255)])
def test_a_radius_may_be_a_fraction(text, eps):
    assert invoke(COMMAND, "--eps", text, "--stop", "1").exit_code == 0
    assert record()["eps"] == eps


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("command", "message"),
    [
        (f"{COMMAND} --sigma 0.5", "--sigma is for randomized smoothing, which --bounds is not"),
        (f"{COMMAND} --plan fixed:n=10", "--plan is for randomized smoothing, which --bounds is not"),
        (f"{COMMAND} --channels-last", "--channels-last is for randomized smoothing"),
        (f"{COMMAND} --chunk 3", "--chunk is for randomized smoothing"),
        (f"{COMMAND} --member other", "--member is for randomized smoothing, which --bounds is not"),
        (f"{COMMAND} --ensemble soft", "--ensemble is for randomized smoothing, which --bounds is not"),
        (COMMAND.replace("--eps 1/16", ""), "--bounds needs a radius: --eps 8/255, or another"),
        (COMMAND.replace("--bounds crown", ""), "--eps is for --bounds NAME, which is missing"),
        (
            COMMAND.replace("--bounds crown --eps 1/16 --attack-steps 3", "--sigma 1 --export-unknown open"),
            "--export-unknown is for --bounds NAME, which is missing",
        ),
        (
            COMMAND.replace("--bounds crown --eps 1/16 --attack-steps 3", ""),
            "sigma: expected --sigma beside my_nets:small",
        ),
        (f"{COMMAND} --timeout 3", "--timeout is for --export-unknown FOLDER, which is missing"),
        (f"{COMMAND} --eps 1/0", "'--eps': expected a number such as 0.1 or 8/255, got '1/0'"),
        (f"{COMMAND} --eps big", "expected a number such as 0.1 or 8/255, got 'big'"),
        (f"{COMMAND} --eps -1", "eps: expected a finite number >= 0, got -1.0"),
        (f"{COMMAND} --cascade crown,ibp", "--cascade: expected crown at its end, as --bounds says, got 'crown,ibp'"),
        (
            f"{COMMAND} --cascade fast,crown",
            "cascade: expected bounds out of 'ibp', 'crown-ibp', 'crown', 'alpha-crown'",
        ),
        (f"{COMMAND} --bounds deep", "Invalid value for '--bounds': 'deep' is not one of"),
        (f"{COMMAND} --dtype float16", "dtype: expected torch.float64 or torch.float32, got torch.float16"),
        (f"{COMMAND} --norm l2 --export-unknown open", "norm: VNN-LIB has words for balls of linf only, got 'l2'"),
    ],
)
def test_what_does_not_go_together_is_refused(command, message):
    result = invoke(command)
    assert result.exit_code in (1, 2)
    assert message in " ".join(re.sub("[│╭╰─]", " ", result.output).split())
    assert not Path("log.tsv").exists()


@pytest.mark.usefixtures("folder")
def test_what_stays_unknown_is_exported(monkeypatch):
    monkeypatch.setattr(export, "find_spec", lambda name: name)
    monkeypatch.setattr(export, "_onnx", lambda model, shape: b"a network")
    result = invoke(COMMAND, "--bounds", "ibp", "--export-unknown", "open", "--timeout", "60")
    assert result.exit_code == 0, result.output
    results = read_bounds("log.tsv")
    unknown = results.idx[results.status == "unknown"].tolist()
    assert len(unknown) > 1
    assert f"open: {len(unknown)} images for a complete verifier\n" in result.stdout
    rows = Path("open/instances.csv").read_text().splitlines()
    assert rows == [f"model.onnx,vnnlib/image_{index}.vnnlib,60" for index in unknown]


@pytest.mark.usefixtures("folder")
def test_a_missing_package_is_named_before_any_work(monkeypatch):
    monkeypatch.setattr(export, "find_spec", lambda name: None)
    result = invoke(COMMAND, "--export-unknown", "open")
    assert result.exit_code == 1
    assert "pip install 'rs-plugins[onnx]'" in result.output
    assert not Path("log.tsv").exists()


@pytest.mark.usefixtures("folder")
def test_stopped_runs_say_how_to_go_on(monkeypatch):
    from rs_plugins.core.relaxations import job

    batch = job._batch

    def stopped(certifier, data, positions):
        if positions[0] >= 8:
            raise KeyboardInterrupt
        return batch(certifier, data, positions)

    monkeypatch.setattr(job, "_batch", stopped)
    result = invoke(COMMAND, "--batch-size", "4")
    assert result.exit_code == 130
    assert "stopped; 8 images are in log.tsv; go on with the same command and --resume" in result.output
