"""MIMIC-CXR, Patch-IB-CXR, MS-CXR and Open-i through the public functions.

On made-up miniatures of their official files, with a known number of films for every reason to
leave one out.
"""

import csv, gzip, shutil, zipfile
from pathlib import Path

import pytest

from smsbench.core import InputError, table_hash
from smsbench.data.cards import read_manifest
from smsbench.testing.layouts import make_layout
from smsbench.data.cohort import build_all, build_cohort, gather_card
from smsbench.testing.mimic_layouts import (
    mimic,
    mimic_images,
    mimic_reports,
    put_reports,
    put_tables,
)
from smsbench.report.funnel import draw_funnel, funnel_table

NEWLY = dict(check_expected=False)


def gather(card, root):
    """Cohort and exclusions before credentialed data are sealed.

    So exact counts, ids and texts can be compared with the plan.
    """
    cohort, exclusions, _, about, _ = gather_card(read_manifest(card), root)
    cohort.attrs = about
    return cohort, exclusions


@pytest.fixture(scope='module')
def root(tmp_path_factory):
    return make_layout('mimic_cxr', tmp_path_factory.mktemp('mimic') / 'root')


@pytest.fixture
def own(root, tmp_path):
    "A copy that a test may spoil."
    return Path(shutil.copytree(root, tmp_path / 'own'))


def counts(cohort, column):
    return cohort[column].value_counts().to_dict()


def removed(cohort):
    return {s['step']: s['removed'] for s in cohort.attrs['funnel'] if s['removed']}


def test_four_stages_of_patch_ib(root):
    cohort, exclusions = gather('mimic_patchib', root)
    assert [
        s['removed']
        for s in cohort.attrs['funnel']
        if s['step'].startswith(('rows', 'row in', 'ViewPosition', 'any of'))
    ] == [0, 1, 3, 35, 9]
    assert counts(exclusions, 'reason') == {
        'missing text': 3,
        'empty text': 2,
        'no such section': 3,
        'short report': 4,
        'missing image': 2,
    }
    assert (
        counts(cohort, 'split') == {'train': 27, 'validate': 7, 'test': 16}
        and len(cohort) == 50 == cohort.attrs['funnel'][-1]['left']
    )
    assert cohort.attrs['funnel'][0]['left'] == 112 == 50 + sum(
        removed(cohort).values()
    ) and counts(cohort, 'view') == {'PA': 29, 'AP': 21}
    assert not cohort.text.str.contains('sarcoidosis').any() and cohort.text.str.len().min() >= 30


def test_rules_of_the_sms_study(root):
    cohort, exclusions = gather('mimic_sms', root)
    assert (
        list(removed(cohort).values())[:3] == [1, 3, 74]
        and len(cohort) == 25
        and counts(cohort, 'split') == {'test': 25}
    )
    assert counts(exclusions, 'reason') == {
        'left out by the rule': 6,
        'missing text': 1,
        'empty text': 1,
        'missing image': 1,
    }
    assert set(cohort.view) == {'PA', 'AP', 'LATERAL', 'LL'}  # the study looked at no view
    assert cohort.text.str.contains('sarcoidosis').all()  # and gave the models the whole report
    films = mimic_images().set_index('dicom_id').loc[cohort.sample_id]
    assert [label == 'no' for label in cohort.label] == [
        x.get('No Finding') == 1 for x in films.labels
    ]


def test_published_counts_are_asserted(root):
    with pytest.raises(InputError) as e:
        build_cohort('mimic_patchib', root)
    said = str(e.value).replace(',', '')
    assert '218138' in said or '213364' in said
    assert '\n' not in said


def test_zip_and_folder_give_the_same_cohort(root, tmp_path):
    mimic(tmp_path, reports='folder', ending='.csv')
    for card in ('mimic_cxr', 'mimic_sms', 'mimic_patchib'):
        (a, lost), (b, lost_too) = (gather(card, r) for r in (root, tmp_path))
        assert table_hash(a) == table_hash(b) and lost.equals(lost_too), card


