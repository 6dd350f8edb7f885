"""`rs-plugins run`: the process is what plain python would have started, with our names in it."""

import json
import os
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from click.testing import CliRunner

from rs_plugins.cli import main
from rs_plugins.cli.run import activated_environment, command_line, site_path

RUN = [str(Path(sys.executable).parent / "rs-plugins"), "run"]
# What a program can see of how it was started. Our folder on the path is the one difference that is meant.
WITNESS = """
import json, sys
print(json.dumps([sys.argv, __name__, globals().get("__file__"), sys.path, sys.stdin.read(), sys.flags.optimize]))
sys.exit(7)
"""


def execute(words, *, path=None, stdin="", cwd=None, **extra):
    environ = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "RS_PLUGINS_STRICT")}
    environ |= extra | ({"PYTHONPATH": str(path)} if path else {})
    return subprocess.run(words, input=stdin, cwd=cwd, env=environ, capture_output=True, text=True, timeout=600)


def value(done):
    """Return the one line of a process that must have succeeded."""
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def witness(done):
    assert done.returncode == 7, done.stderr
    seen = json.loads(done.stdout)
    seen[3] = [entry for entry in seen[3] if entry != site_path()]
    return seen


@pytest.fixture
def fakehost(site):
    site.write("fakehost.py", "__all__ = ['theirs']\ntheirs = 1")
    site.exporting("fake", ("fakehost", "dumps", "json:dumps"))
    return site


FORMS = {
    "script": ["script.py", "a", "--help", "-h", "--version", "-m", "--", "-"],
    "script in a folder": ["folder/script.py", "--no-such-option"],
    "module": ["-m", "package.module", "--help", "x"],
    "code": ["-c", WITNESS, "--help", "-x", "y z"],
    "stdin": ["-", "--help"],
    "folder with main": ["app", "--version"],
    "zip with main": ["app.zip", "-h"],
    "script without suffix": ["./bare", "--help"],
}


