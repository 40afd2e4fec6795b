"Planted models through the whole audit: what was planted is what comes out."

import json
import math

import numpy as np
import pandas as pd
import pytest

from smsbench import Bootstrap
from smsbench.core import Run
from smsbench.data.phantom import phantom_cohort
from smsbench.audit.runner import Source, score_trials
from smsbench.audit.delivery import prove_delivery
from smsbench.audit.exchange import export_trials, import_predictions
from smsbench.audit.metrics import measure
from smsbench.audit.run import AuditSettings, load_results, run_audit, score_model, void_lines
from smsbench.audit.plan import make_plan
from smsbench.audit.verdicts import give_verdicts
from smsbench.testing.planted import PRIOR, STRENGTH, own_number, planted

WEIGHTS = (0.1, 0.25, 0.4, 0.6, 0.75, 0.9)
HABITS = {
    'planted:text-only': ('ignores', 'relies'),
    'planted:image-only': ('relies', 'ignores'),
    'planted:image-dropper': ('ignores', 'relies'),
    **{f'planted:mixture:{w}': ('relies', 'relies') for w in WEIGHTS if 0.25 <= w <= 0.75},
}

ONE_ANSWER = (
    'planted:constant',
    'planted:template-parrot',
)  # one answer to every sample of `original`


@pytest.fixture(scope='module')
def cohort():
    return phantom_cohort(240, size=64, seed=4)


@pytest.fixture(scope='module')
def results(cohort, tmp_path_factory):
    models = sorted(set(HABITS) | {f'planted:mixture:{w}' for w in WEIGHTS}) + [
        'planted:miscalibrated:2',
        *ONE_ANSWER,
        'planted:contradiction',
    ]
    arms = (
        'image_swap',
        'text_swap',
        'text_only',
        'image_only',
        'neither',
        'identity',
        'image_only_swap',
        'occlude_finding',
    )
    return load_results(
        run_audit(
            tmp_path_factory.mktemp('truth') / 'run',
            cohort,
            models,
            settings=AuditSettings(arms=arms, n_boot=400, family='model'),
            batch_size=64,
        ).path
    )


def number(results, model, metric, arm=''):
    m = results.metrics
    return m[
        (m.model == model) & (m.metric == metric) & (m.arm == arm) & (m.subgroup == 'all')
    ].iloc[0]


def test_verdicts_are_as_planted(results):
    models = results.verdicts
    got = {
        k: tuple(models[k][f'relies_on_{m}']['verdict'] for m in ('image', 'text')) for k in models
    }
    for name, expected in HABITS.items():
        match = [k for k in got if k == name or k.startswith(name + ':')]
        assert match and got[match[0]] == expected, (name, got)
    assert all(v['void_arms'] == [] for v in models.values())


@pytest.mark.parametrize('w', WEIGHTS)
def test_weights_are_recovered_within_the_interval(results, w):
    image, text, both = (
        number(results, f'planted:mixture:{w}', k) for k in ('phi_image', 'phi_text', 'interaction')
    )
    for got, truth in ((image, w * STRENGTH), (text, (1 - w) * STRENGTH), (both, 0)):
        assert got.ci_low - 1e-9 <= truth <= got.ci_high + 1e-9, (got, truth)


def test_noise_floor_of_a_deterministic_model_is_zero(results):
    for model in results.verdicts:
        floor = number(results, model, 'noise_floor', 'identity')
        assert (
            floor.value == floor.ci_high == 0
            and number(results, model, 'flips', 'identity').value == 0
        )


def test_text_following_and_silencing(results):
    assert (
        number(results, 'planted:text-only', 'text_following').value == 1
        and number(results, 'planted:image-only', 'text_following').value == 0
    )
    assert (
        number(results, 'planted:mixture:0.4', 'silencing').value == 1
    )  # the film decides alone, and is overruled by the report
    assert number(results, 'planted:image-only', 'silencing').value == 0
    assert (
        number(results, 'planted:image-only', 'region_dependence').value > 0.5
        and number(results, 'planted:text-only', 'region_dependence').value == 0
    )


