"The public names: few, light, and each with an example that runs."

import doctest, importlib, json, subprocess, sys
from importlib.resources import files

import pytest

import smsbench
from smsbench.testing.refused import refused

FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
DATA = {'ARMS'}  # is no function or class, so it has no docstring


def test_the_examples_of_the_public_names_run_in_their_order(tmp_path, monkeypatch):
    "One study from made-up films to a trained model, as a reader of the docstrings would type it."
    monkeypatch.chdir(tmp_path)
    names = {n: getattr(smsbench, n) for n in smsbench.__all__}
    runner, parser = doctest.DocTestRunner(optionflags=FLAGS), doctest.DocTestParser()
    for name in smsbench.__all__:
        if name in DATA:
            continue
        example = parser.get_doctest(names[name].__doc__ or '', names, name, name, 0)
        assert example.examples, f'{name} shows no example'
        example.globs = names  # what one example makes the next may use
        runner.run(example, clear_globs=False)
    assert runner.failures == 0, f'{runner.failures} of {runner.tries} lines (printed above)'


def test_the_door_is_small_and_says_what_it_does_not_have():
    assert len(smsbench.__all__) <= 45 and set(smsbench.__all__) <= set(dir(smsbench))
    assert smsbench.ARMS['image_swap'].control == 'image_swap_same'
    refused(lambda: smsbench.nowhere, 'no attribute', error=AttributeError)


def test_importing_the_package_loads_nothing_heavy():
    heavy = "{'torch', 'transformers', 'pandas', 'numpy', 'matplotlib'} & set(sys.modules)"
    code = f'import sys, smsbench; dir(smsbench); print({heavy})'
    run = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == 'set()'


def test_old_module_names_work_with_a_warning():
    with pytest.warns(DeprecationWarning, match='audit.plan'):
        old = importlib.import_module('smsbench.sms.shifts')
    assert old.make_plan is smsbench.make_plan
    from smsbench.cli import main

    assert callable(main)


def test_every_old_name_leads_somewhere():
    table = json.loads(files('smsbench').joinpath('aliases.json').read_text())
    held = {
        new: vars(importlib.import_module(f'smsbench.{new}')) for new in table['modules'].values()
    }
    assert all(held.values())
    for old, new in table['moved'].items():
        assert old.split(':')[1] in vars(importlib.import_module(f'smsbench.{new}')), old
    assert {
        n for n in table['renamed'].values() if not any(n in names for names in held.values())
    } == set()


@pytest.mark.parametrize(
    'name', ['privacy.Teller', 'data.phantom.draw_film', 'report.html.render_run']
)
def test_names_that_changed_in_their_module_work_with_a_warning(name):
    module, _, old = name.rpartition('.')
    with pytest.warns(DeprecationWarning, match=old):
        assert callable(getattr(importlib.import_module(f'smsbench.{module}'), old))