def test_reports_unpacked_beside_the_films(own):
    (own / 'mimic-cxr-reports.zip').unlink()
    put_reports(
        own,
        {f'mimic-cxr-reports/{name}': data for name, data in mimic_reports(mimic_images()).items()},
        'folder',
    )
    assert len(build_cohort('mimic_patchib', own, **NEWLY)[0]) == 50


def test_negbio_instead_of_chexpert(own):
    chexpert = gather('mimic_cxr', own)[0]
    (own / 'mimic-cxr-2.0.0-chexpert.csv.gz').unlink()
    put_tables(own, mimic_images(), 'negbio')
    negbio = gather('mimic_cxr', own)[0]
    assert any('negbio' in s['step'] for s in negbio.attrs['funnel']) and any(
        'chexpert' in s['step'] for s in chexpert.attrs['funnel']
    )
    a, b = (c.set_index('sample_id').label for c in (chexpert, negbio))
    films = mimic_images()
    left = films[
        films.view.isin(['PA', 'AP'])
        & films.matter.isin(['', 'only uncertain', 'only devices', 'all labels blank'])
    ]
    unsure = {
        f"{r.dicom_id}:{ {'Pleural Effusion': 'effusion'}.get(f, f.lower()) }"
        for r in left.itertuples()
        for f, v in r.labels.items()
        if v == -1
    }
    assert (
        unsure
        and {*b.index} - {*a.index} == unsure
        and (b[[*unsure]] == 'yes').all()
        and (b[a.index] == a).all()
    )  # NegBio takes for present what CheXpert is unsure of
    for card in ('mimic_sms', 'mimic_patchib'):  # both are defined on CheXpert's labels
        with pytest.raises(InputError, match='chexpert') as e:
            build_cohort(card, own, **NEWLY)
        assert '\n' not in str(e.value)


def test_a_patient_in_two_splits_is_refused(own):
    films = mimic_images()
    patient = films[films.matter == ''].groupby('subject_id').study_id.nunique().idxmax()
    film = films[films.subject_id == patient].iloc[0]
    other = {'train': 'test', 'test': 'train', 'validate': 'train'}[film.split]
    path = own / 'mimic-cxr-2.0.0-split.csv.gz'
    with gzip.open(path, 'rt', newline='') as f:
        rows = list(csv.reader(f))
    with gzip.open(path, 'wt', newline='') as f:
        csv.writer(f).writerows([*r[:3], other] if r[0] == film.dicom_id else r for r in rows)
    for card in ('mimic_cxr', 'mimic_patchib'):
        with pytest.raises(InputError, match='patient') as e:
            build_cohort(card, own, **NEWLY)
        assert '\n' not in str(e.value) and patient not in str(e.value)


HOSTILE = {
    'wrong text encoding': b'FINDINGS: The lungs are clear \xff\xfe and \xe4 the heart is normal.',
    'empty text': b'',
    'text too large': b'FINDINGS: ' + b'The lungs are clear. ' * 500_000,
    'missing text': None,
    'no such section': b'INDICATION: fever and cough, rule out pneumonia, please',
    'short report': b'IMPRESSION: ___ XXXX [**2101-3-4**]',
}