def test_a_harness_that_forgets_to_swap_is_void(cohort, tmp_path):
    class Forgets(Source):
        def inputs(self, trial):
            return super().inputs(
                trial._replace(image_id=trial.sample_id) if trial.arm == 'image_swap' else trial
            )

    plan, _ = make_plan(cohort, ['image_swap', 'text_swap'])
    found = prove_delivery(
        plan, score_model('planted:image-only', plan, Forgets(cohort), run=Run(tmp_path))
    )
    assert {a: v['verdict'] for a, v in found['planted:image-only'].items()} == {
        'original': 'ok',
        'image_swap': 'void',
        'image_swap_same': 'ok',
        'text_swap': 'ok',
        'text_swap_same': 'ok',
    }
    assert 'image_swap' in void_lines(found)[0]


def test_the_miscalibration_is_measured(results):
    name = next(k for k in results.verdicts if k.startswith('planted:miscalibrated'))
    assert (
        number(results, name, 'ece', 'original').value
        > 2 * number(results, 'planted:text-only', 'ece', 'original').value
    )


@pytest.mark.parametrize('name', ONE_ANSWER)
def test_a_model_with_one_answer_for_all_has_no_verdict(results, name):
    found = next(v for k, v in results.verdicts.items() if k.startswith(name))
    assert found['answers']['state'] == 'does not answer' and found['answers']['reasons']
    assert [found[f'relies_on_{m}']['verdict'] for m in ('image', 'text')] == [None, None]
    assert found['caveats'][0]['kind'] == 'does_not_answer'


def test_the_parrot_changes_with_the_template_alone(results):
    name = 'planted:template-parrot'
    removals = ('text_only', 'image_only', 'neither')
    removed = [number(results, name, 'flips', a).value for a in removals]
    swapped = [number(results, name, 'flips', a).value for a in ('image_swap', 'text_swap')]
    assert removed == [1, 1, 1] and swapped == [0, 0]


def test_contradiction_moves_with_either(results):
    for arm in ('image_swap', 'text_swap'):
        assert number(results, 'planted:contradiction', 'excess_flips', arm).value == 1


def asked(names, cohort, match=(), **plan_options):
    "Plan and predictions of planted models under both swaps."
    plan, _ = make_plan(cohort, ('image_swap', 'text_swap'), match=match, **plan_options)
    trials, source = list(plan.itertuples(index=False)), Source(cohort)
    rows = [
        dict(model=name, **row)
        for name in names
        for row in score_trials(trials, source, planted(name))
    ]
    return plan, pd.DataFrame(rows)


def verdicts(plan, predictions, **how):
    "Verdicts of all models, delivery proven."
    return give_verdicts(
        plan, predictions, prove_delivery(plan, predictions), **{'family': 'none'} | how
    )['models']


def near(value, p, n):
    "Within four standard errors of a share."
    return abs(value - p) <= 4 * math.sqrt(max(p * (1 - p), 1 / n) / n)


DOSES = (0, 0.02, 0.1, 0.25, 0.4, 0.6, 1)


@pytest.fixture(scope='module')
def doses(cohort):
    names = [f'planted:{kind}:{w:g}' for kind in ('mixture', 'looks') for w in DOSES]
    return verdicts(*asked(names, cohort))


@pytest.mark.parametrize('kind', ['mixture', 'looks'])
def test_the_response_rises_with_the_dose(doses, kind):
    image, text = (
        [doses[f'planted:{kind}:{w:g}'][f'relies_on_{m}'] for w in DOSES] for m in ('image', 'text')
    )
    for found, sign in ((image, 1), (text, -1)):
        assert (sign * np.diff([v['value'] for v in found]) >= 0).all()
        relies = [v['verdict'] == 'relies' for v in found][::sign]
        assert relies == sorted(relies) and not relies[0] and relies[-1]  # and stays so
    assert image[0]['verdict'] == 'ignores' == text[-1]['verdict']


