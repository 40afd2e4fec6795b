"The coverage suite in small: the audit keeps its rates; counting only recipients is caught."

import json

import numpy as np
import pandas as pd
import pytest

from smsbench.cli.commands import main
from smsbench.audit.coverage import Grid, judge_all, make_entries, read_grid, run_grid
from smsbench.audit.metrics import Cells, answer_table, flipped, measure
from smsbench.audit.simulate import make_setting, simulate, truth
from smsbench.audit.verdicts import give_verdicts

STATEMENTS = (
    'sensitivity, 12 of 12',
    'sensitivity, 15 of 300',
    'flips, up to 8 images',
    'flips, prevalence .1',
    'text following',
    'at the margin, 5 % informative images',
    'a refuser',
)


def entries(**line):
    return make_entries(dict(name='only', **line), {})


def recipients_only(x, patients):
    "Mean and interval of x as if donors were fixed: clusters are the patients who are asked."
    totals = pd.Series(x - x.mean()).groupby(patients).sum()
    half = 1.96 * np.sqrt((totals**2).sum()) / len(x)
    return x.mean(), x.mean() - half, x.mean() + half


def flips_of(plan, predictions):
    "Flips under another image and under one of the same class, with the patient who is asked."
    cells = Cells(answer_table(plan, predictions))
    arms = ('image_swap', 'image_swap_same')
    return [flipped(cells, a, 'original').astype(float) for a in arms], cells.patients


def naive_measure(plan, predictions, **_):
    (other, _), patients = flips_of(plan, predictions)
    value, low, high = recipients_only(other, patients)
    n = len(set(patients))
    row = dict(subgroup='all', metric='flips', arm='image_swap', value=value, n_clusters=n)
    return pd.DataFrame([dict(row, ci_low=low, ci_high=high)])


def naive_verdicts(plan, predictions, delivery, margin=0.05):
    (other, same), patients = flips_of(plan, predictions)
    value, low, _ = recipients_only(other - same, patients)
    word = 'relies' if low > margin else 'undecided'
    record = dict(verdict=word, value=value, n_patients=len(set(patients)))
    both = dict(relies_on_image=record, relies_on_text=record)
    return dict(models=dict(simulated=dict(both, findings={})))


def test_the_statements_are_settings_of_the_grid():
    names = [e.name for e in read_grid().entries]
    assert all(any(n.startswith(s) for n in names) for s in STATEMENTS)
    margin = [e for e in read_grid().entries if 'margin' in e.name]
    assert sum(e.audits for e in margin) >= 10_000
    prevalence = {float(p) for e in margin for p in np.atleast_1d(e.setting.prevalence)}
    patients = {e.setting.patients for e in read_grid().entries}
    assert (min(prevalence), max(prevalence)) == (0.05, 0.5)
    assert min(patients) == 30 and max(patients) >= 1000


def test_the_small_suite_keeps_its_rates():
    found = run_grid(read_grid(small=True, audits=6), workers=1)
    summary = found['summary']
    assert found['complete'] and summary['rates']['broken'] == 0, summary['beyond']
    twelve = next(s for n, s in found['settings'].items() if n.startswith('sensitivity, 12'))
    bound = next(r for r in twelve['coverage'] if r['metric'] == 'sensitivity')
    assert abs(bound['mean_low'] - 0.7354) < 0.001 and bound['mean_patients'] == 12
    refuser = next(s for n, s in found['settings'].items() if n.startswith('a refuser'))
    assert 'ignores' not in refuser['verdicts'][0]['shares']


def test_an_interval_that_counts_only_recipients_is_caught():
    rare = entries(
        asks=['intervals'],
        audits=40,
        patients=200,
        prevalence=0.1,
        spread=1.2,
        model=dict(image_weight=1, text_weight=0.6),
        arms=['image_swap'],
    )
    caught = run_grid(Grid(entries=rare), workers=1, engine=(naive_measure, give_verdicts))
    judged = [r for r in caught['settings']['only']['coverage'] if r['metric'] == 'flips']
    assert judged[0]['rate'] < 0.85
    alone = judge_all(dict(only=dict(caught['settings']['only'], coverage=judged, verdicts=[])))
    assert alone['rates']['broken'] == 1, alone


def test_a_verdict_that_counts_only_recipients_is_caught():
    rare = entries(audits=60, patients=200, prevalence=0.05, visible=0.05, arms=['image_swap'])
    caught = run_grid(Grid(entries=rare), workers=1, engine=(measure, naive_verdicts))
    beyond = {r['what']: r for r in caught['summary']['beyond']}
    assert beyond["false 'relies' (image)"]['outcome'] == 'broken', caught['summary']


def stubborn(image, text, rng, lean=1.0):
    "A model of one's own: leans to yes, and looks only where there is no report."
    return np.where(np.isnan(text), np.nan_to_num(image), lean)


def test_a_model_of_your_own_is_named_in_the_grid():
    own = dict(name=f'{__name__}:stubborn', lean=2)
    setting = make_setting(dict(patients=40, arms=['image_only'], model=own))
    _, answers, _ = simulate(setting)
    exact = truth(setting, n=10_000)
    assert exact['accuracy', 'original'] == 0.5 and exact['accuracy', 'image_only'] == 1
    assert set(answers.answer) == {'yes', 'no'}


@pytest.mark.parametrize(
    'text, words',
    [
        ('settings: [{name: a, patient: 30}]', 'patient'),
        ("settings: [{name: a, model: {name: 'nowhere:f'}}]", 'module:function'),
        ('settings: 3', 'list named settings'),
        (
            'settings: [{name: hopeless, model: {image_weight: 0},'
            ' solve: {unknown: visible, quantity: excess_image, value: .5}}]',
            'hopeless: solve: excess_image is never 0.5',
        ),
    ],
)
def test_a_grid_that_is_wrong_ends_in_one_line(tmp_path, capsys, text, words):
    (tmp_path / 'g.yaml').write_text(text)
    files = ['--grid', str(tmp_path / 'g.yaml'), '--out', str(tmp_path / 'o.json')]
    assert main(['coverage', *files, '--workers', '1']) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert words in line and line.startswith('smsbench: ')


def test_power_finds_what_theory_knows(capsys):
    args = 'power --verdict ignores --donors 1 --studies 15 --most 160 --workers 1 --json'
    assert main(args.split()) == 0
    plan = json.loads(capsys.readouterr().out)[0]
    assert 59 <= plan['patients'] <= 110  # the exact bound of 5 % needs 59, unequal classes more
