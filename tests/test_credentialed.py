"""Secrets planted in a credentialed data set are in nothing that is written or printed.

They are in texts, ids, file names, rare values and pixels.
"""

import base64, io, json, re
from pathlib import Path

import numpy as np, pandas as pd, pyarrow.parquet as pq, pytest
from PIL import Image

from smsbench.data.phantom import phantom_cohort, read_phantom
from smsbench.privacy import read_table

CARD = """
name: lent
title: Lent films
version: '1'
licence: data use agreement
access: credentialed
table: table.csv
columns: {sample_id: id, patient_id: patient, image: image, text: text, split: split}
filters: [{column: kind, equals: film}]
tasks:
  effusion:
    question: Is there pleural effusion?
    noun: chest film
    label: {column: label, map: {'1': 'yes', '0': 'no'}}
strata: {ward: ward}
keep: [note]
max_excluded: 0.3
"""
MARK = np.frombuffer(b'SECRETPIXELS', np.uint8)  # a row of grey values that no other picture holds


@pytest.fixture(scope='module')
def lent(tmp_path_factory):
    "A data set in which every cell that could name somebody holds the word SECRET."
    root, rows = tmp_path_factory.mktemp('lent'), []
    (root / 'SECRETfolder').mkdir()
    for i, r in enumerate(phantom_cohort(80, size=64, seed=5).itertuples()):
        film = read_phantom(r.image).copy()
        film[0, : len(MARK)] = MARK
        Image.fromarray(film).save(root / f'SECRETfolder/SECRETfile{i}.png')
        rows.append(
            dict(
                id=f'SECRETsample{i}',
                patient=f'SECRET{r.patient_id}',
                image=f'SECRETfolder/SECRETfile{i}.png',
                text=f'SECRETname {r.text}',
                split='test',
                kind='film',
                label=int(r.label == 'yes'),
                ward='SECRETward' if i < 4 else 'one' if i % 2 else 'two',
                note=f'SECRETnote{i}',
                age=f'SECRETage{i // 3}',
            )
        )
    rows[7]['label'] = 'SECRETlabel'
    rows[8]['text'] = ''
    rows[9]['patient'] = ''
    rows[11]['image'] = 'SECRETfolder/SECRETlost.png'
    (root / rows[10]['image']).write_bytes(
        (root / rows[10]['image']).read_bytes()[:200]
    )  # a broken film
    pd.DataFrame(rows).to_csv(root / 'table.csv', index=False)
    (root / 'card.yaml').write_text(CARD)
    return root


def leaves(path):
    """The content of a file, as bytes.

    Tables and their metadata, pictures as grey values, the pictures in a page.
    """
    if path.suffix == '.parquet':
        t = pq.read_table(path)
        return [
            t.to_pandas().to_csv().encode(),
            json.dumps(
                {k.decode(): v.decode() for k, v in (t.schema.metadata or {}).items()}
            ).encode(),
        ]
    raw = path.read_bytes()
    pictures = (
        [raw]
        if path.suffix in ('.png', '.jpg')
        else [
            base64.b64decode(b)
            for b in re.findall(rb'data:image/\w+;base64,([A-Za-z0-9+/=]+)', raw)
        ]
    )
    return [raw, *(Image.open(io.BytesIO(p)).convert('L').tobytes() for p in pictures)]


def secrets(folder, printed):
    "Where SECRET is found."
    files = [p for p in Path(folder).rglob('*') if p.is_file()]
    assert files
    return [
        p.name
        for p in files
        if 'SECRET' in str(p.relative_to(folder)) or any(b'SECRET' in b for b in leaves(p))
    ] + [s for s in printed if 'SECRET' in s]


