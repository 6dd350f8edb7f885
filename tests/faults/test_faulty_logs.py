"""Logs that were cut, shuffled or written over: read, reported, merged, gone on with; nothing finished is lost."""

import json
import random
import re
import warnings

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import nn

from rs_plugins.core.data_sets.data_set import in_memory
from rs_plugins.core.job import certify_data_set
from rs_plugins.core.plans.fixed_budget import FixedBudget
from rs_plugins.core.relaxations.bound_files import read_bounds
from rs_plugins.core.relaxations.job import certify_bounds_data_set
from rs_plugins.core.results.comparison import default_radii, figures, read_log
from rs_plugins.core.results.files import HEADER, read_results
from rs_plugins.core.results.logged_plan import read_plan, understood
from rs_plugins.core.results.merging import merge_results
from rs_plugins.errors import InputError, ResultsError, RSPluginsError

PLAN = FixedBudget(n0=5, n=30)
DATA = in_memory("squares", np.random.default_rng(0).integers(0, 256, (8, 1, 3, 3), dtype=np.uint8), np.arange(8) % 4)
FUZZ = settings(max_examples=40, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
MORE = settings(max_examples=1500, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
# no digit is among them, nor an exponent: another number makes another log, which may be true
SNIPPETS = [
    *(b"\0", b"\t", b"\n", b"\r\n", b"\r", b"\xff\xfe", b"\xef\xbb\xbf", b"nan", b"inf", b"-inf", b"-", b" ", b"x"),
    *("٣".encode(), b"_", b"x" * 100_000, b"\t" * 1000),
]
CELLS = [*SNIPPETS, b"", b"-1", b"1e400", b"9" * 5000, b"1_0", b"0x10"]


def network():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(9, 8), nn.ReLU(), nn.Linear(8, 4))


def certify(log, **options):
    return certify_data_set(network(), DATA, 0.5, log, plan=PLAN, **options)


def bound(log, **options):
    return certify_bounds_data_set(network(), DATA, 0.01, log, attack_steps=1, batch_size=4, cascade=["ibp"], **options)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A log of each kind, and a place where bad ones are tried."""
    folder = tmp_path_factory.mktemp("logs")
    certify(folder / "votes.tsv")
    bound(folder / "bounds.tsv")
    return folder


def damaged(content, draw):
    """One way to damage a file of lines."""
    lines, size = content.split(b"\n"), len(content)
    way = draw(st.integers(0, 8))
    if way == 0:
        return content[: draw(st.integers(0, size))]
    if way == 1:
        random.Random(draw(st.integers(0, 99))).shuffle(lines)
    elif way == 2:
        lines.insert(draw(st.integers(0, len(lines))), draw(st.sampled_from(lines)))
    elif way == 3:
        del lines[draw(st.integers(0, len(lines) - 1))]
    elif way == 4:
        place = draw(st.integers(0, size))
        return content[:place] + draw(st.sampled_from(SNIPPETS)) + content[place:]
    elif way == 5:
        row = draw(st.integers(0, len(lines) - 1))
        cells = lines[row].split(b"\t")
        cells[draw(st.integers(0, len(cells) - 1))] = draw(st.sampled_from(CELLS))
        lines[row] = b"\t".join(cells)
    elif way == 6:
        return content.replace(b"\n", draw(st.sampled_from([b"\r\n", b"\r", b"\n\n", b" \n"])))
    elif way == 7:
        return content.replace(b"\t", draw(st.sampled_from([b",", b" ", b";", b"\t\t"])))
    else:
        text = content.decode(errors="replace")
        return draw(
            st.sampled_from(
                [b"", b"\xef\xbb\xbf" + content, text.encode("utf-16"), content * 2, content[::-1], content + b"\n"]
            )
        )
    return b"\n".join(lines)


def put(log, content, record):
    log.write_bytes(content)
    log.with_name(log.name + ".json").write_bytes(record)


def record(log):
    return log.with_name(log.name + ".json").read_bytes()


def reported(log):
    table = read_log(log)
    return figures("log", table, default_radii({"log": table}, {"log": read_plan(log)}), plan=read_plan(log))


def merged(log):
    (log.parent / "merged.tsv").unlink(missing_ok=True)
    return merge_results([log], log.parent / "merged.tsv", partial=True)


def outcome(job, *arguments, **options):
    """Return the result, None where it is refused, and why it is refused; any other error is a crash."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return job(*arguments, **options), ""
        except RSPluginsError as error:
            return None, str(error)


def check_reading(whole, data):
    true = read_results(whole / "votes.tsv")
    radius = dict(zip(true.idx.tolist(), true.radius.tolist(), strict=True))
    content = damaged((whole / "votes.tsv").read_bytes(), data.draw)
    beside = record(whole / "votes.tsv")
    log = whole / "read.tsv"
    put(log, content, damaged(beside, data.draw) if data.draw(st.booleans()) else beside)
    for read in (read_results, reported, merged):
        found, _ = outcome(read, log)
        if found is not None and read is not reported and found.radius is not None:
            for index, reach in zip(found.idx.tolist(), found.radius.tolist(), strict=True):
                assert index in radius
                assert reach <= radius[index]
    assert log.read_bytes() == content


@FUZZ
@given(data=st.data())
def test_a_damaged_log_is_refused_or_says_no_more_than_was_computed(whole, data):
    check_reading(whole, data)


@pytest.mark.slow
@MORE
@given(data=st.data())
def test_many_damaged_logs_are_refused_or_say_no_more_than_was_computed(whole, data):
    check_reading(whole, data)


def check_going_on(whole, kind, job, read, data):
    good, beside = (whole / kind).read_bytes(), record(whole / kind)
    content = damaged(good, data.draw)
    other = damaged(beside, data.draw) if data.draw(st.booleans()) else beside
    log = whole / f"on-{kind}"
    put(log, content, other)
    kept = [line for line in content.split(b"\n")[1:] if line in set(good.split(b"\n")[1:]) and line]
    found, why = outcome(job, log, resume=True)
    if found is None:
        assert why
        assert log.read_bytes() == content  # refused, and left as it was
        return
    assert what_counts(found) == what_counts(read(whole / kind))
    if content.startswith(good.split(b"\n")[0] + b"\n"):
        assert all(line in log.read_bytes() for line in kept[:-1])  # of the last one its end may be missing


def what_counts(table):
    names = ("idx", "label", "predict", "radius", "correct", "status")
    return [getattr(table, name).tolist() for name in names if hasattr(table, name)]


@settings(FUZZ, max_examples=20)
@given(data=st.data())
def test_a_damaged_log_is_left_alone_or_becomes_what_it_would_have_been(whole, data):
    check_going_on(whole, "votes.tsv", certify, read_results, data)


@settings(FUZZ, max_examples=8)
@given(data=st.data())
def test_so_is_a_log_of_bounds(whole, data):
    check_going_on(whole, "bounds.tsv", bound, read_bounds, data)


@pytest.mark.slow
@settings(MORE, max_examples=400)
@given(data=st.data())
def test_many_damaged_logs_are_left_alone_or_become_what_they_would_have_been(whole, data):
    check_going_on(whole, "votes.tsv", certify, read_results, data)
    check_going_on(whole, "bounds.tsv", bound, read_bounds, data)


@settings(FUZZ, max_examples=40)
@given(data=st.data())
def test_a_damaged_log_of_bounds_is_read_or_refused(whole, data):
    log = whole / "read-bounds.tsv"
    log.write_bytes(damaged((whole / "bounds.tsv").read_bytes(), data.draw))
    found, _ = outcome(read_bounds, log)
    if found is not None:
        assert verified_in(found) <= verified_in(read_bounds(whole / "bounds.tsv"))


def verified_in(table):
    return set(table.idx[table.status == "verified"].tolist())


COMMON = "idx\tlabel\tpredict\tradius\tcorrect\ttime"
ROW = "0\t3\t3\t0.5\t1\t0:00:01"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"{COMMON}\n{ROW}\n".replace("0.5", "1_0"), "line 2: expected a number"),
        (f"{COMMON}\n{ROW}\n".replace("0.5", "٣"), "line 2: expected a number"),
        (f"{COMMON}\tradius\n{ROW}\t9\n", "each column once"),
        (HEADER + ROW + "\t0.9\t5\t-5\t30\t0.5\t0.001\t0\t\t1\t0\n", "line 2: expected n0 and n >= 0, got -5"),
        (HEADER + ROW + "\t0.9\t5\t5\t30\tnan\t0.001\t0\t\t1\t0\n", "line 2: expected a finite sigma > 0"),
        (HEADER + ROW + "\t0.9\t5\t5\t30\t0.5\t0\t0\t\t1\t0\n", r"line 2: .* alpha in \(0, 1\), got 0.5 and 0.0"),
        ("\t".join("x" * 1_000_000) + "\n", "expected a header with the columns idx"),
        (HEADER + "\t".join("1" * 1_000_000) + "\n", "line 2: expected 16 columns, got 1000000"),
        (HEADER + ROW.replace("0\t3", f"{2**63}\t3", 1) + "\t" * 10 + "\n", "line 2: expected an integer, got '922337"),
    ],
    ids=["underscore", "digits", "twice", "votes", "sigma", "alpha", "columns of a header", "columns", "index"],
)
def test_rows_that_cannot_be(tmp_path, text, message):
    (tmp_path / "log.tsv").write_text(text, encoding="utf-8")
    with pytest.raises(ResultsError, match=message) as caught:
        read_results(tmp_path / "log.tsv")
    assert len(str(caught.value)) < 600


