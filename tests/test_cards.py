"Cards that ship with the package, tried on data made here."

import re

import pytest
import yaml

from smsbench.core import InputError
from smsbench.data.cards import read_manifest
from smsbench.data.cohort import build_cohort, manifest_path
from smsbench.data.phantom import phantom_cohort, save_phantom


@pytest.mark.parametrize('findings', ['effusion', ('nodule', 'device', 'effusion')])
def test_phantom_card_gives_the_phantom_back(tmp_path, findings):
    made = phantom_cohort(20, seed=3, findings=findings)
    save_phantom(made, tmp_path)
    cohort, exclusions = build_cohort('phantom', tmp_path)
    assert (
        exclusions.empty
        and cohort.attrs['tasks'] == made.attrs['tasks']
        and cohort.attrs['strata'] == made.attrs['strata']
        and cohort.attrs['licence'] == made.attrs['licence']
    )
    same = [
        c for c in made if c != 'image'
    ]  # files here, references there; their pixels are the same
    assert 'image_sha' in same and set(made) <= set(cohort)
    assert (
        cohort[same]
        .astype(str)
        .reset_index(drop=True)
        .equals(made[same].astype(str).reset_index(drop=True))
    )


def test_csv_images_card_works_as_it_stands_and_so_does_every_rule_in_its_comments(tmp_path):
    made = phantom_cohort(20, seed=1)
    save_phantom(made, tmp_path)
    t = made.rename(columns=dict(sample_id='id', patient_id='patient')).assign(
        image=[f'images/{p.name}' for p in sorted((tmp_path / 'images').iterdir())]
    )
    t.to_csv(tmp_path / 'samples.csv', index=False)
    cohort, exclusions = build_cohort('csv_images', tmp_path)
    assert (
        len(cohort) == 20
        and exclusions.empty
        and cohort.label.tolist() == made.label.tolist()
        and cohort.attrs['access'] == 'credentialed'
    )
    card = manifest_path('csv_images').read_text()
    rules = [line.split('# label: ')[1] for line in card.splitlines() if '# label: ' in line]
    columns = t.assign(
        pneumonia='1',
        diagnosis='pneumonia',
        labels='Pneumonia|Mass',
        severity='4',
        Pneumonia='1',
        Consolidation='0',
        view='AP Supine',
        quality='good',
        report='x',
    )
    columns.to_csv(tmp_path / 'samples.csv', index=False)
    for rule in rules:
        (tmp_path / 'card.yaml').write_text(card.replace('label: label ', f'label: {rule} #'))
        assert set(build_cohort(tmp_path / 'card.yaml', tmp_path)[0].label) == {'yes'}
    assert len(rules) == 8
    on = '\n'.join(
        line[2:] if line.startswith(('# strata', '#   sex', '#   age_band', '#   view')) else line
        for line in card.splitlines()
    )  # as a person would take the marks away
    (tmp_path / 'card.yaml').write_text(on)
    assert set(build_cohort(tmp_path / 'card.yaml', tmp_path)[0]['view']) == {'AP'} and set(
        yaml.safe_load(on)['strata']
    ) == {'sex', 'age_band', 'view'}


def test_every_block_that_the_template_keeps_in_comments_is_understood(tmp_path):
    card = manifest_path('csv_images').read_text().replace('  # split: split', '  split: split')
    blocks = [
        [line[2:] for line in b.splitlines()]
        for b in re.findall(r'^# [a-z_]+:.*\n?(?:#   .*\n?)*', card, re.M)
    ]
    keys = [b[0].partition(':')[0] for b in blocks]
    assert {
        'table',
        'joins',
        'derive',
        'text',
        'filters',
        'strata',
        'boxes',
        'keep',
        'expected',
        'patient_disjoint',
    } <= set(keys) and keys.count('table') == 5

    def understood(key, lines):
        elsewhere = key == 'text' and lines[1].strip().startswith(
            ('file', 'columns')
        )  # then it is no column
        rest = (
            re.sub(r'^table:.*\n', '', card, flags=re.M)
            if key == 'table'
            else re.sub(r'^  text: .*\n', '', card, flags=re.M)
            if elsewhere
            else card
        )
        (tmp_path / 'card.yaml').write_text(rest + '\n' + '\n'.join(lines) + '\n')
        return getattr(read_manifest(tmp_path / 'card.yaml'), key)

    for key, lines in zip(keys, blocks):
        for some in [[lines[0], line] for line in lines[1:]] if key == 'text' else [lines]:
            assert understood(key, some), key


def test_wrong_folder_is_one_line(tmp_path):
    with pytest.raises(
        InputError, match=r'^csv_images: table samples\.csv: no such file below the data root$'
    ):
        build_cohort('csv_images', tmp_path)


SOURCES = {'report', 'radiologist', 'pathology', 'other'}
TEMPLATES = {
    'csv_images',
    'class_folders',
    'vqa_paraphrases',
    'vqa_variants',
}  # only their user knows
UNTOLD = {'fairvlmed'}  # its publication does not say


def test_every_card_states_where_its_labels_come_from():
    for path in sorted(manifest_path('csv_images').parent.glob('*.yaml')):
        said = yaml.safe_load(path.read_text())
        assert 'label_source' in said, f'{path.name} does not say where its labels come from'
        known = said['label_source'] in SOURCES
        assert known != (path.stem in TEMPLATES | UNTOLD), f"{path.name}: {said['label_source']!r}"
        if not known:
            assert said['label_source'] == ''
        if path.stem in TEMPLATES:
            assert re.search(r'^label_source: ""\s+# CHANGE', path.read_text(), re.M)


def test_the_source_of_labels_reaches_the_plan_and_changes_no_hash(tmp_path):
    from smsbench.audit.plan import cohort_hash, make_plan

    save_phantom(phantom_cohort(12, seed=3, findings=('effusion',)), tmp_path)
    card = yaml.safe_load(manifest_path('phantom').read_text())
    card['tasks'] = {'effusion': card['tasks']['effusion']}
    made = {}
    for source in ('other', 'report', ''):
        (tmp_path / 'card.yaml').write_text(yaml.safe_dump(card | dict(label_source=source)))
        cohort, _ = build_cohort(tmp_path / 'card.yaml', tmp_path)
        plan, _ = make_plan(cohort, ('image_swap',))
        assert cohort.attrs['label_source'] == plan.attrs['label_source'] == source
        made[source] = cohort_hash(cohort), plan.attrs['plan_hash'], cohort.attrs['manifest_hash']
    assert len({v[:2] for v in made.values()}) == 1  # the same samples, the same trials
    assert len({v[2] for v in made.values()}) == 3  # of cards that say different things


def test_an_unknown_source_of_labels_is_refused(tmp_path):
    card = (
        manifest_path('csv_images').read_text().replace('label_source: ""', 'label_source: reports')
    )
    (tmp_path / 'card.yaml').write_text(card)
    with pytest.raises(InputError, match='label_source: .*report, radiologist, pathology, other'):
        read_manifest(tmp_path / 'card.yaml')


def test_a_report_that_was_mined_says_so_in_the_phantom():
    made = {f: phantom_cohort(4, label_from=f).attrs['label_source'] for f in ('film', 'text')}
    assert made == dict(film='other', text='report')
