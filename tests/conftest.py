"What several tests share."

import os, subprocess, sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def open_words():
    "A test that reads credentialed data does not silence the messages of the next one."
    from smsbench.privacy import open_messages

    open_messages()


@pytest.fixture
def cli(tmp_path):
    "Run `smsbench …` as a person would; returns (exit code, stdout, stderr)."

    def run(*args, cwd=tmp_path, timeout=1500):
        p = subprocess.run(
            [Path(sys.executable).parent / 'smsbench', *map(str, args)],
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=timeout,
            env={**os.environ, 'OMP_NUM_THREADS': '1'},
        )
        return p.returncode, p.stdout, p.stderr

    return run


@pytest.fixture
def here(tmp_path, monkeypatch, capfd):
    "`smsbench …` in this process: the same words and exit code, without the seconds of a start."
    from smsbench.cli.commands import main

    def run(*args):
        monkeypatch.chdir(tmp_path)
        capfd.readouterr()
        return (main([*map(str, args)]), *capfd.readouterr())

    return run


@pytest.fixture(scope='session')
def real_data():
    "The folder of real data named by SMSBENCH_DATA; the test is skipped where there is none."
    folder = os.environ.get('SMSBENCH_DATA', '')
    if not folder:
        pytest.skip('SMSBENCH_DATA does not name a folder of real data')
    if not Path(folder).is_absolute():
        pytest.fail('SMSBENCH_DATA must be an absolute path')
    return Path(folder)
