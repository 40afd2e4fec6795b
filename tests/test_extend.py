"New arms, data sets, model families and metrics, made as CONTRIBUTING says, reach the report."

import json

import numpy as np
import pandas as pd
import pytest
import yaml

import smsbench
from smsbench.audit.arms import ARMS, Arm
from smsbench.audit import metrics
from smsbench.audit.image_edits import IMAGE_OPERATIONS, ImageOperation
from smsbench.testing.tiny import tiny_checkpoint
from smsbench.vlm import families


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


@pytest.fixture
def department(monkeypatch, tmp_path):
    "A checkpoint of a class that no table of smsbench names, and the record of its family."
    from transformers import (
        AutoConfig,
        AutoModelForImageTextToText,
        LlavaConfig,
        LlavaForConditionalGeneration,
    )

    class DepartmentConfig(LlavaConfig):
        model_type = 'department'

    class DepartmentModel(LlavaForConditionalGeneration):
        config_class = DepartmentConfig

    AutoConfig.register('department', DepartmentConfig, exist_ok=True)
    AutoModelForImageTextToText.register(DepartmentConfig, DepartmentModel, exist_ok=True)
    folder = tiny_checkpoint('llava', tmp_path / 'department')
    config = json.loads((folder / 'config.json').read_text())
    del config['model_type']
    DepartmentModel(DepartmentConfig(**config)).save_pretrained(folder)
    unknown = smsbench.load_model(folder, device='cpu', dtype='float32')
    assert unknown.caps == families.PLAIN
    record = families.Capabilities('department', 'A model of ours', 'prefix', 'one causal sequence')
    monkeypatch.setattr(families, '_RECORDS', [*families._RECORDS, record])
    return folder


@pytest.fixture
def surest(monkeypatch):
    "A metric of one's own: the share of answers with a probability of at least 0.9."
    terms = metrics.all_terms

    def with_surest(cells):
        sure = np.nanmax(cells.probabilities('original'), axis=1) >= 0.9
        weight = cells.weight('original')
        return [*terms(cells), metrics.Term('surest', 'original', weight * sure, weight)]

    monkeypatch.setattr(metrics, 'all_terms', with_surest)
    return 'surest'


def test_a_family_and_a_metric_of_ones_own_reach_the_page(department, surest, tmp_path):
    cohort = smsbench.phantom_cohort(24, seed=2)
    settings = smsbench.AuditSettings(arms=('image_swap',), donors=1, check=8)
    run = smsbench.run_audit(tmp_path / 'run', cohort, [str(department)], settings=settings)
    results = smsbench.load_results(run.path)
    (model,) = results.delivery
    assert {v['verdict'] for v in results.delivery[model].values()} == {'ok'}
    row = results.metrics.query('metric == @surest and subgroup == "all"').iloc[0]
    assert 0 <= row.ci_low <= row.value <= row.ci_high <= 1 and row.n == 24
    page = smsbench.write_report(run.path)
    assert model in page.read_text()
