"""The command line: options, exit statuses, and what it says when something is missing."""

import subprocess
import sys

import pytest

from keras_qwrap import __version__, cli, demo


@pytest.fixture
def calls(monkeypatch):
    """The arguments that the demo was run with; it ends with status 1."""
    received = []

    def run(*arguments):
        received.append(arguments)
        return 1

    monkeypatch.setattr(demo, "run", run)
    return received


def test_version(capsys):
    with pytest.raises(SystemExit) as exit:
        cli.main(["--version"])
    assert exit.value.code == 0
    assert capsys.readouterr().out == f"keras_qwrap {__version__}\n"


def test_options_reach_the_demo_and_its_status_comes_back(calls, tmp_path):
    folder = str(tmp_path / "a" / "b")
    options = ["--bits", "4", "--epochs", "3", "--seed", "5", "--output", folder]
    assert cli.main(["demo", *options]) == 1
    assert calls == [(4, 3, 5, folder)]
    assert (tmp_path / "a" / "b").is_dir()


def test_defaults_are_those_of_the_help(calls, capsys):
    cli.main(["demo"])
    assert calls == [(8, 12, 0, None)]
    with pytest.raises(SystemExit):
        cli.main(["demo", "--help"])
    help_text = " ".join(capsys.readouterr().out.split())
    assert "2 to 16 (8)" in help_text
    assert "with quantization (12)" in help_text
    assert "batches (0)" in help_text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["demo", "--bits", "1"], "--bits: received '1', expected a whole number from 2 to 16"),
        (["demo", "--bits", "17"], "--bits: received '17', expected a whole number from 2 to 16"),
        (["demo", "--bits", "8.5"], "--bits: received '8.5', expected a whole number"),
        (["demo", "--epochs", "0"], "--epochs: received '0', expected a whole number from 1"),
        (["demo", "--seed", "-1"], "--seed: received '-1', expected a whole number from 0"),
        (["demo", "--seed", "4294967296"], "expected a whole number from 0 to 4294967295"),
        (["demo", "--output", __file__], f"--output: received '{__file__}', expected a folder"),
        (["nothing"], "invalid choice: 'nothing'"),
        ([], "the following arguments are required: command"),
    ],
)
def test_wrong_arguments_are_refused(calls, capsys, arguments, message):
    with pytest.raises(SystemExit) as exit:
        cli.main(arguments)
    assert exit.value.code == 2
    assert message in capsys.readouterr().err
    assert calls == []


@pytest.mark.parametrize(
    ("missing", "named"),
    [(["rich"], "rich"), (["sklearn"], "sklearn"), (["rich", "sklearn"], "rich and sklearn")],
)
def test_a_missing_extra_is_named(calls, monkeypatch, capsys, missing, named):
    for name in missing:
        monkeypatch.setitem(sys.modules, name, None)
    assert cli.main(["demo"]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert f"The demo needs {named}, which cannot be imported." in printed.err
    assert "python -m pip install 'keras_qwrap[demo]'" in printed.err
    assert calls == []


@pytest.mark.slow
def test_without_the_extra_as_a_process():
    """Guards against an import of the demo, and so of the extra, before the check."""
    code = (
        "import sys; from keras_qwrap.cli import main\n"
        "sys.modules.update(rich=None, sklearn=None); sys.exit(main(['demo']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2
    assert "The demo needs rich and sklearn" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_module_runs_as_a_command():
    command = [sys.executable, "-m", "keras_qwrap", "--version"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"keras_qwrap {__version__}\n")