def test_the_response_of_a_mixture_is_the_closed_form(doses, cohort):
    def moved(w, sign):
        p = [
            1 / (1 + math.exp(-v - PRIOR)) for v in (sign * STRENGTH, sign * STRENGTH * (1 - 2 * w))
        ]
        return 1.0 if (p[0] > 0.5) != (p[1] > 0.5) else abs(p[0] - p[1])

    signs = np.where(cohort.label == 'yes', 1, -1)
    for w in DOSES:
        expected = np.mean([moved(w, s) for s in signs])
        assert np.isclose(doses[f'planted:mixture:{w:g}']['relies_on_image']['value'], expected)


def test_the_response_of_looking_is_the_share_of_reports(doses, cohort):
    own = np.array([own_number('effusion', t) for t in cohort.text])
    for w in DOSES:
        value = doses[f'planted:looks:{w:g}']['relies_on_image']['value']
        assert np.isclose(value, np.mean(own < w))
        assert near(np.mean(own < w), w, len(cohort))


REFUSES = ('planted:refuser:0.3', 'planted:refuser:0.6', 'planted:refuser:1')


def through_a_file(plan, predictions, cohort, folder):
    "The same answers in words, written to a file and read back; one model."
    export_trials(plan, Source(cohort), folder / 'trials.jsonl')
    lines = [
        json.dumps(
            dict(
                trial_id=r.trial_id,
                raw_text=r.raw_text,
                pixel_sha=r.pixel_sha,
                token_sha=r.token_sha,
                delivered_sha=r.delivered_sha,
            )
        )
        for r in predictions.itertuples()
    ]
    (folder / 'answers.jsonl').write_text('\n'.join(lines) + '\n')
    name = predictions.model.iloc[0]
    return import_predictions(folder / 'answers.jsonl', plan, Run(folder / 'run'), name=name)


@pytest.mark.parametrize('way', ['tie', 'refused'])
@pytest.mark.parametrize('name', REFUSES)
def test_a_refuser_is_not_said_to_ignore_the_image(cohort, tmp_path, name, way):
    "Read from the logits a refusal is a tie, in words it is `refused`: neither is dropped."
    plan, predictions = asked([name], cohort)
    if way == 'refused':
        predictions = through_a_file(plan, predictions, cohort, tmp_path)
    rows = predictions.merge(plan[['trial_id', 'sample_id', 'arm']], on='trial_id')
    status = rows.groupby('arm').parse_status.agg(set)
    assert status['original'] == {'ok'} == status['image_swap_same']
    assert status['image_swap'] - {'ok'} == {way}
    swapped = rows[rows.arm == 'image_swap']
    declined = (swapped.parse_status == way).groupby(swapped.sample_id).mean().mean()
    assert near(declined, float(name.rsplit(':', 1)[1]), len(cohort))
    image = verdicts(plan, predictions)[name]['relies_on_image']
    assert image['verdict'] != 'ignores' and image['missing_share'] > 0
    assert np.isclose(image['value'], declined) and np.isclose(image['value_if_missing_stay'], 0)


def test_without_refusals_the_same_model_ignores_the_image(cohort):
    found = verdicts(*asked(['planted:refuser:0'], cohort))['planted:refuser:0']
    assert found['relies_on_image']['verdict'] == 'ignores'
    assert found['relies_on_image']['missing_share'] == 0


@pytest.fixture(scope='module')
def marked():
    return phantom_cohort(240, size=64, seed=8, shortcut=0.7)


def test_the_reader_of_a_marker_relies_on_the_image_until_markers_are_matched(marked):
    name = 'planted:marker-reader'
    found = verdicts(*asked([name, 'planted:image-only'], marked))
    agrees = float((marked.marker == marked.label).mean())
    image = found[name]['relies_on_image']
    assert image['verdict'] == 'relies' and near(image['value'], (2 * agrees - 1) ** 2, len(marked))
    matched = verdicts(
        *asked([name, 'planted:image-only'], marked, match=['marker'], donors='auto')
    )
    found_again = matched[name]['relies_on_image']
    assert found_again['value'] == found_again['moved_other'] == 0
    assert (
        found_again['verdict'] == 'undecided' and found_again['patients_needed'] > 100
    )  # few donors share the marker
    for result in (found, matched):
        assert result['planted:image-only']['relies_on_image']['verdict'] == 'relies'


