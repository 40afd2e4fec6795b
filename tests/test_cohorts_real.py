"""Cohorts of real data through their cards.

Counts are compared with those that the csv module makes from the same files.
"""

import csv, json, os
from collections import Counter
from pathlib import Path

import pytest

from smsbench.core import InputError, array_hash
from smsbench.data.cohort import build_cohort, read_image, read_manifest
from smsbench.privacy import cohort_summary, read_table, write_table

DATA = os.environ.get('SMSBENCH_DATA', '')
pytestmark = pytest.mark.skipif(
    not DATA or not Path(DATA).is_dir(),
    reason='SMSBENCH_DATA does not name the folder of real data (absolute path)',
)


def rows(*path):
    with open(Path(DATA, *path), newline='', encoding='utf-8') as f:
        return list(csv.DictReader(f))


@pytest.fixture(scope='module', params=['covid_notes', 'vqa_rad', 'nih_cxr'])
def built(request):
    return request.param, *build_cohort(request.param, Path(DATA, request.param))


@pytest.fixture(scope='module')
def built_all():
    return {
        n: build_cohort(n, Path(DATA, n), check_images=False)[0]
        for n in ('covid_notes', 'vqa_rad', 'nih_cxr')
    }


def test_covid_notes_counts():
    raw = rows('covid_notes', 'metadata.csv')
    cohort, exclusions = build_cohort('covid_notes', Path(DATA, 'covid_notes'))
    noted = [r for r in raw if r['text'].strip() and r['covid19']]
    assert cohort.sample_id.tolist() == [r['id'] for r in noted] and cohort.text.tolist() == [
        r['text'] for r in noted
    ]
    assert cohort.label.tolist() == [{'1.0': 'yes', '0.0': 'no'}[r['covid19']] for r in noted]
    assert cohort.patient_id.tolist() == [
        r['patient_id'] for r in noted
    ] and cohort.licence.tolist() == [r['licence'] for r in noted]
    unlabelled = sum(not r['covid19'] for r in raw)
    assert Counter(exclusions.reason) == {
        'NaN label': unlabelled,
        'empty text': len(raw) - len(noted) - unlabelled,
    }
    assert (cohort['view'] == 'AP').sum() == sum(r['view'].startswith('AP') for r in noted) and (
        cohort.age_band == 'unknown'
    ).sum() == sum(not r['age'] for r in noted)
    assert (cohort.age_band == '60-79').sum() == sum(60 <= float(r['age'] or 0) < 80 for r in noted)


def test_vqa_rad_counts():
    raw = rows('vqa_rad', 'metadata.csv')
    cohort, exclusions = build_cohort('vqa_rad', Path(DATA, 'vqa_rad'))
    closed = [r for r in raw if r['yesno']]
    assert cohort.question.tolist() == [
        r['question'].strip() for r in closed
    ] and cohort.label.tolist() == [r['yesno'] for r in closed]
    assert (
        (cohort.text == '').all()
        and (cohort.patient_id == cohort.image).all()
        and cohort.image.nunique() == len({r['image'] for r in closed})
    )
    assert Counter(zip(cohort.split, cohort.label)) == Counter(
        (r['split'], r['yesno']) for r in closed
    )
    assert exclusions.empty and cohort.attrs['filtered'] == {
        'yesno not empty': len(raw) - len(closed)
    }


def test_nih_cxr_counts():
    raw = {r['id']: r for r in rows('nih_cxr', 'metadata.csv')}
    cohort, exclusions = build_cohort('nih_cxr', Path(DATA, 'nih_cxr'))
    tasks = read_manifest('nih_cxr').tasks
    assert (
        exclusions.empty
        and len(cohort) == len(raw) * len(tasks)
        and cohort.patient_id.nunique() == len({r['patient_id'] for r in raw.values()})
    )
    for finding, g in cohort.groupby('finding'):
        assert dict(zip(g.sample_id, g.label)) == {
            f'{i}:{finding}': 'yes' if r[finding.capitalize()] == '1' else 'no'
            for i, r in raw.items()
        }
    assert Counter(cohort['view']) == {
        v: n * len(tasks) for v, n in Counter(r['view'] for r in raw.values()).items()
    }
    assert cohort.groupby('patient_id').split.nunique().max() == 1