def test_a_large_index_is_an_index(tmp_path):
    (tmp_path / "log.tsv").write_text(f"{COMMON}\n" + ROW.replace("0", str(2**40), 1) + "\n")
    assert read_results(tmp_path / "log.tsv").idx.tolist() == [2**40]


@pytest.mark.parametrize("read", [read_results, read_bounds, read_log])
def test_a_log_that_cannot_be_read(tmp_path, read):
    with pytest.raises(ResultsError, match=r"log.tsv: cannot be read \(No such file or directory\)"):
        read(tmp_path / "log.tsv")
    with pytest.raises(ResultsError, match=r"cannot be read \(Is a directory\)"):
        read(tmp_path)


HOSTILE = {
    "images": {"images": 10**30},
    "shards": {"images": 2**32, "selection": {"start": 0, "stop": 2**32, "skip": 1, "shard": [0, 10**15]}},
    "range": {"images": 2**32, "selection": {"start": 0, "stop": 10**18, "skip": 1, "shard": [0, 1]}},
    "halves": {"selection": {"start": 0, "stop": 8, "skip": 1, "shard": [0.5, 2]}},
    "words": {"selection": {"start": "a", "stop": [], "skip": None, "shard": "xy"}},
}


@pytest.mark.parametrize("name", list(HOSTILE))
def test_a_record_cannot_ask_for_all_memory_or_time(whole, name):
    log = whole / "hostile.tsv"
    text = json.dumps({**json.loads(record(whole / "votes.tsv")), **HOSTILE[name]})
    put(log, (whole / "votes.tsv").read_bytes(), text.encode())
    with pytest.raises((ResultsError, InputError)):
        certify(log, resume=True)
    assert len(outcome(read_log, log)[0]) == 8
    found, why = outcome(merged, log)
    assert len(found) == 8 if found is not None else re.search("selection|images|shard", why)
    assert log.read_bytes() == (whole / "votes.tsv").read_bytes()