def test_caveats_stand_at_the_verdict(marked, tmp_path):
    "The marker is a serious finding of the files; refusals after an answer are named."
    names = ['planted:marker-reader', 'planted:refuser:0.6']
    settings = AuditSettings(arms=('image_swap', 'text_swap'), n_boot=200)
    run = run_audit(tmp_path / 'run', marked, names, settings=settings)
    models = json.loads((run.path / 'verdicts.json').read_text())['models']
    reader, refuser = (
        {
            kind: [c for c in models[m]['caveats'] if c['kind'] == kind]
            for kind in ('files', 'missing')
        }
        for m in names
    )
    assert any('marker' in c['text'] and c['command'] for c in reader['files'])
    assert refuser['missing'] and not reader['missing']


@pytest.mark.parametrize('part', ['image', 'text'])
def test_noise_shrinks_accuracy_and_movement_as_it_must(part):
    cohort, errors = phantom_cohort(160, size=64, seed=9), (0, 0.1, 0.3)
    names = [f'planted:noisy-{part}:{e:g}' for e in errors]
    plan, predictions = asked(names, cohort)
    found, excess = verdicts(plan, predictions), []
    for name, e in zip(names, errors):
        table = measure(plan, predictions[predictions.model == name], boot=Bootstrap(20))
        table = table[table.subgroup == 'all'].set_index(['metric', 'arm']).value
        assert near(table['accuracy', 'original'], 1 - e, len(cohort))
        assert near(table['flips', f'{part}_swap'], (1 - e) ** 2 + e**2, len(cohort))
        assert near(table['flips', f'{part}_swap_same'], 2 * e * (1 - e), len(cohort))
        excess.append(found[name][f'relies_on_{part}']['value'])
        assert abs(excess[-1] - (1 - 2 * e) ** 2) < 0.2
    assert (np.diff(excess) < 0).all()


@pytest.mark.parametrize('prevalence, films', [(0.5, 200), (0.2, 400)])
def test_wrong_labels_shrink_the_excess_the_more_the_rarer_the_class(prevalence, films):
    "Labels read off reports that are wrong in a tenth: the true excess of 1 comes back."
    error = 0.1
    cohort = phantom_cohort(
        films, seed=6, prevalence=prevalence, agreement=1 - error, label_from='text'
    )
    recorded = (cohort.label == 'yes').mean()
    plan, predictions = asked(['planted:image-only'], cohort)
    plan.attrs['label_source'] = 'report'
    image = verdicts(plan, predictions)['planted:image-only']['relies_on_image']
    rows = {row['error']: row for row in image['label_error']}
    left = 1 - error * (1 - error) / (recorded * (1 - recorded))
    assert abs(rows[error]['most'] - left) < 0.02 and rows[0]['value'] == image['value']
    assert abs(image['value'] - left) < 0.15  # what was seen
    assert abs(rows[error]['value'] - 1) < 0.2  # what was planted
    assert rows[error]['ci_low'] < 1 <= rows[error]['ci_high'] + 1e-9


def test_the_sighted_follower_sees_and_prefers_the_report(tmp_path):
    "Both followers keep the report's answer; only without a report do they part."
    names = ['reference-blind-follower', 'reference-sighted-follower']
    cohort = phantom_cohort(60, size=64, seed=12, findings=('effusion',))
    arms = ('image_swap', 'text_swap', 'image_only', 'image_only_swap')
    settings = AuditSettings(arms=arms, n_boot=200)
    run = run_audit(tmp_path / 'run', cohort, names, settings=settings, device='cpu', batch_size=32)
    results = load_results(run.path)
    blind, sighted = names
    for name in names:
        assert number(results, name, 'accuracy', 'original').value > 0.95
        assert number(results, name, 'text_following').value > 0.95
        assert number(results, name, 'flips', 'image_swap').value < 0.05
        assert results.verdicts[name]['relies_on_text']['verdict'] == 'relies'
        assert results.verdicts[name]['relies_on_image']['verdict'] != 'relies'
    assert number(results, sighted, 'accuracy', 'image_only').value > 0.9
    assert number(results, sighted, 'silencing').value > 0.9
    assert number(results, blind, 'accuracy', 'image_only').value < 0.75
    assert number(results, blind, 'silencing').value < 0.1
