"""The file audit on real data and on planted faults.

Counts are compared with counts made from the same files by other means.
"""

import csv, os, re, shutil, time
from collections import defaultdict
from pathlib import Path

import numpy as np, pandas as pd, pytest
from PIL import Image
from sklearn.metrics import roc_auc_score

from smsbench.core import InputError
from smsbench.data.audit import audit, audit_files, near_duplicates
from smsbench.data.files import measure, scan_files
from smsbench.data.cohort import build_all
from smsbench.data.phantom import phantom_cohort, read_phantom, save_phantom

DATA = os.environ.get('SMSBENCH_DATA', '')
real = pytest.mark.skipif(
    not DATA or not Path(DATA).is_dir(),
    reason='SMSBENCH_DATA does not name the folder of real data (absolute path)',
)
LIMITS = dict(covid_notes=10, vqa_rad=30, nih_cxr=30)  # seconds of one core


def rows(*path):
    with open(Path(DATA, *path), newline='', encoding='utf-8') as f:
        return list(csv.DictReader(f))


def found(findings, check, subject=None):
    f = findings[(findings.check == check) & (findings.subject.eq(subject) | (subject is None))]
    assert len(f) == 1, f
    return f.iloc[0]


@pytest.fixture(scope='module')
def audited():
    out = {}
    for name, limit in LIMITS.items():
        built = build_all(name, Path(DATA, name), workers=1)
        start = time.process_time()
        out[name] = built, audit(built.cohort, built.files, built.exclusions)
        assert time.process_time() - start < limit
    return out


@real
def test_all_test_images_of_vqa_rad_occur_in_train(audited):
    built, a = audited['vqa_rad']
    splits = defaultdict(set)
    for r in rows('vqa_rad', 'metadata.csv'):
        splits[r['split']].add(r['image'])
    assert splits['test'] <= splits['train']
    f = found(a.findings, 'same image in two splits')
    used = built.cohort[built.cohort.split == 'test'].image.nunique()
    assert (f.severity, f.subject, f.value, f.n) == (
        'serious',
        'test in train',
        1,
        used,
    ) and f'all {used} images of test' in f.sentence
    assert (
        found(a.findings, 'patients known').severity == 'note'
    )  # the image stands for the patient, so nothing is said of patients


@real
def test_questions_of_vqa_rad_give_answers_away(audited):
    f = found(audited['vqa_rad'][1].findings, 'words of the question')
    assert f.severity == 'serious' and 0.6 < f.low < f.value < f.high < 0.8


@real
def test_view_is_a_shortcut_in_nih_cxr(audited):
    built, a = audited['nih_cxr']
    f = found(a.findings, 'shortcut', 'view')
    assert f.severity == 'serious' and 'pneumonia' in f.sentence and '--match view' in f.sentence
    told = a.tables['shortcuts'].query("attribute == 'view'").set_index('finding')
    for finding, g in built.cohort.groupby('finding'):
        share = (g['view'] == 'AP').groupby(g.label).mean()
        assert (
            abs(told.auroc[finding] - 0.5) < abs(share['yes'] - share['no']) / 2 + 0.07
        )  # two levels: 0.5 + difference / 2, on the patients it was fitted on
    share = (
        (built.cohort['view'] == 'AP')[built.cohort.finding == 'pneumonia']
        .groupby(built.cohort.label)
        .mean()
    )
    assert (
        told.low['pneumonia'] > 0.55
        and abs(told.auroc['pneumonia'] - (0.5 + abs(share['yes'] - share['no']) / 2)) < 0.03
    )
    assert all(
        found(a.findings, c).severity == 'ok'
        for c in (
            'patients in two splits',
            'same image in two splits',
            'blank images',
            'near-copy in two splits',
        )
    )


@real
def test_notes_name_the_diagnosis_in_covid_notes(audited):
    built, a = audited['covid_notes']
    f = found(a.findings, 'label words')
    yes = built.cohort[built.cohort.label == 'yes']
    said = yes.text.str.contains(
        r'covid|sars-cov-2|coronavirus', flags=re.I
    ).sum()  # as often as that, less the denials
    assert (
        f.severity == 'warning'
        and f.n == len(yes)
        and said - 8 <= round(f.value * f.n) <= said
        and 'name the diagnosis' in f.sentence
    )
    words = found(a.findings, 'words of the text')
    assert words.severity in ('warning', 'serious') and 'covid-19' in words.sentence


@real
def test_nothing_depends_on_the_order_of_rows(audited):
    built, a = audited['covid_notes']
    mixed = built.cohort.sample(frac=1, random_state=0).reset_index(drop=True)
    mixed.attrs = built.cohort.attrs
    again = audit(mixed, built.files.sample(frac=1, random_state=1), built.exclusions)
    columns = ['check', 'subject', 'severity', 'value', 'low', 'high', 'n']

    def key(d):
        return d[columns].sort_values(['check', 'subject']).reset_index(drop=True)

    pd.testing.assert_frame_equal(key(again.findings), key(a.findings), atol=1e-6)


