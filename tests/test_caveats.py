"""Limits of a verdict are shown next to it.

They come in one order, on the command line, in JSON and in the run directory.
"""

import json, re, shlex

import numpy as np, pandas as pd, pytest
from PIL import Image

from smsbench.core import read_json
from smsbench.audit.caveats import KINDS
from smsbench.privacy import read_table

CARD = """
name: mine
title: My films
version: '1'
licence: CC0-1.0
access: ACCESS
label_source: SOURCE
table: table.csv
columns: {sample_id: id, patient_id: patient, image: image, text: text}
tasks:
  effusion:
    question: Is there pleural effusion?
    noun: chest film
    label: {column: label, map: {'1': 'yes', '0': 'no'}}
strata: {view: projection, ward: ward}
"""


@pytest.fixture(scope='module')
def films(tmp_path_factory):
    "Films of 70 patients: 4 in 5 of those with the finding are AP, 4 in 5 of the others PA."
    from smsbench.data.phantom import phantom_cohort, read_phantom

    root, rows = tmp_path_factory.mktemp('films'), []
    rng = np.random.default_rng(0)
    for i, r in enumerate(
        phantom_cohort(140, size=64, seed=5).drop_duplicates('patient_id').head(70).itertuples()
    ):
        Image.fromarray(read_phantom(r.image)).save(root / f'{i}.png')
        sick = r.label == 'yes'
        rows.append(
            dict(
                id=f'{i:03d}',
                patient=r.patient_id,
                image=f'{i}.png',
                text=f'Film {i}: {r.text}',
                label=int(sick),
                projection='AP' if sick == (rng.random() < 0.8) else 'PA',
                ward='one' if i % 2 else 'two',
            )
        )
    pd.DataFrame(rows).to_csv(root / 'table.csv', index=False)
    return root


def cohort(here, films, folder, access='open', source='report'):
    "The cohort of these films under a card."
    (folder / 'card.yaml').write_text(CARD.replace('ACCESS', access).replace('SOURCE', source))
    code, _, err = here('cohort', 'card.yaml', '--root', films, '--out', 'c.parquet')
    assert code == 0, err


def test_the_list_is_the_same_everywhere_and_its_command_runs(films, here, tmp_path):
    cohort(here, films, tmp_path)
    code, out, err = here(
        'audit',
        '--cohort',
        'c.parquet',
        '--model',
        'planted:image-only',
        '--arms',
        'image_swap,text_swap',
        '--margin',
        '.07',
        '--margin-reason',
        "it's enough",
        '--n-boot',
        '100',
        '--out',
        'my run',
    )
    assert code == 0, err
    caveats = read_json(tmp_path / 'my run/verdicts.json')['models']['planted:image-only'][
        'caveats'
    ]
    kinds = [c['kind'] for c in caveats]
    assert kinds == sorted(kinds, key=KINDS.index) and {'files', 'labels'} <= set(kinds), kinds
    first = caveats[kinds.index('files')]
    assert 'view alone tells the label' in first['text'] and shlex.split(first['command'])[:4] == [
        'smsbench',
        'audit',
        '--cohort',
        'RUN/cohort.parquet',
    ]
    assert not re.search(
        r'/(tmp|home|root|work|var)/', json.dumps(caveats)
    )  # a page may be sent to others
    lines = out.splitlines()
    command = next(line.strip() for line in lines if line.strip().startswith('smsbench audit'))
    assert (
        lines[0] == 'planted:image-only: image relies, text ignores'
        and lines.index(f'      {command}') > 0
    )
    places = [next(i for i, line in enumerate(lines) if c['text'][:30] in line) for c in caveats]
    assert places == sorted(places)
    words = shlex.split(command)
    code, out, err = here(*words[1:])  # as it was printed
    assert code == 0, err
    plan, rows = (
        read_table(tmp_path / 'my run-matched/plan.parquet', 'plan'),
        read_table(tmp_path / 'my run-matched/cohort.parquet', 'cohort').set_index('sample_id'),
    )
    swapped = plan[plan.arm == 'image_swap']
    assert (
        len(swapped)
        and (
            rows['view'][swapped.image_id].to_numpy() == rows['view'][swapped.sample_id].to_numpy()
        ).all()
    )
    again = read_json(tmp_path / 'my run-matched/verdicts.json')['models']['planted:image-only']
    assert (
        again['relies_on_image']['margin'] == 0.07
        and again['relies_on_image']['verdict'] == 'relies'
    )  # it reads the finding
    view = next(c for c in again['caveats'] if 'view alone' in c['text'])
    assert view['command'] == '' and 'Donors were matched on it' in view['text']
    code, out, _ = here('report', 'my run', '--json')
    assert code == 0 and json.loads(out)['models']['planted:image-only']['caveats'] == caveats