def test_nothing_that_is_written_or_printed_holds_a_secret(lent, cli, here, tmp_path):
    printed = []

    def run(*args, code=0):
        got = (cli if '--manifest' in args else here)(
            *args
        )  # one of them as a program of its own, with all that it prints
        assert got[0] == code, got
        printed.extend(got[1:])

    run('cohort', lent / 'card.yaml', '--root', lent, '--out', 'c.parquet', '--report', 'page')
    run('cohort', lent / 'card.yaml', '--root', lent, '--out', 'd.parquet', '--json')
    run('plan', 'c.parquet', '--out', 'plan.parquet', '--arms', 'image_swap,text_swap')
    run(
        'audit',
        '--cohort',
        'c.parquet',
        '--model',
        'planted:text-only',
        '--arms',
        'image_swap,text_swap',
        '--out',
        'run',
        '--n-boot',
        '100',
    )
    run(
        'audit',
        '--manifest',
        lent / 'card.yaml',
        '--root',
        lent,
        '--model',
        'planted:image-only',
        '--arms',
        'image_swap',
        '--out',
        'again',
        '--n-boot',
        '100',
    )
    run('report', 'run')
    (lent / 'SECRETfolder/SECRETfile30.png').rename(
        lent / 'SECRETfolder/moved.png'
    )  # a film is gone when the model is asked
    try:
        run(
            'audit',
            '--cohort',
            'c.parquet',
            '--model',
            'planted:image-only',
            '--arms',
            'image_swap',
            '--out',
            'lost',
            '--n-boot',
            '100',
        )
    finally:
        (lent / 'SECRETfolder/moved.png').rename(lent / 'SECRETfolder/SECRETfile30.png')
    assert secrets(tmp_path, printed) == []
    c = read_table(tmp_path / 'c.parquet', 'cohort')
    assert (
        len(c) == 75
        and c.patient_id.nunique() > 20
        and set(c.ward) == {'one', 'two', 'withheld'}
        and set(c.note) == {'withheld'}
    )


def test_many_questions_about_few_films_hide_nothing_less(lent, here, tmp_path):
    """Seven questions make seven samples of a film.

    Values of few patients stay withheld, whatever the number of rows.
    """
    ask = (
        "{question: 'Is there pleural effusion?', label: {column: label, map: {'1': 'yes', '0':"
        " 'no'}}}"
    )
    card = (
        CARD[: CARD.index('tasks:')]
        + 'tasks:\n'
        + ''.join(f'  q{i}: {ask}\n' for i in range(7))
        + 'strata: {ward: ward, age: age}\nkeep: [note]\nmax_excluded: 0.3\n'
    )
    (tmp_path / 'many.yaml').write_text(card)
    shown = [
        here('cohort', 'many.yaml', '--root', lent, '--out', 'c.parquet'),
        here(
            'audit',
            '--cohort',
            'c.parquet',
            '--model',
            'planted:text-only',
            '--arms',
            'image_swap',
            '--out',
            'run',
            '--n-boot',
            '100',
        ),
    ]
    assert [s[0] for s in shown] == [0, 0], shown
    (tmp_path / 'many.yaml').unlink()
    assert secrets(tmp_path, [t for s in shown for t in s[1:]]) == []
    m = read_table(tmp_path / 'run/metrics.parquet')
    assert (
        not m.n_clusters.between(1, 9).any()
        and (m.note == 'suppressed: fewer than 10 patients').any()
        and m[m.n_clusters == 0].ci_low.isna().mean() > 0  # some numbers went with their counts
        and m[m.note.str.startswith('suppressed')][['value', 'ci_low', 'ci_high']].isna().all(None)
    )


def test_the_search_would_find_them(lent):
    "Pixels, text and ids as they lie in the data set are found by the same search."
    found = secrets(lent, [])
    assert 'table.csv' in found and 'SECRETfile0.png' in found


def test_small_counts_are_hidden(lent, here, tmp_path):
    code, out, _ = here('cohort', lent / 'card.yaml', '--root', lent, '--out', 'c.parquet')
    assert code == 0 and re.search(r'NaN label|unknown label', out) and '<10' in out
    about = read_table(tmp_path / 'c.parquet').attrs
    assert set(about['excluded'].values()) == {'<10'} and not any(
        isinstance(s['removed'], int) and 0 < s['removed'] < 10 for s in about['funnel']
    )


def test_other_files_do_not_open_it(lent, here, tmp_path):
    "A sealed cohort is opened only by the data it was made from."
    import shutil

    assert here('cohort', lent / 'card.yaml', '--root', lent, '--out', 'c.parquet')[0] == 0
    other = shutil.copytree(lent, tmp_path / 'other')
    t = pd.read_csv(other / 'table.csv', dtype=str)
    t.patient = 'x' + t.patient
    t.to_csv(other / 'table.csv', index=False)
    code, _, err = here(
        'audit',
        '--cohort',
        'c.parquet',
        '--root',
        other,
        '--model',
        'planted:image-only',
        '--arms',
        'image_swap',
        '--out',
        'run',
    )
    assert (
        code == 2 and 'are they the files it was made from' in err and err.count('smsbench:') == 1
    )
