"The public names: few, light, and each with an example that runs."

import doctest, importlib, json, subprocess, sys
from importlib.resources import files

import pandas as pd
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


def test_the_keywords_of_the_version_before_give_the_same_numbers(tmp_path):
    from pandas.testing import assert_frame_equal as same
    from smsbench import Bootstrap, evaluate, give_verdicts, measure, reanalyse, retrieve
    from smsbench.published.files import example_results
    from smsbench.testing.tiny_clip import tiny_clip

    def both(function, *args, **how):
        boot = dict(draws=how['n_boot']) | {k: v for k, v in how.items() if k != 'n_boot'}
        with pytest.warns(DeprecationWarning, match=f'{function.__name__}: old keywords n_boot'):
            before = function(*args, **how)
        return before, function(*args, boot=Bootstrap(**boot))

    cohort = smsbench.phantom_cohort(24)
    plan, _ = smsbench.make_plan(cohort, ('image_swap',))
    model = smsbench.planted('image-only')
    answers = smsbench.score_trials(list(plan.itertuples()), smsbench.Source(cohort), model)
    answers = pd.DataFrame([dict(model='a', **r) for r in answers])
    before, now = both(measure, plan, answers, n_boot=40, level=0.9, seed=2, minimum=3)
    same(before, now)
    assert before.attrs == now.attrs and before.attrs['n_boot'] == 40
    told = plan, answers, smsbench.prove_delivery(plan, answers)
    with pytest.warns(DeprecationWarning, match='leave them out'):
        assert give_verdicts(*told, n_boot=9, seed=1) == give_verdicts(*told)

    files = example_results(tmp_path / 'results', n=80)
    with pytest.warns(DeprecationWarning, match='reanalyse'):
        before, _ = reanalyse(files, 'example', tmp_path / 'run', n_boot=30, seed=1)
    # the same configuration, so the run is read again and not refused
    now, _ = reanalyse(files, 'example', tmp_path / 'run', boot=Bootstrap(30, seed=1))
    same(before, now)
    refused(
        lambda: reanalyse(files, 'example', tmp_path / 'run', boot=Bootstrap(30, 0.9, 1)), 'level'
    )

    clip = smsbench.load_clip(str(tiny_clip(tmp_path / 'clip', 'native')), device='cpu')
    images = smsbench.images_of(smsbench.phantom_cohort(60, splits=dict(val=0.5, test=0.5)))
    before, now = both(evaluate, clip, images, n_boot=30, level=0.9, seed=2, minimum=3)
    same(before.metrics, now.metrics)
    same(*both(retrieve, clip, images.select('test'), n_boot=30, seed=2))
    refused(lambda: measure(plan, answers, 300), '300', 'Bootstrap(draws=500)')
