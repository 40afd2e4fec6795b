"""What the model never saw: cropped, turned, cut short, mislabelled; through the command line."""

import json

import numpy as np, pandas as pd, pytest
from PIL import Image

from smsbench.audit.run import load_results
from smsbench.data.cohort import gather_card, read_manifest
from smsbench.report.audit_page import delivery_table
from smsbench.report.provenance import table_steps
from smsbench.testing import class_folders, layouts, mimic_layouts
from smsbench.testing.tiny import tiny_checkpoint

LAYOUTS = {**mimic_layouts.LAYOUTS, **class_folders.LAYOUTS, **layouts.LAYOUTS}

CARD = """name: mine
title: made up
version: "1"
licence: none
access: open
table: samples.csv
columns: {sample_id: id, patient_id: patient, image: image, text: text}
tasks:
  pneumonia: {question: "Is there pneumonia?", noun: film, text_noun: report, label: label}
"""


def data_set(folder, more='', n=24, shape=(240, 120), **columns):
    "Write a card, a table and films; every second film has a bright base."
    (folder / 'images').mkdir(parents=True)
    rows = []
    for i in range(n):
        a = np.random.default_rng(i).integers(30, 80, shape).astype(np.uint8)
        if i % 2:
            a[-25:-2, 30:90] += 150
        Image.fromarray(a).save(folder / f'images/f{i:02}.png')
        own = {k: v(i) for k, v in columns.items()}
        row = dict(id=f's{i}', patient=f'p{i}', image=f'images/f{i:02}.png', text=f'Film {i}.')
        rows.append(row | dict(label='yes' if i % 2 else 'no') | own)
    pd.DataFrame(rows).to_csv(folder / 'samples.csv', index=False)
    (folder / 'card.yaml').write_text(CARD + more)


def cohort(here, folder, *more):
    root = ('--root', folder, '--out', folder / 'c.parquet')
    return here('cohort', folder / 'card.yaml', *root, *more)


@pytest.mark.parametrize('name', sorted(LAYOUTS))
@pytest.mark.parametrize('limit', [None, 3])
def test_the_funnel_of_every_card_adds_up(name, limit, tmp_path):
    LAYOUTS[name](tmp_path)
    card = read_manifest(name).model_copy(update=dict(max_excluded=1.0))
    table, _, _, about, _ = gather_card(card, tmp_path, limit=limit, check_images=limit is None)
    left = 0
    for step, n in table_steps(about, about['excluded']):
        if step.startswith(('rows in', 'samples:')):
            left = n
        else:
            left -= n
    assert left == len(table)
    assert about['funnel'][-1]['removed'] == 0


def test_a_number_that_is_none_is_counted_shown_or_refused(here, tmp_path):
    bands = 'strata:\n  age: {column: age, bins: [40, 60]}\n'
    data_set(tmp_path / 'few', bands, age=lambda i: 'about 50' if i < 2 else 30 + i)
    done = cohort(here, tmp_path / 'few')
    assert done[0] == 0, done[2]
    assert '2 of 24 cells of age are no numbers' in done[1]
    data_set(tmp_path / 'comma', bands, age=lambda i: f'{30 + i},5')
    refused = cohort(here, tmp_path / 'comma')
    assert refused[0] == 2 and 'decimal' in refused[2]
    (tmp_path / 'comma' / 'card.yaml').write_text(CARD + bands + 'decimal: ","\n')
    assert cohort(here, tmp_path / 'comma')[0] == 0
    assert set(pd.read_parquet(tmp_path / 'comma' / 'c.parquet').age) == {'<40', '40-59'}


def test_paths_ids_and_labels_as_programs_write_them(here, tmp_path):
    card = 'paths: windows\n'
    data_set(
        tmp_path / 'a',
        card,
        image=lambda i: f'images\\f{i:02}.png',
        patient=lambda i: '100.0' if i == 3 else '100' if i == 4 else f'{i}',
    )
    done = cohort(here, tmp_path / 'a', '--json')
    assert done[0] == 0, done[2]
    assert json.loads(done[1])['patients'] == 23
    labels = {(r['value'], r['becomes']): r['n'] for r in json.loads(done[1])['labels']}
    assert labels == {('yes', 'yes'): 12, ('no', 'no'): 12}
    (tmp_path / 'a' / 'card.yaml').write_text(CARD)
    assert 'paths: windows' in cohort(here, tmp_path / 'a')[2]


def test_an_audit_says_what_a_cropping_processor_cuts_away(here, tmp_path):
    boxes = 'boxes: {table: boxes.csv, key: id, columns: [x, y, w, h]}\n'
    data_set(tmp_path / 'd', boxes)
    marked = [dict(id=f's{i}', x=30, y=215, w=60, h=23) for i in range(1, 24, 2)]
    pd.DataFrame(marked).to_csv(tmp_path / 'd' / 'boxes.csv', index=False)
    assert cohort(here, tmp_path / 'd')[0] == 0
    model = tiny_checkpoint('llava', tmp_path / 'm')
    common = ('audit', '--cohort', tmp_path / 'd' / 'c.parquet', '--model', model, '--n-boot', 100)
    common += ('--arms', 'image_swap,text_swap', '--check', 0)
    done = here(*common, '--out', tmp_path / 'cut')
    assert '24 of 24 images are cropped' in done[1] + done[2]
    assert '12 are not seen at all' in done[1] + done[2]
    delivery = json.loads((tmp_path / 'cut' / 'delivery.json').read_text())['m']
    assert abs(delivery['original']['image_seen'] - 0.5) < 0.02
    results = load_results(tmp_path / 'cut')
    assert '50 % of the image seen' in str(delivery_table(results))
    caveats = results.verdicts['m']['caveats']
    assert 'cuts out the middle' in next(c['text'] for c in caveats if c['kind'] == 'cropped')
    done = here(*common, '--pad-to-square', '--out', tmp_path / 'pad')
    assert 'cropped' not in done[1] + done[2]
    delivery = json.loads((tmp_path / 'pad' / 'delivery.json').read_text())['m']
    assert delivery['original']['image_seen'] == 1
    again = here(*common, '--out', tmp_path / 'pad')  # another input of the model: refused
    assert again[0] == 2