def test_nih_boxes_lie_in_the_pixels_of_the_file():
    cohort, _ = build_cohort('nih_cxr', Path(DATA, 'nih_cxr'))
    want = Counter(
        (r['id'], r['finding'].lower())
        for r in rows('nih_cxr', 'boxes_nih.csv')
        if r['finding'].lower() in set(cohort.finding)
    )
    boxes = {
        (s.split(':')[0], f): json.loads(b)
        for s, f, b in zip(cohort.sample_id, cohort.finding, cohort.boxes)
        if b != '[]'
    }
    assert {k: len(b) for k, b in boxes.items()} == want and sum(want.values()) > 40
    for (sample, _), marks in boxes.items():
        h, w = read_image(cohort.attrs['root'], f'images/{sample}.jpg').shape[:2]
        assert all(0 <= x0 < x1 <= w and 0 <= y0 < y1 <= h for x0, y0, x1, y1 in marks)
    m = read_manifest('nih_cxr')  # the columns of the original size give themselves away
    wrong = m.model_copy(
        update=dict(boxes=m.boxes.model_copy(update=dict(columns=['x', 'y', 'w', 'h'])))
    )
    with pytest.raises(InputError, match='pixels of the image files'):
        build_cohort(wrong, Path(DATA, 'nih_cxr'))


def test_nih_cxr14_has_all_labels_and_the_opacity_boxes():
    raw = {r['id']: r for r in rows('nih_cxr', 'metadata.csv')}
    cohort, exclusions = build_cohort('nih_cxr14', Path(DATA, 'nih_cxr'), check_images=False)
    assert exclusions.empty and cohort.finding.nunique() == 14 and len(cohort) == 14 * len(raw)
    column = {c.lower(): c for c in next(iter(raw.values()))}
    for finding, g in cohort.groupby('finding'):
        assert (g.label == 'yes').sum() == sum(r[column[finding]] == '1' for r in raw.values())
    marked = {r['id'] for r in rows('nih_cxr', 'boxes_rsna.csv') if r['x_512']}
    found = cohort[cohort.boxes != '[]']
    assert (
        set(found.finding) == {'pneumonia'}
        and {s.split(':')[0] for s in found.sample_id} == marked & set(raw)
        and len(marked) > 100
    )


def test_vqa_rad_organs_is_one_row_per_picture():
    raw = rows('vqa_rad', 'images.csv')
    cohort, exclusions = build_cohort('vqa_rad_organs', Path(DATA, 'vqa_rad'), check_images=False)
    assert exclusions.empty and cohort.image.tolist() == [r['image'] for r in raw]
    assert Counter(cohort.label) == Counter(
        {'HEAD': 'head', 'CHEST': 'chest', 'ABD': 'abdomen'}[r['organ']] for r in raw
    )


def test_pixels_survive_and_tables_round_trip(built, tmp_path):
    name, cohort, exclusions = built
    some = cohort.iloc[:: max(1, len(cohort) // 20)]
    assert all(
        array_hash(read_image(cohort.attrs['root'], i)) == sha
        for i, sha in zip(some.image, some.image_sha)
    )
    write_table(cohort, tmp_path / 'c.parquet', 'cohort')
    back = read_table(tmp_path / 'c.parquet', 'cohort')
    assert back.astype(str).equals(cohort.astype(str)) and back.attrs == cohort.attrs
    counts = cohort_summary(cohort, exclusions)
    assert counts.samples[counts.what == 'samples'].tolist() == [
        str(len(cohort))
    ] and counts.samples[counts.what == 'excluded'].astype(int).sum() == len(exclusions)


def test_a_lost_film_is_one_exclusion(tmp_path):
    """One film is left behind and one is cut.

    A copy of the folder by links to files would leave the root, so the films are copied.
    """
    source = Path(DATA, 'covid_notes')
    (tmp_path / 'images').mkdir()
    (tmp_path / 'metadata.csv').write_bytes((source / 'metadata.csv').read_bytes())
    used = [r for r in rows('covid_notes', 'metadata.csv') if r['text'].strip() and r['covid19']]
    for r in rows('covid_notes', 'metadata.csv'):
        (tmp_path / r['image']).write_bytes((source / r['image']).read_bytes())
    (tmp_path / used[0]['image']).unlink()
    cut = tmp_path / used[1]['image']
    cut.write_bytes(cut.read_bytes()[:2000])
    cohort, exclusions = build_cohort('covid_notes', tmp_path)
    broken = exclusions[exclusions.reason.str.endswith('image')]
    assert (
        dict(zip(broken.sample_id, broken.reason))
        == {
            used[0]['id']: 'missing image',
            used[1]['id']: 'truncated image',
        }
        and len(cohort) == len(used) - 2
    )


def test_limit_spreads_over_the_table(built_all):
    cohort, _ = build_cohort('nih_cxr', Path(DATA, 'nih_cxr'), limit=20)
    assert (
        cohort.image.nunique() == 20
        and set(cohort.label[cohort.finding == 'pneumonia']) == {'yes', 'no'}
        and set(cohort.sample_id) <= set(built_all['nih_cxr'].sample_id)
    )