def test_labels_of_unknown_origin_are_named(films, here, tmp_path):
    cohort(here, films, tmp_path, source='""')
    code, out, err = here(
        'audit',
        '--cohort',
        'c.parquet',
        '--model',
        'planted:constant',
        '--model',
        'planted:image-only',
        '--arms',
        'image_swap,text_swap',
        '--pooled-auroc',
        '--n-boot',
        '100',
        '--out',
        'run',
    )
    assert code == 0 and 'does not state where the labels come from' in out, err
    for told in (out, (tmp_path / 'run/report.html').read_text()):  # what both models share: once
        assert told.count('smsbench audit --cohort') == 1 == told.count('To see whether that made')
        assert 'run the same audit with donors matched on view.' in told
    assert '--pooled-auroc' in out and 'auroc_pooled' in set(
        read_table(tmp_path / 'run/metrics.parquet', 'metrics').metric
    )
    told = [
        c['text']
        for c in read_json(tmp_path / 'run/verdicts.json')['models']['planted:constant']['caveats']
        if c['kind'] == 'labels'
    ]
    assert len(told) == 1 and 'does not state' in told[0]


def test_what_is_credentialed_is_told_without_small_counts(films, here, tmp_path):
    "A model that never gets the image, on data of which no count under ten may be told."
    table = pd.read_csv(films / 'table.csv', dtype=str)
    few = pd.concat([table[table.label == '1'].head(24), table[table.label == '0'].head(7)])
    root = tmp_path / 'data'
    root.mkdir()
    few.to_csv(root / 'table.csv', index=False)
    for name in few.image:
        (root / name).write_bytes((films / name).read_bytes())
    cohort(here, root, tmp_path, access='credentialed')
    code, out, err = here(
        'audit',
        '--cohort',
        'c.parquet',
        '--model',
        'planted:loses-image',
        '--arms',
        'image_swap,text_swap',
        '--n-boot',
        '100',
        '--out',
        'run',
    )
    assert code == 1
    caveats = read_json(tmp_path / 'run/verdicts.json')['models']['planted:loses-image']['caveats']
    assert [c['kind'] for c in caveats][0] == 'void' and 'image_swap' in caveats[0]['text']
    told = ' '.join(c['text'] for c in caveats)
    assert not re.search(
        r'(?<![\d.,–-])[1-9](?![\d.,]| *%) (of|trials|samples|patients|images|texts)', told
    ), told
    assert '--manifest' not in ' '.join(c['command'] for c in caveats) and 'SECRET' not in out


def test_answers_from_elsewhere_keep_the_audit_that_lies_beside_the_cohort(films, here, tmp_path):
    cohort(here, films, tmp_path, source='radiologist')
    assert here('plan', 'c.parquet', '--arms', 'image_swap,text_swap', '--out', 'p.parquet')[0] == 0
    plan = read_table(tmp_path / 'p.parquet', 'plan')
    (tmp_path / 'a.jsonl').write_text(
        '\n'.join(json.dumps(dict(trial_id=t, raw_text='Yes.')) for t in plan.trial_id)
    )
    code, out, err = here(
        'predictions',
        'a.jsonl',
        '--plan',
        'p.parquet',
        '--cohort',
        'c.parquet',
        '--name',
        'theirs',
        '--n-boot',
        '100',
        '--out',
        'run',
        '--json',
    )
    assert code == 0, err
    caveats = json.loads(out)['models']['theirs']['caveats']
    kinds = [c['kind'] for c in caveats if c['kind'] in ('unproven', 'files')]
    assert kinds[0] == 'unproven' and 'files' in kinds
    assert not any('not audited' in c['text'] for c in caveats)
    commands = [c['command'] for c in caveats if c['command']]
    assert commands and all(c.startswith('smsbench plan ') for c in commands)


def test_help_says_what_is_printed_and_how_to_register(here):
    code, text, _ = here('audit', '--help')
    assert code == 0 and all(
        w in text
        for w in (
            '--registration',
            '--margin-reason',
            '--family',
            '--primary',
            '--donors',
            '--pooled-auroc',
            'caveats are printed',
        )
    )
