"Planted models through the whole audit: what was planted is what comes out."
import pytest

from smsbench.data.phantom import phantom_cohort
from smsbench.sms.audit import Source
from smsbench.sms.run import AuditSettings, load_results, run_audit, score_model, void_lines
from smsbench.vlm.planted import STRENGTH

WEIGHTS = (.1, .25, .4, .6, .75, .9)
HABITS = {'planted:text-only': ('ignores', 'relies'), 'planted:image-only': ('relies', 'ignores'), 'planted:constant': ('ignores', 'ignores'), 'planted:image-dropper': ('ignores', 'relies'),
          'planted:contradiction': ('relies', 'relies'), **{f'planted:mixture:{w}': ('relies', 'relies') for w in WEIGHTS if .25 <= w <= .75}}


@pytest.fixture(scope='module')
def cohort(): return phantom_cohort(160, size=64, seed=4)


@pytest.fixture(scope='module')
def results(cohort, tmp_path_factory):
    models = sorted(set(HABITS) | {f'planted:mixture:{w}' for w in WEIGHTS}) + ['planted:miscalibrated:2']
    arms = ('image_swap', 'text_swap', 'text_only', 'image_only', 'neither', 'identity', 'image_only_swap', 'occlude_finding')
    return load_results(run_audit(tmp_path_factory.mktemp('truth')/'run', cohort, models, AuditSettings(arms=arms, n_boot=400), batch_size=64).path)


def number(results, model, metric, arm=''):
    m = results.metrics
    return m[(m.model == model) & (m.metric == metric) & (m.arm == arm) & (m.subgroup == 'all')].iloc[0]


def test_verdicts_are_as_planted(results):
    models = results.verdicts
    got = {k: tuple(models[k][f'relies_on_{m}']['verdict'] for m in ('image', 'text')) for k in models}
    for name, expected in HABITS.items():
        match = [k for k in got if k == name or k.startswith(name + ':')]
        assert match and got[match[0]] == expected, (name, got)
    assert all(v['void_arms'] == [] for v in models.values())


@pytest.mark.parametrize('w', WEIGHTS)
def test_weights_are_recovered_within_the_interval(results, w):
    image, text, both = (number(results, f'planted:mixture:{w}', k) for k in ('phi_image', 'phi_text', 'interaction'))
    for got, planted in ((image, w * STRENGTH), (text, (1 - w) * STRENGTH), (both, 0)):
        assert got.ci_low - 1e-9 <= planted <= got.ci_high + 1e-9, (got, planted)


def test_noise_floor_of_a_deterministic_model_is_zero(results):
    for model in results.verdicts:
        floor = number(results, model, 'noise_floor', 'identity')
        assert floor.value == floor.ci_high == 0 and number(results, model, 'flips', 'identity').value == 0


def test_text_following_and_silencing(results):
    assert number(results, 'planted:text-only', 'text_following').value == 1 and number(results, 'planted:image-only', 'text_following').value == 0
    assert number(results, 'planted:mixture:0.4', 'silencing').value == 1          # the film decides alone, and is overruled by the report
    assert number(results, 'planted:image-only', 'silencing').value == 0
    assert number(results, 'planted:image-only', 'region_dependence').value > .5 and number(results, 'planted:text-only', 'region_dependence').value == 0


def test_a_harness_that_forgets_to_swap_is_void(cohort, tmp_path):
    from smsbench.core import Run
    from smsbench.sms.audit import prove_delivery
    from smsbench.sms.shifts import make_plan
    class Forgets(Source):
        def inputs(self, trial): return super().inputs(trial._replace(image_id=trial.sample_id) if trial.arm == 'image_swap' else trial)
    plan, _ = make_plan(cohort, ['image_swap', 'text_swap'])
    found = prove_delivery(plan, score_model('planted:image-only', plan, Forgets(cohort), Run(tmp_path)))
    assert {a: v['verdict'] for a, v in found['planted:image-only'].items()} == {'original': 'ok', 'image_swap': 'void', 'image_swap_same': 'ok', 'text_swap': 'ok', 'text_swap_same': 'ok'}
    assert 'image_swap' in void_lines(found)[0]


def test_the_miscalibration_is_measured(results):
    name = next(k for k in results.verdicts if k.startswith('planted:miscalibrated'))
    assert number(results, name, 'ece', 'original').value > 2 * number(results, 'planted:text-only', 'ece', 'original').value
