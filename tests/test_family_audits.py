"The full audit, every arm, for a tiny checkpoint of every family: on drawn films and on real ones."

import contextlib, io

import pytest

from smsbench.data.cohort import build_all
from smsbench.data.phantom import phantom_cohort
from smsbench.audit.run import AuditSettings, load_results, run_audit
from smsbench.audit.arms import select_arms
from smsbench.testing.tiny import TINY, tiny_checkpoint


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
    "Family -> folder of its tiny checkpoint, made when first asked for."
    made, home = {}, tmp_path_factory.mktemp('tiny')

    def get(family):
        if family not in made:
            tiny_checkpoint(family, home / family)
            made[family] = home / family
        return made[family]

    return get


def audited(out, cohort, folder):
    with contextlib.redirect_stderr(io.StringIO()):
        return load_results(
            run_audit(
                out, cohort, [str(folder)], settings=AuditSettings(n_boot=100), batch_size=8
            ).path
        )


def holds(results, family, arms):
    check = results.checks[family]
    assert (
        check['ok']
        and check['max_diff'] < 1e-4
        and check['flips'] == 0
        and check['undelivered'] == 0
        and check['n'] == 16
    ), check
    assert {a for a, d in results.delivery[family].items() if d['verdict'] == 'ok'} == arms, (
        results.delivery[family]
    )
    assert (results.predictions.parse_status != 'error').all() and results.verdicts[family][
        'void_arms'
    ] == []


@pytest.mark.parametrize('family', TINY)
def test_every_arm_on_drawn_films(family, folders, tmp_path):
    films = phantom_cohort(10, size=64, findings=['effusion'], seed=2)
    results = audited(tmp_path / 'run', films, folders(family))
    holds(results, family, {a.name for a in select_arms()})
    level = results.checks[family]['level']
    assert level == 1 if family.startswith('paligemma') else level == 2, results.checks[family]


@pytest.mark.parametrize('family', TINY)
def test_every_arm_on_real_films(family, folders, real_data, tmp_path):
    cohort = build_all('covid_notes', real_data / 'covid_notes', limit=24)
    results = audited(tmp_path / 'run', cohort, folders(family))
    holds(
        results, family, {a.name for a in select_arms()} - {'occlude_finding', 'occlude_elsewhere'}
    )  # these films have no boxes for COVID