@pytest.mark.parametrize('how', ['zip', 'folder'])
def test_hostile_reports_are_set_aside(own, how):
    before = gather('mimic_patchib', own)[0]
    films = mimic_images().drop_duplicates('study_id')
    films = films[(films.matter == '') & (films.report == 'full')].head(len(HOSTILE))
    reports, spoilt = mimic_reports(mimic_images()), dict(zip(HOSTILE, films.dicom_id))
    for r, data in zip(films.itertuples(), HOSTILE.values()):
        name = f'files/p99/p{r.subject_id}/s{r.study_id}.txt'
        del reports[name]
        if data is not None:
            reports[name] = data
    (own / 'mimic-cxr-reports.zip').unlink()
    put_reports(own, reports, how)
    cohort, exclusions = gather('mimic_patchib', own)
    assert {
        reason: exclusions.set_index('sample_id').reason[film] for reason, film in spoilt.items()
    } == {reason: reason for reason in HOSTILE}
    healthy = before[~before.sample_id.isin(spoilt.values())].reset_index(drop=True)
    assert table_hash(cohort) == table_hash(healthy)  # and nothing else changes


def test_broken_zip_is_one_line(own):
    path = own / 'mimic-cxr-reports.zip'
    data = path.read_bytes()
    for spoilt in (b'', data[:500], b'PK' + bytes(1000)):
        path.write_bytes(spoilt)
        with pytest.raises(InputError) as e:
            build_cohort('mimic_patchib', own, **NEWLY)
        assert '\n' not in str(e.value) and (
            'unreadable text' in str(e.value) or 'mimic-cxr-reports.zip' in str(e.value)
        )
    with zipfile.ZipFile(path, 'w') as z:
        z.writestr('readme.txt', 'no report at all')
    with pytest.raises(InputError) as e:
        build_cohort('mimic_patchib', own, **NEWLY)
    assert 'missing text' in str(e.value) and '\n' not in str(e.value)


def test_missing_tables_are_named(own):
    (own / 'mimic-cxr-2.0.0-split.csv.gz').unlink()
    with pytest.raises(InputError, match='mimic-cxr-2.0.0-split.csv') as e:
        build_cohort('mimic_cxr', own, **NEWLY)
    assert '\n' not in str(e.value) and str(own) not in str(e.value)


@pytest.mark.parametrize(
    'card,n,labels,reasons',
    [
        ('patchib_jsonl', 48, None, {'short report': 1, 'missing image': 1}),
        ('ms_cxr', 59, None, {'duplicate id': 1}),
        ('iu_xray', 17, {'yes': 9, 'no': 8}, {'empty text': 1, 'short report': 1}),
    ],
)
def test_the_other_layouts(tmp_path, card, n, labels, reasons):
    cohort, exclusions = build_cohort(card, make_layout(card, tmp_path / 'root'), **NEWLY)
    assert (
        len(cohort) == n
        and counts(exclusions, 'reason') == reasons
        and labels in (None, counts(cohort, 'label'))
        and (cohort.image_sha != '').all()
    )


def test_funnel_of_credentialed_data_shows_no_small_count(root):
    for cohort in (
        gather('mimic_patchib', root)[0],
        build_cohort('mimic_patchib', root, **NEWLY)[0],
    ):  # before and after it is sealed
        table, figure = funnel_table(cohort), draw_funnel(cohort)
        assert (
            table.removed.tolist()[1] == '<10'
            and {'35', '≈40'} & set(table.removed)
            and not set(table.removed) & {*map(str, range(1, 10))}
        )
        assert not any(x in figure.alt for x in ('99000', '995000', 'sarcoidosis')) and figure.png(
            60
        )


def test_what_is_written_is_sealed_and_opens_again(root):
    plain, built = gather('mimic_sms', root)[0], build_all('mimic_sms', root, **NEWLY)
    written = built.cohort.to_csv() + built.exclusions.to_csv() + str(built.cohort.attrs['funnel'])
    films = mimic_images()
    assert 'sarcoidosis' in plain.to_csv() and not any(
        secret in written
        for secret in (
            'sarcoidosis',
            'effusion',
            *films.dicom_id,
            *films.study_id,
            *films.subject_id,
        )
    )
    assert (
        built.plaintext.text.tolist() == plain.text.tolist()
        and built.plaintext.image.tolist() == plain.image.tolist()
        and built.cohort.label.tolist() == plain.label.tolist()
    )
