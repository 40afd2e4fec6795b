"A new arm and a new data set, made as CONTRIBUTING says, go through to the report."

import pandas as pd
import pytest
import yaml

import smsbench
from smsbench.audit.arms import ARMS, Arm
from smsbench.audit.image_edits import IMAGE_OPERATIONS, ImageOperation


@pytest.fixture
def mirror(monkeypatch):
    "An arm with an image operation of its own: the image mirrored, words and pixels in one record."
    words, change = 'its own, mirrored', lambda image, region, key: image[:, ::-1].copy()
    monkeypatch.setitem(IMAGE_OPERATIONS, 'mirror', ImageOperation('mirror', words, change))
    monkeypatch.setitem(ARMS, 'mirror', Arm('mirror', image='mirror', pixels='differ'))
    return 'mirror'


@pytest.fixture
def card(tmp_path):
    "A data set of a person's own: a table, images and one YAML card."
    cohort = smsbench.phantom_cohort(60, seed=2)
    folder = smsbench.save_phantom(cohort, tmp_path / 'data').parent
    table = pd.read_csv(folder / 'cohort.csv')
    table.to_csv(folder / 'mine.csv', index=False)
    about = dict(
        name='mine',
        title='Films of a department',
        version='1',
        source='made up',
        how='already here',
        layout='mine.csv',
        licence='none',
        citation='none',
        access='open',
        table=dict(path='mine.csv'),
        columns=dict(sample_id='sample_id', patient_id='patient_id', image='image', text='text'),
        tasks=dict(
            effusion=dict(
                question='Is there pleural effusion?',
                label=dict(column='label', map=dict(yes='yes', no='no')),
            )
        ),
    )
    (tmp_path / 'mine.yaml').write_text(yaml.safe_dump(about))
    return tmp_path / 'mine.yaml', folder


def test_an_arm_and_a_data_set_of_ones_own_reach_the_page(mirror, card, tmp_path):
    path, folder = card
    cohort, left_out = smsbench.build_cohort(path, folder)
    assert len(cohort) == 60 and len(left_out) == 0
    settings = smsbench.AuditSettings(arms=('image_swap', mirror), donors=1, check=0)
    run = smsbench.run_audit(tmp_path / 'run', cohort, ['planted:image-only'], settings=settings)
    results = smsbench.load_results(run.path)
    assert results.delivery['planted:image-only'][mirror]['verdict'] == 'ok'
    rows = results.metrics.query('arm == @mirror and metric == "flips"')
    assert len(rows) and rows.value.notna().any()
    from smsbench.report.provenance import arm_table

    assert 'its own, mirrored' in str(arm_table(results.plan))
