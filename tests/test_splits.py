"""Splits: the same in another process, joined by a card, and on real data.

Real data are checked against their official splits.
"""

import json, os, subprocess, sys
from pathlib import Path

import pandas as pd, pytest

from smsbench.core import InputError
from smsbench.data.cohort import build_cohort
from smsbench.data.phantom import phantom_cohort, save_phantom
from smsbench.data.splits import (
    apply_splits,
    assert_disjoint,
    class_counts,
    make_folds,
    make_splits,
    read_splits,
    split_table,
    write_splits,
)
from smsbench.privacy import read_table, write_table

DATA = os.environ.get('SMSBENCH_DATA', '')
real = pytest.mark.skipif(
    not DATA or not Path(DATA).is_dir(),
    reason='SMSBENCH_DATA does not name the folder of real data (absolute path)',
)


@pytest.fixture(scope='module')
def cohorts():
    return {
        n: build_cohort(n, Path(DATA, n), check_images=False)[0]
        for n in ('nih_cxr', 'vqa_rad', 'covid_notes')
    }


def test_another_process_agrees(tmp_path):
    "Another hash seed, another locale and shuffled rows, columns and parts."
    c = phantom_cohort(n=80, findings=('effusion', 'nodule'), seed=3)
    write_table(c.sample(frac=1, random_state=1)[[*c][::-1]], tmp_path / 'c.parquet')
    code = (
        "import sys; from smsbench.core import read_table; from smsbench.data.splits import *;"
        " write_splits(make_splits(read_table(sys.argv[1]), dict(test=.15, val=.15, train=.7),"
        " seed=5), sys.argv[2])"
    )
    for k, env in enumerate(
        (dict(PYTHONHASHSEED='1', LC_ALL='C'), dict(PYTHONHASHSEED='2', OMP_NUM_THREADS='1'))
    ):
        subprocess.run(
            [sys.executable, '-c', code, tmp_path / 'c.parquet', tmp_path / f'{k}.csv'],
            check=True,
            env={**os.environ, **env},
        )
    assert (tmp_path / '0.csv').read_bytes() == (tmp_path / '1.csv').read_bytes()
    assert read_splits(tmp_path / '0.csv').equals(make_splits(c, seed=5))


def test_splits_import_nothing_heavy():
    p = subprocess.run(
        [
            sys.executable,
            '-c',
            (
                "import sys, smsbench.data.splits; print([m for m in ('torch', 'sklearn', 'scipy',"
                " 'matplotlib') if m in sys.modules])"
            ),
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    assert p.stdout.strip() == '[]'


def test_a_card_joins_a_written_split(tmp_path):
    """The split file lies next to the data, and the card joins it.

    The cohort has the split, and no image was moved.
    """
    save_phantom(phantom_cohort(n=40, seed=2), tmp_path)
    before = sorted(
        (p.relative_to(tmp_path), p.stat().st_mtime_ns) for p in tmp_path.rglob('*.png')
    )
    table = pd.read_csv(tmp_path / 'cohort.csv', dtype=str, keep_default_na=False).drop(
        columns='split'
    )
    table.to_csv(tmp_path / 'cohort.csv', index=False)
    card = dict(
        name='toy',
        title='Toy',
        version='1',
        licence='CC0',
        access='open',
        table='cohort.csv',
        columns=dict(sample_id='sample_id', patient_id='patient_id', image='image', text='text'),
        tasks=dict(effusion=dict(question='Is there effusion?', label='label')),
    )
    (tmp_path / 'toy.yaml').write_text(json.dumps(card))
    cohort, _ = build_cohort(tmp_path / 'toy.yaml', tmp_path)
    splits = make_splits(cohort)
    write_splits(splits, tmp_path / 'splits.csv')
    card |= dict(
        joins=[dict(table='splits.csv', on=dict(patient_id='patient_id'), columns=['split'])],
        columns={**card['columns'], 'split': 'split'},
    )
    (tmp_path / 'toy.yaml').write_text(json.dumps(card))
    joined, _ = build_cohort(tmp_path / 'toy.yaml', tmp_path)
    assert joined.split.tolist() == apply_splits(cohort, splits).split.tolist() and set(
        joined.split
    ) == {'train', 'val', 'test'}
    assert_disjoint(joined)
    assert before == sorted(
        (p.relative_to(tmp_path), p.stat().st_mtime_ns) for p in tmp_path.rglob('*.png')
    )


def test_a_cohort_keeps_its_split_on_disk(tmp_path):
    c = phantom_cohort(n=60, seed=1)
    out = apply_splits(c, make_folds(c, 3))
    write_table(out, tmp_path / 'c.parquet', 'cohort')
    back = read_table(tmp_path / 'c.parquet', 'cohort')
    assert (
        back.split.tolist() == out.split.tolist() and back.attrs['splits'] == make_folds(c, 3).attrs
    )
    assert {k: v for k, v in back.attrs.items() if k != 'splits'} == c.attrs and c.attrs.get(
        'splits'
    ) is None


@real
def test_official_splits_are_not_believed(cohorts):
    nih, vqa = cohorts['nih_cxr'], cohorts['vqa_rad']
    assert_disjoint(nih)
    where = vqa.groupby('image').split.nunique()
    shared = int((where > 1).sum())
    assert shared > 100 and shared > 0.7 * vqa[vqa.split == 'test'].image.nunique()
    with pytest.raises(
        InputError,
        match=(
            f'^{shared} of {len(where)} images are in more than one split .*test and train:'
            f' {shared}.*make_splits'
        ),
    ) as e:
        assert_disjoint(vqa, 'image')
    assert '\n' not in str(e.value)
    with pytest.raises(InputError, match=f'^{shared} of .* patients'):
        assert_disjoint(vqa)
    with pytest.raises(InputError, match='no sample has both'):
        assert_disjoint(cohorts['covid_notes'].assign(split=''))


@real
@pytest.mark.parametrize('name', ['nih_cxr', 'vqa_rad', 'covid_notes'])
def test_own_splits_of_real_data(cohorts, name):
    c = cohorts[name]
    s = make_splits(c)
    out = apply_splits(c, s)
    t = split_table(out)
    assert_disjoint(out)
    assert_disjoint(out, 'image')
    assert (
        (t.patients > 0).all()
        and t.samples.sum() == len(c)
        and s.equals(make_splits(c.sample(frac=1, random_state=0)))
    )
    heaviest = c.groupby('patient_id').size().max() / len(c)
    size = out.split.value_counts(normalize=True)
    assert all(abs(size[k] - v) < 0.01 + heaviest for k, v in s.attrs['sizes'].items())
    n = t.groupby(['split', 'finding']).samples.transform('sum')
    overall = t.groupby('class').samples.transform('sum') / t.groupby('finding').samples.transform(
        'sum'
    )
    off = (t.share - overall).abs()
    assert (
        off.mean() < 0.02
        and (off * n <= 2 + 0.02 * n + c.groupby(['patient_id', 'finding']).size().max()).all()
    ), off.describe()  # to within a heavy patient


@real
def test_a_class_of_few_patients_is_named(cohorts):
    c = cohorts['nih_cxr']
    carriers = class_counts(c).groupby('class').patient_id.nunique()
    rare = carriers.idxmin()
    with pytest.raises(
        InputError,
        match=(
            f'^{rare}: {carriers.min()} patients carry it, too few for the {carriers.min() + 1}'
            ' parts'
        ),
    ):
        make_folds(c, int(carriers.min()) + 1)
    assert (split_table(apply_splits(c, make_folds(c, 5))).patients > 0).all()