@real
def test_real_films_saved_again_are_found(tmp_path, audited):
    """Twelve test films of NIH become smaller JPEG copies of train films.

    The hash finds exactly these.
    """
    built, _ = audited['nih_cxr']
    cohort = built.cohort.copy()
    cohort.attrs = built.cohort.attrs
    films = cohort.drop_duplicates('image')
    train, test = (films.image[films.split == s].tolist()[:12] for s in ('train', 'test'))
    (tmp_path / 'images').mkdir()
    for a, b in zip(train, test):
        Image.open(Path(DATA, 'nih_cxr', a)).convert('L').resize((300, 300)).save(
            tmp_path / b, quality=60
        )
    files = built.files.copy()
    files.loc[test] = scan_files(tmp_path, test, workers=1).to_numpy()
    pairs = near_duplicates(files)
    assert {tuple(sorted(p)) for p in zip(train, test)} == {
        tuple(sorted(p)) for p in zip(pairs.ref_a, pairs.ref_b)
    } - {('images/00002658_001.jpg', 'images/00002658_002.jpg')}
    f = found(
        audit_files(cohort, files.astype(built.files.dtypes.to_dict())),
        'near-copy in two splits',
        'test in train',
    )
    assert f.severity == 'serious' and round(f.value * f.n) == 12


def test_planted_faults_are_found_through_the_card(tmp_path):
    cohort = phantom_cohort(240, seed=6)
    save_phantom(cohort, tmp_path)
    table = pd.read_csv(tmp_path / 'cohort.csv', dtype=str, keep_default_na=False)
    one = table.patient_id.value_counts().index[0]
    test, train = (
        table.image[(table.split == s) & (table.patient_id != one)].tolist()
        for s in ('test', 'train')
    )
    for a, b in zip(train[:5], test[:5]):
        shutil.copy(tmp_path / a, tmp_path / b)
    Image.fromarray(np.full((64, 64), 30, np.uint8)).save(tmp_path / train[10])
    for image, label in zip(table.image, table.label):
        if label == 'yes' and image not in (*train[:11], *test[:5]):
            Image.fromarray(
                np.minimum(np.asarray(Image.open(tmp_path / image)).astype(int) + 40, 255).astype(
                    np.uint8
                )
            ).save(tmp_path / image)
    table.loc[table.index[table.patient_id == one][0], 'split'] = (
        'val' if table.split[table.patient_id == one].iloc[0] != 'val' else 'train'
    )
    table['sex'] = np.where(
        (table.label == 'yes') & (np.arange(len(table)) % 2 == 0), '', table.sex
    )
    table.to_csv(tmp_path / 'cohort.csv', index=False)
    built = build_all('phantom', tmp_path, workers=1)
    a = audit_files(built.cohort, built.files, built.exclusions)
    assert (
        found(a, 'blank images').severity == 'warning' and found(a, 'blank images').value == 1 / 240
    )
    same = found(a, 'same image in two splits', 'test in train')
    assert (
        same.severity == 'serious'
        and round(same.value * same.n) == 5
        and found(a, 'same image, two patients').severity == 'serious'
    )
    assert found(a, 'patients in two splits').value == 1 and found(
        a, 'patients in two splits'
    ).severity in ('serious', 'warning')
    assert (
        found(a, 'shortcut', 'mean brightness').severity == 'serious'
        and found(a, 'label words').severity == 'serious'
        and found(a, 'words of the text').severity == 'serious'
    )
    assert found(a, 'missing by class', 'sex').severity == 'serious' and found(
        a, 'shortcut', 'sex'
    ).severity in ('serious', 'warning')


def scanned(cohort):
    refs = cohort.image.unique()
    return pd.DataFrame(
        [measure(read_phantom(r)) | dict(bytes=0, reason='', detail='') for r in refs],
        index=pd.Index(refs, dtype=object),
    )


def test_a_marker_that_is_burnt_into_the_films_of_one_class():
    told = [
        found(audit_files(c, scanned(c)), 'shortcut', 'burnt-in marker')
        for s in (0, 0.5, 1)
        for c in [phantom_cohort(200, seed=9, agreement=0.5, findings=('nodule',), shortcut=s)]
    ]
    assert (
        [f.severity for f in told] == ['ok', 'serious', 'serious']
        and abs(told[1].value - 0.75) < 0.08
        and told[2].value > 0.95
    )  # the marker agrees with the label in 50, 75 and 100 %


@pytest.mark.parametrize('seed', range(5))
def test_a_clean_cohort_has_no_serious_finding(seed):
    cohort = phantom_cohort(200, seed=500 + seed, agreement=0.5, findings=('nodule',))
    a = audit_files(cohort, scanned(cohort))
    assert not (a.severity == 'serious').any(), a[a.severity == 'serious'].sentence.tolist()


