"Broken inputs of every kind end in one clear line."

import pytest

from smsbench.cli.commands import main
from smsbench.core import InputError
from smsbench.testing.fuzz import Target, faults, fuzz, make_targets, outcome


@pytest.fixture(scope='module')
def targets(tmp_path_factory):
    return make_targets(tmp_path_factory.mktemp('fuzz'))


def test_no_broken_input_raises(targets):
    "Every target in turn; `python -m smsbench.testing.fuzz --n 100000` goes on from here."
    counts = fuzz(targets, 12 * len(targets), seed=5)
    assert counts.inputs.sum() == 12 * len(targets)
    assert faults(counts).empty, faults(counts).to_string()
    assert counts[counts.outcome == 'refused'].inputs.sum() > 3 * len(targets)


def test_a_fault_would_be_found(tmp_path):
    "A reader that trusts its input is caught, and its input is kept."
    import json

    path = tmp_path / 'x.json'
    path.write_text('{"a": {"b": 1}}')
    trusting = Target({path: path.read_bytes()}, lambda: json.loads(path.read_text())['a']['b'])
    found = faults(fuzz(dict(trusting=trusting), 200, keep=tmp_path / 'kept'))
    assert found.inputs.sum() > 20 and any((tmp_path / 'kept').iterdir())
    assert path.read_text() == '{"a": {"b": 1}}'


def test_two_lines_are_not_one(tmp_path):
    def says(words):
        raise InputError(words)

    assert outcome(lambda: says('one\nand two \x1b[31m')) == 'refused'  # they are made one
    assert outcome(lambda: says('')) != 'refused'


@pytest.mark.parametrize(
    'value', ['[', '"', '@', '!x', '*x', '2026-99-99', '\ud800', '\x00', '{a', '!!int x']
)
def test_a_broken_setting_is_one_line(value, tmp_path, capsys):
    words = ['--cohort', 'c.parquet', '--model', 'x', '--out', str(tmp_path / 'r')]
    assert main(['clip', 'train', *words, '--set', f'lr={value}']) == 2
    err = capsys.readouterr().err
    assert err.startswith('smsbench: ') and err.count('\n') == 1 and err[:-1].isprintable()