@pytest.mark.parametrize("form", FORMS)
def test_the_program_cannot_tell_that_it_was_run_by_us(tmp_path, form):
    for name in ("script.py", "folder/script.py", "package/module.py", "app/__main__.py", "bare"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(WITNESS)
    with zipfile.ZipFile(tmp_path / "app.zip", "w") as file:
        file.writestr("__main__.py", WITNESS)
    stdin = WITNESS if form == "stdin" else "typed in"
    plain = execute([sys.executable, *FORMS[form]], cwd=tmp_path, stdin=stdin)
    ours = execute([*RUN, *FORMS[form]], cwd=tmp_path, stdin=stdin)
    assert witness(ours) == witness(plain)


def test_a_double_dash_ends_our_own_options(tmp_path):
    assert value(execute([*RUN, "--", "-c", "import sys; print(sys.argv)", "--", "x"])) == "['-c', '--', 'x']"


def test_names_are_there_in_the_whole_process_tree_and_nothing_heavy_is_loaded(fakehost):
    child = "import fakehost, sys; print(fakehost.dumps.__name__, fakehost.__all__, 'torch' in sys.modules)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}], check=True)"
    done = execute([*RUN, "-c", parent], path=fakehost.folder)
    assert value(done) == "dumps ['theirs', 'dumps'] False"


def test_a_program_from_our_own_environment_comes_first(fakehost, tmp_path):
    (tmp_path / "python").write_text("#!/bin/sh\necho the wrong python\n")
    (tmp_path / "python").chmod(0o755)
    (tmp_path / "their-tool").write_text(
        f"#!/bin/sh\nexec {sys.executable} -c 'import fakehost; print(fakehost.dumps)'\n"
    )
    (tmp_path / "their-tool").chmod(0o755)
    extra = {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    assert value(execute([*RUN, "python", "-c", "import sys; print(sys.prefix)"], **extra)) == sys.prefix
    assert "function dumps" in value(execute([*RUN, "their-tool"], path=fakehost.folder, **extra))
    assert "function dumps" in value(execute([*RUN, "./their-tool"], path=fakehost.folder, cwd=tmp_path))


def test_a_signal_is_a_signal():
    done = execute([*RUN, "-c", "import os, signal; os.kill(os.getpid(), signal.SIGTERM)"])
    assert done.returncode == -signal.SIGTERM


def test_an_existing_sitecustomize_runs_too_and_keeps_its_name(fakehost):
    fakehost.write("sitecustomize.py", "import sys\nsys.theirs = __file__")
    code = "import sys, sitecustomize, fakehost; print(sys.theirs == sitecustomize.__file__, fakehost.dumps.__name__)"
    assert value(execute([*RUN, "-c", code], path=fakehost.folder)) == "True dumps"


def test_an_existing_sitecustomize_that_fails_fails_as_always(fakehost):
    fakehost.write("sitecustomize.py", "raise RuntimeError('theirs')")
    done = execute([*RUN, "-c", "import fakehost; print(fakehost.dumps.__name__)"], path=fakehost.folder)
    assert value(done) == "dumps"
    assert "RuntimeError: theirs" in done.stderr


def test_the_site_folder_on_pythonpath_does_the_same(fakehost):
    folder = value(execute([RUN[0], "site-dir"]))
    assert folder == site_path()
    path = os.pathsep.join([folder, str(fakehost.folder)])
    assert (
        value(execute([sys.executable, "-c", "import fakehost; print(fakehost.dumps.__name__)"], path=path)) == "dumps"
    )


@pytest.mark.parametrize("flag", ["-I", "-E", "-S"])
def test_an_interpreter_that_ignores_the_environment_is_not_activated(flag):
    """Documented as what cannot work; if one of these starts to work, the documentation is to be changed."""
    code = "import sys; print([type(finder).__name__ for finder in sys.meta_path].count('ImportWatcher'))"
    assert value(execute([*RUN, "python", "-c", code])) == "1"
    assert value(execute([*RUN, "python", flag, "-c", code])) == "0"


def test_an_interpreter_without_rs_plugins_is_left_in_peace():
    code = "import importlib.util, sitecustomize; assert importlib.util.find_spec('rs_plugins') is None"
    done = execute([sys.executable, "-S", "-c", code], path=site_path(), cwd="/")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_broken_plugin_is_a_warning_and_under_strict_the_end(fakehost):
    fakehost.plugin("bad", "import no_such_module_x")
    code = "import fakehost; print(fakehost.dumps.__name__)"
    loose = execute([*RUN, "-c", code], path=fakehost.folder)
    assert value(loose) == "dumps"
    assert loose.stderr.count("PluginWarning: plugin 'bad' (dist-bad 1.0) is left out: ModuleNotFoundError") == 1
    strict = execute([*RUN, "-c", code], path=fakehost.folder, RS_PLUGINS_STRICT="1")
    assert (strict.returncode, strict.stdout) == (1, "")
    assert strict.stderr.startswith("rs-plugins: not activated: plugin 'bad' (dist-bad 1.0) is left out: Module")
    assert "Traceback" not in strict.stderr


def test_warnings_as_errors_do_not_lose_the_plugins_that_work(fakehost):
    fakehost.plugin("bad", "import no_such_module_x")
    done = execute(
        [*RUN, "python", "-W", "error", "-c", "import fakehost; print(fakehost.dumps)"], path=fakehost.folder
    )
    assert "function dumps" in value(done)
    assert "rs-plugins: plugin 'bad' (dist-bad 1.0) is left out" in done.stderr


MISTAKES = {
    (): (2, "nothing to run; name a script, -m MODULE, -c CODE or a program"),
    ("-m",): (2, "-m needs a module after it"),
    ("-c",): (2, "-c needs code after it"),
    ("-x", "script.py"): (2, "no such option: -x; options of Python itself go here: rs-plugins run python -x ..."),
    ("nowhere.py", "--help"): (2, "no such file: nowhere.py"),
    ("empty",): (2, "empty is a folder without a __main__.py"),
    ("no-such-program-here",): (
        127,
        "no such script or program: no-such-program-here; a module is run with: rs-plugins run -m",
    ),
    ("./no-such-program-here",): (127, "no such script or program: ./no-such-program-here\n"),
    ("./nonsense",): (126, "cannot execute ./nonsense: Exec format error"),
}


@pytest.mark.parametrize("words", MISTAKES, ids=" ".join)
def test_mistakes(words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "nonsense").write_text("neither a script nor a program")
    (tmp_path / "nonsense").chmod(0o755)
    result = CliRunner().invoke(main, ["run", *words])
    code, message = MISTAKES[words]
    assert message in result.output
    assert result.exit_code == code


@pytest.mark.parametrize("word", ["-h", "--help"])
def test_help_is_ours_only_in_first_place(word):
    result = CliRunner().invoke(main, ["run", word])
    assert result.exit_code == 0
    assert "SCRIPT...|-m MODULE...|-c CODE...|PROGRAM..." in result.output
    assert command_line(["-m", "json.tool", word]) == [sys.executable, "-m", "json.tool", word]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (None, ["OURS"]),
        ("", ["OURS"]),
        ("/a:/b", ["OURS", "/a", "/b"]),
        ("/a::/b", ["OURS", "/a", "", "/b"]),
        ("/a:OURS:/b", ["OURS", "/a", "/b"]),
    ],
)
def test_pythonpath_begins_with_our_folder_and_keeps_the_rest(before, after):
    environ = {"X": "1"} | ({} if before is None else {"PYTHONPATH": before.replace("OURS", site_path())})
    expected = ":".join(after).replace("OURS", site_path())
    assert activated_environment(environ) == {"X": "1", "PYTHONPATH": expected}


def test_run_imports_no_torch_before_it_starts_the_program():
    code = """
import os, sys
def execve(path, argv, environ):
    print(sorted({"torch", "numpy", "art", "torchattacks", "pluggy"} & set(sys.modules)), argv[1:])
    os._exit(0)
os.execve, sys.argv = execve, ["rs-plugins", "run", "-m", "json.tool"]
print = __import__("functools").partial(print, flush=True)
from rs_plugins.cli import main
main()
"""
    assert value(execute([sys.executable, "-c", code])) == "[] ['-m', 'json.tool']"


def test_help_lists_the_verbs_without_importing_them():
    code = "import sys; from rs_plugins.cli import main; main(['--help'], standalone_mode=False); "
    code += "print([name for name in sys.modules if name.startswith('rs_plugins.cli.')])"
    output = value(execute([sys.executable, "-c", code]))
    assert output.endswith("[]")
    for verb in ("run", "list", "doctor", "site-dir"):
        assert f"\n  {verb} " in output


def test_an_unknown_verb():
    result = CliRunner().invoke(main, ["rnu"])
    assert result.exit_code == 2
    assert "No such command 'rnu'" in result.output