def three_classes(n=360, told=0.7, seed=0):
    rng = np.random.default_rng(seed)
    label = rng.choice(['melanoma', 'nevus', 'keratosis'], n)
    device = np.where(
        rng.random(n) < told,
        pd.Series(label).map(dict(melanoma='A', nevus='B', keratosis='C')),
        rng.choice(list('ABC'), n),
    )
    cohort = pd.DataFrame(
        dict(
            sample_id=[f's{i}' for i in range(n)],
            patient_id=[f'p{i // 2}' for i in range(n)],
            split='',
            finding='lesion',
            label=label,
            image=[f'{i}.png' for i in range(n)],
            text='',
            scanner=device,
        )
    )
    cohort.attrs = dict(
        access='open',
        strata=['scanner'],
        tasks=dict(lesion=dict(choices=['melanoma', 'nevus', 'keratosis'])),
    )
    files = pd.DataFrame(
        dict(
            image_sha=[f'{i:x}' for i in range(n)],
            phash=[f'{h:016x}' for h in rng.integers(0, 2**64, n, dtype=np.uint64).tolist()],
            height=100,
            width=100,
            channels=3,
            mean=rng.normal(100, 9, n),
            std=rng.normal(30, 3, n),
            blank=False,
            marker=0.0,
            bytes=1,
            reason='',
            detail='',
        ),
        index=pd.Index(cohort.image, dtype=object),
    )
    return cohort, files


def test_a_scanner_that_tells_one_of_three_classes():
    cohort, files = three_classes()
    f = found(audit_files(cohort, files), 'shortcut', 'scanner')
    scores = pd.get_dummies(
        cohort.scanner.map(dict(A='melanoma', B='nevus', C='keratosis'))
    ).astype(float)
    assert (
        f.severity == 'serious'
        and abs(
            f.value - roc_auc_score(cohort.label, scores, multi_class='ovr', labels=sorted(scores))
        )
        < 0.03
    )
    assert found(audit_files(*three_classes(told=0)), 'shortcut', 'scanner').severity in (
        'ok',
        'note',
    )


def test_credentialed_data_show_nothing_of_a_person():
    cohort, files = three_classes()
    attrs = cohort.attrs | dict(access='credentialed')
    cohort = cohort.assign(
        patient_id='Q7secret' + cohort.patient_id,
        sample_id='Q7secret' + cohort.sample_id,
        image='Q7secret/' + cohort.image,
        text=cohort.label + ' of Mrs Q7secret',
        scanner=np.where(np.arange(len(cohort)) < 4, 'Q7secret', cohort.scanner),
        split=np.where(np.arange(len(cohort)) < 352, 'train', 'test'),
    )
    cohort.attrs = attrs
    files.index = 'Q7secret/' + files.index
    files.iloc[1, files.columns.get_loc('image_sha')] = files.image_sha.iloc[355]
    a = audit(
        cohort,
        files,
        pd.DataFrame(
            dict(sample_id=['Q7secret'] * 3, reason='empty text', stage='cohort', detail='Q7secret')
        ),
    )
    said = a.findings.to_csv() + ''.join(t.to_csv() for t in a.tables.values())
    assert 'q7secret' not in said.lower()
    for t in (
        a.findings[['n']],
        a.findings.loc[a.findings.unit == 'patients', ['value']],
        a.tables['labels'][['samples', 'patients']],
        a.tables['strata'][['samples', 'patients']],
    ):
        numbers = pd.to_numeric(t.stack(), errors='coerce').dropna()
        assert not numbers.between(1, 9).any()
    for s in a.findings.sentence:
        assert not re.search(r'(?<![\d.<])[1-9] (of|patients|images|samples)', s), s


def test_400_000_hashes_in_seconds():
    rng, n = np.random.default_rng(0), 400_000
    bits = rng.integers(0, 2**64, n, dtype=np.uint64)
    bits[-1000:] = bits[:1000] ^ np.uint64(5)  # planted: two bits apart
    bits[-1500:-1000] = bits[1000:1500]  # and none
    files = pd.DataFrame(
        dict(
            image_sha=np.arange(n).astype(str),
            phash=[f'{h:016x}' for h in bits.tolist()],
            width=512,
            height=512,
        ),
        index=[f'{i}.png' for i in range(n)],
    )
    start = time.process_time()
    pairs = near_duplicates(files)
    assert (
        time.process_time() - start < 30
        and (pairs.distance == 2).sum() == 1000
        and (pairs.distance == 0).sum() == 500
        and len(pairs) == 1500
    )


def test_a_scan_of_other_files_is_refused():
    cohort, files = three_classes()
    with pytest.raises(InputError, match='images of the cohort are not in the table'):
        audit_files(cohort, files.iloc[5:])