@example(text="[" * 100_000)
@example(text='{"plan": "OnGrid(radii=(1' + "0" * 400 + '))"}')
@example(text='{"plan": "' + "(" * 5000 + '"}')
@example(text='{"plan": "OnGrid(radii=None)"}')
@example(text="null")
@settings(FUZZ)
@given(text=st.text(max_size=40))
def test_a_record_of_any_text_stops_no_report(whole, text):
    log = whole / "any.tsv"
    put(log, (whole / "votes.tsv").read_bytes(), text.encode("utf-8", "surrogatepass"))
    assert reported(log).images == 8
    with pytest.raises(ResultsError, match=r"made with, is missing or damaged|begun by another"):
        certify(log, resume=True)


@settings(FUZZ)
@given(text=st.text("OnGridAtRadius()=,.-[]{}'\"0123456789enr ", max_size=40))
def test_any_text_is_a_plan_of_which_nothing_is_known(text):
    assert understood(text).text == text


def test_a_return_inside_a_line_ends_none(whole):
    log = whole / "return.tsv"
    content = (whole / "votes.tsv").read_bytes().split(b"\n")
    cells = content[1].split(b"\t")
    cells[7] = b"5\r5"  # a column that is not read
    put(log, b"\n".join([content[0], b"\t".join(cells), *content[2:]]), record(whole / "votes.tsv"))
    assert merged(log).idx.tolist() == list(range(8))


def test_shards_that_are_missing_are_named_up_to_a_few(whole):
    log = whole / "shard.tsv"
    (whole / "merged.tsv").unlink(missing_ok=True)
    kept = {"start": 0, "stop": 100, "skip": 1, "shard": [0, 50]}
    text = json.dumps({**json.loads(record(whole / "votes.tsv")), "images": 100, "selection": kept})
    lines = (whole / "votes.tsv").read_bytes().split(b"\n")
    put(log, b"\n".join([lines[0], lines[1], b"50" + lines[2][1:], b""]), text.encode())
    with pytest.raises(
        ResultsError, match=r"98 images are missing, the first is image 1, so is shard 1/50, .*0/50, \.\.\."
    ):
        merge_results([log], whole / "merged.tsv")
