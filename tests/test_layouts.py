"""Every card that ships reads a made-up miniature of its official layout.

It says in one line what is wrong with a damaged one.
"""

import csv, gzip, io, json, os, shutil, zipfile
from collections import Counter
from pathlib import Path

import pytest

import smsbench.testing.class_folders  # adds its miniature to LAYOUTS
import smsbench.testing.mimic_layouts
import smsbench.testing.plain_questions  # noqa: F401  adds its miniature to LAYOUTS
from smsbench.core import InputError
from smsbench.data.cards import read_manifest
from smsbench.testing.layouts import LAYOUTS, make_layout
from smsbench.data.cohort import build_cohort, gather_card, read_image

CARDS = Path(__file__).resolve().parent.parent / 'data_manifests'
REAL = {
    'covid_notes',
    'nih_cxr',
    'nih_cxr14',
    'vqa_rad',
    'vqa_rad_organs',
}  # reduced copies of real data, see test_cohorts_real


def yes_no(yes, no):
    return {k: n for k, n in (('yes', yes), ('no', no)) if n}


# card -> finding -> label -> samples; counted by hand from the rows that make_layout writes
LABELS = {
    'fairvlmed': {'glaucoma': yes_no(6, 6)},
    'ham10000': {
        'diagnosis': {
            'melanocytic nevus': 8,
            'melanoma': 4,
            'benign keratosis': 4,
            'basal cell carcinoma': 3,
            'actinic keratosis': 2,
            'vascular lesion': 2,
            'dermatofibroma': 2,
        },
        'melanoma': yes_no(4, 21),
    },
    'ham10000_sms': {'melanoma': yes_no(4, 8)},
    'mbrset': {'diabetic_retinopathy': yes_no(9, 8), 'macular_edema': yes_no(3, 14)},
    'brset': {
        'diabetic_retinopathy': yes_no(6, 8),
        'macular_edema': yes_no(2, 12),
        'increased_cup_disc': yes_no(3, 11),
    },
    'padchest': {
        'pneumonia': yes_no(3, 7),
        'effusion': yes_no(2, 8),
        'cardiomegaly': yes_no(4, 6),
        'pneumothorax': yes_no(1, 9),
    },
    'nih_chestxray14': {
        'atelectasis': yes_no(2, 16),
        'cardiomegaly': yes_no(2, 16),
        'effusion': yes_no(4, 14),
        'pneumonia': yes_no(2, 16),
        'pneumothorax': yes_no(2, 16),
    },
    'chexpert': {
        'atelectasis': yes_no(4, 11),
        'cardiomegaly': yes_no(4, 12),
        'consolidation': yes_no(4, 12),
        'edema': yes_no(1, 12),
        'effusion': yes_no(4, 12),
    },
    'vqa_rad_official': {'closed': yes_no(4, 4)},
    'slake': {'closed': yes_no(7, 5)},
    'vqa_variants': {'closed': yes_no(9, 15)},
    'vqa_paraphrases': {'closed': yes_no(11, 8)},
    'valse_foils': {'foil': yes_no(3, 5)},
    'fake_history': {'any_finding': yes_no(4, 3)},
    'class_folders': {'eye': {'orbital disease': 6, 'healthy eye': 6, 'non-orbital disease': 3}},
}
SPLITS = {  # card -> split -> samples
    'fairvlmed': {'training': 6, 'validation': 2, 'test': 4},
    'nih_chestxray14': {'train': 60, 'test': 30},
    'chexpert': {'train': 56, 'valid': 20},
    'vqa_rad_official': {'train': 4, 'test': 4},
    'slake': {'train': 6, 'validate': 2, 'test': 4},
    'class_folders': {'train': 10, 'val': 5},
}
PATIENTS = {
    'fairvlmed': 12,
    'ham10000': 22,
    'ham10000_sms': 10,
    'mbrset': 9,
    'brset': 7,
    'padchest': 8,
    'nih_chestxray14': 9,
    'chexpert': 11,
    'vqa_rad_official': 3,
    'slake': 6,
    'vqa_variants': 4,
    'vqa_paraphrases': 4,
    'valse_foils': 7,
    'fake_history': 7,
    'class_folders': 8,
}
EXCLUDED = {
    'mbrset': {'NaN label': 4, 'missing image': 2},
    'chexpert': {'uncertain label': 4},
    'padchest': {'left out by the rule': 8},
    'vqa_paraphrases': {'NaN label': 1},
}
NOT_THEIRS = {'phantom', 'phantom_classes', 'csv_images'}


def read(name, root, **changes):
    "The card, with `changes`, on a folder; a miniature has fewer samples than the card expects."
    cohort, exclusions, _, about, _ = gather_card(
        read_manifest(name).model_copy(update=changes), root
    )  # before credentialed data are sealed
    cohort.attrs = about
    return cohort, exclusions


def rows_of(path):
    """A table as a list of dicts, whatever its kind.

    Unnamed columns get a number, since all of them are written back.
    """
    if path.suffix == '.json':
        return json.loads(path.read_text(encoding='utf-8'))
    head, *body = csv.reader(io.StringIO(path.read_text(encoding='utf-8')))
    return [dict(zip([h or f'#{i}' for i, h in enumerate(head)], r)) for r in body]


def write_rows(path, rows):
    if path.suffix == '.json':
        return path.write_text(json.dumps(rows), encoding='utf-8')
    with open(path, 'w', newline='', encoding='utf-8') as f:
        out = csv.writer(f, lineterminator='\n')
        out.writerow([('' if k.startswith('#') else k) for k in rows[0]])
        out.writerows(r.values() for r in rows)


def main_table(name, root):
    "The card's first table that exists in the miniature, None where the table is a folder."
    t = read_manifest(name).table
    return (
        None
        if t.kind == 'folders'
        else next(
            root / p
            for alternatives in t.path.values()
            for p in alternatives
            if (root / p).is_file()
        )
    )


def one_line(error):
    return '\n' not in str(error.value) and len(str(error.value)) < 600


@pytest.mark.parametrize('card', sorted(p.stem for p in CARDS.glob('*.yaml') if p.stem not in REAL))
def test_every_card_has_a_miniature_and_says_what_a_person_must_know(card):
    m = read_manifest(card)
    assert card in LAYOUTS and m.name == card
    assert all(
        x.strip() for x in (m.title, m.version, m.source, m.how, m.licence, m.citation)
    ) and m.access in ('open', 'credentialed')
    assert all(t.question.strip().endswith('?') and t.noun != 'image' for t in m.tasks.values())
    if card not in NOT_THEIRS:
        assert m.layout.strip() and all(f.why for f in m.filters)


def test_every_miniature_has_a_card_and_its_counts_are_known():
    assert set(LAYOUTS) <= {p.stem for p in CARDS.glob('*.yaml')} and not REAL & set(LAYOUTS)
    ours = {n for n, f in LAYOUTS.items() if f.__module__ == 'smsbench.testing.layouts'}
    assert ours - NOT_THEIRS == set(LABELS) == set(PATIENTS)


@pytest.mark.parametrize('name', LABELS)
def test_a_card_reads_its_layout(name, tmp_path):
    root = make_layout(name, tmp_path / 'root')
    cohort, exclusions = read(name, root)
    assert {f: g.label.value_counts().to_dict() for f, g in cohort.groupby('finding')} == LABELS[
        name
    ]
    assert cohort.patient_id.nunique() == PATIENTS[
        name
    ] and cohort.split.value_counts().to_dict() == SPLITS.get(name, {'': len(cohort)})
    assert (
        exclusions.reason.value_counts().to_dict() == EXCLUDED.get(name, {})
        and (cohort.image_sha != '').all()
    )
    assert (
        cohort.image_sha.nunique() == cohort.image.nunique()
        and (cohort.text != '').all() == read_manifest(name).has_text
    )
    assert (
        not set(cohort.label) - set(cohort.attrs['tasks'][cohort.finding[0]]['choices'])
        or cohort.finding.nunique() > 1
    )
    if 'question' in cohort:
        assert (cohort.question.str.len() > 5).all()


@pytest.mark.parametrize('name', sorted({'phantom', 'csv_images'}))
def test_the_own_layouts_are_read(name, tmp_path):
    cohort, exclusions = read(name, make_layout(name, tmp_path / 'root'))
    assert (
        exclusions.empty
        and cohort.patient_id.nunique() == {'phantom': 3, 'csv_images': 6}[name]
        and set(cohort.label) == {'yes', 'no'}
    )


@pytest.mark.parametrize('name', [n for n in LABELS if n != 'class_folders'])
def test_a_missing_column_is_one_line_that_names_it(name, tmp_path):
    m, root = read_manifest(name), make_layout(name, tmp_path / 'root')
    table = main_table(name, root)
    rows = rows_of(table)
    derived = {d.column for d in m.derive.values()}
    for gone in [c for c in dict.fromkeys([*m.needed(), *derived]) if c in rows[0]]:
        write_rows(table, [{k: v for k, v in r.items() if k != gone} for r in rows])
        with pytest.raises(InputError) as e:
            read(name, root)
        assert one_line(e) and gone in str(e.value), (gone, str(e.value))


def label_cells(m):
    "Column that holds the first task's answer."
    return next(iter(m.tasks.values())).label.reads[0]


@pytest.mark.parametrize(
    'name',
    [
        n
        for n in LABELS
        if n
        not in (
            'class_folders',
            'nih_chestxray14',
            'ham10000_sms',
            'vqa_rad_official',
            'slake',
            'valse_foils',
        )
    ],
)
def test_a_wrong_label_is_set_aside_with_its_reason(name, tmp_path):
    m, root = read_manifest(name), make_layout(name, tmp_path / 'root')
    before = len(read(name, root, max_excluded=1)[1])
    table = main_table(name, root)
    rows = rows_of(table)
    rows[0][label_cells(m)] = 'perhaps'
    write_rows(table, rows)
    cohort, exclusions = read(name, root, max_excluded=1)
    assert 'unknown label' in set(exclusions.reason) and len(exclusions) > before
    with pytest.raises(InputError, match='max_excluded 0 allows') as e:
        read(name, root, max_excluded=0)
    assert one_line(e) and (m.access == 'open') == (
        'perhaps' in str(e.value)
    )  # a credentialed cell is never quoted


@pytest.mark.parametrize('name', [*LABELS, 'phantom', 'csv_images'])
def test_a_missing_image_is_one_exclusion_per_question_and_a_wrong_root_is_one_line(name, tmp_path):
    root = make_layout(name, tmp_path / 'root')
    cohort, exclusions = read(name, root, max_excluded=1)
    gone = cohort.image.iloc[0]
    (root / gone.split('#')[0]).unlink()
    if name == 'class_folders':  # the folder is the table: a lost file leaves no trace
        return
    fewer, more = read(name, root, max_excluded=1)
    lost = Counter(more.reason) - Counter(exclusions.reason)
    assert (
        lost == {'missing image': int((cohort.image == gone).sum())}
        and gone not in set(fewer.image)
        and len(fewer) + sum(lost.values()) == len(cohort)
    )
    (tmp_path / 'empty').mkdir()
    with pytest.raises(InputError) as e:
        read(name, tmp_path / 'empty')
    assert one_line(e) and str(e.value).startswith(name)


@pytest.mark.parametrize(
    'name', [n for n in LABELS if read_manifest(n).expected.n or read_manifest(n).expected.min]
)
def test_a_miniature_is_not_taken_for_the_data(name, tmp_path):
    root = make_layout(name, tmp_path / 'root')
    with pytest.raises(InputError, match='expects') as e:
        build_cohort(name, root)
    assert one_line(e)


@pytest.mark.parametrize(
    'name', [n for n in LABELS if read_manifest(n).patient_disjoint and n != 'fairvlmed']
)
def test_a_patient_in_two_official_splits_is_refused(name, tmp_path):
    root = make_layout(name, tmp_path / 'root')
    if name == 'nih_chestxray14':
        moved, *rest = (root / 'test_list.txt').read_text().splitlines()
        (root / 'test_list.txt').write_text('\n'.join(rest))
        with open(root / 'train_val_list.txt', 'a') as f:
            f.write(moved + '\n')
    elif name == 'chexpert':
        film = root / 'valid/patient00001/study9/view1_frontal.jpg'
        film.parent.mkdir(parents=True)
        shutil.copy(root / 'valid/patient64541/study1/view1_frontal.jpg', film)
        rows = rows_of(root / 'valid.csv')
        write_rows(
            root / 'valid.csv',
            [
                *rows,
                {
                    **rows[0],
                    'Path': 'CheXpert-v1.0-small/valid/patient00001/study9/view1_frontal.jpg',
                },
            ],
        )
    else:
        shutil.copy(
            root / 'train/healthy eyes/0003_left.jpg', root / 'val/healthy eyes/0003_right.jpg'
        )
    with pytest.raises(InputError, match='patient') as e:
        read(name, root)
    assert one_line(e)
    assert len(read(name, root, patient_disjoint=False)[0])


def test_a_name_in_no_official_list_has_no_split_and_one_in_both_is_refused(tmp_path):
    root = make_layout('nih_chestxray14', tmp_path / 'root')
    first, *rest = (root / 'train_val_list.txt').read_text().splitlines()
    (root / 'train_val_list.txt').write_text('\n'.join(rest))
    cohort, _ = read('nih_chestxray14', root)
    assert set(cohort.sample_id[cohort.split == '']) == {
        f'{first}:{t}' for t in cohort.attrs['tasks']
    }


def test_boxes_are_those_of_the_films(tmp_path):
    cohort, _ = read('nih_chestxray14', make_layout('nih_chestxray14', tmp_path / 'root'))
    marked = cohort[cohort.boxes != '[]']
    assert dict(zip(marked.sample_id, map(json.loads, marked.boxes))) == {
        '00000008_000.png:pneumothorax': [[10, 12, 41, 54]],
        '00000008_001.png:effusion': [[5, 50, 25, 75]],
    }
    assert set(marked.label) == {'yes'} and set(marked.split) == {'test'}
    assert cohort.drop_duplicates('image').age_band.value_counts().to_dict() == {
        '18-39': 6,
        '40-59': 2,
        '60-79': 4,
        '80+': 2,
        'unknown': 4,
    }  # 414 and 011M are no ages in years


def test_padchest_may_stay_packed(tmp_path):
    "Table as .gz and films in numbered archives: the same cohort, the same pixels."
    root = make_layout('padchest', tmp_path / 'root')
    cohort, unpacked = read('padchest', root)
    table = main_table('padchest', root)
    with gzip.open(f'{table}.gz', 'wb') as f:
        f.write(table.read_bytes())
    table.unlink()
    for n in '01':
        with zipfile.ZipFile(root / f'{n}.zip', 'w') as z:
            for p in sorted((root / n).iterdir()):
                z.write(p, p.name)
        shutil.rmtree(root / n)
    m = read_manifest('padchest')
    packed, exclusions = read(
        'padchest',
        root,
        columns=m.columns.model_copy(update=dict(image='{ImageDir}.zip!{ImageID}')),
    )
    assert exclusions.equals(unpacked)
    assert packed.drop(columns='image').equals(cohort.drop(columns='image'))
    assert read_image(root, packed.image[0]).dtype == 'uint8' and set(
        packed.text.str.split().str[0]
    ) <= {'sin', 'condensacion', 'cardiomegali', 'camar', 'aument'}


@pytest.mark.parametrize(
    'name, old, new',
    [
        ('brset', 'labels_brset.csv', 'labels.csv'),
        ('ham10000', 'HAM10000_metadata.csv', 'HAM10000_metadata'),
        ('slake', 'validate.json', 'validation.json'),
    ],
)
def test_other_releases_call_a_table_otherwise(name, old, new, tmp_path):
    root = make_layout(name, tmp_path / 'root')
    cohort, _ = read(name, root)
    os.rename(root / old, root / new)
    assert read(name, root)[0].equals(cohort)


def test_uncertain_labels_follow_the_policy_of_the_card(tmp_path):
    root, m = make_layout('chexpert', tmp_path / 'root'), read_manifest('chexpert')
    counts = {}
    for policy in ('exclude', 'yes', 'no'):
        tasks = {
            f: t.model_copy(update=dict(label=t.label.model_copy(update=dict(uncertain=policy))))
            for f, t in m.tasks.items()
        }
        cohort, _ = read('chexpert', root, tasks=tasks)
        counts[policy] = cohort[cohort.finding == 'edema'].label.value_counts().to_dict()
    assert counts == {'exclude': yes_no(1, 12), 'yes': yes_no(4, 12), 'no': yes_no(1, 15)}


def test_grades_agree_with_the_published_rule(tmp_path):
    """Threshold 1 and the rule of the SMS study label grades 0 to 4 alike.

    Both leave out an ungraded image.
    """
    for name, rule in (('mbrset', 'sms_mbrset'), ('brset', 'sms_brset')):
        root, m = make_layout(name, tmp_path / name), read_manifest(name)
        t = m.tasks['diabetic_retinopathy']
        published = t.model_copy(update=dict(label=type(t.label)(column=t.label.column, rule=rule)))
        a, b = (read(name, root, tasks={'dr': task}, max_excluded=1)[0] for task in (t, published))
        assert (
            a.label.tolist() == b.label.tolist()
            and a.sample_id.tolist() == b.sample_id.tolist()
            and set(a.label) == {'yes', 'no'}
        )


def test_texts_say_what_the_card_promises(tmp_path):
    def read_one(name):
        return read(name, make_layout(name, tmp_path / name), max_excluded=1)[0]

    ham, sms = read_one('ham10000'), read_one('ham10000_sms')
    assert (
        ham.text[0] == 'Age: 30.0; sex: male; site of the lesion: back'
        and not ham.text.str.contains('histo|consensus').any()
        and sms.text.str.contains('histo').any()
    )
    brset = read_one('brset')
    assert (
        brset.text[0]
        == 'Age: 38; sex: male; eye: right; comorbidities: ; years with diabetes: ; insulin: '
        and set(brset.sex)
        == {
            'male',
            'female',
        }
    )
    history = read_one('fake_history')
    assert (
        history.text[0]
        == 'Prior chest X-ray report:\nThe lungs are clear.\n\nCurrent chest X-ray report:\nA large'
        ' effusion is present.'
    )
    foils = read_one('valse_foils')
    assert all(
        ('There is not' in t) == (label == 'yes') for t, label in zip(foils.text, foils.label)
    )  # the text denies what the film shows
    assert foils.attrs['tasks']['foil']['choices'] == ['yes', 'no', 'uncertain', 'contradictory']


def test_paraphrases_keep_what_a_study_of_wordings_needs(tmp_path):
    variants, paraphrases = (
        read(n, make_layout(n, tmp_path / n))[0] for n in ('vqa_variants', 'vqa_paraphrases')
    )
    assert (variants.groupby(['study_id', 'asked']).variant.nunique() == 3).all() and (
        variants.groupby(['study_id', 'asked']).label.nunique() == 1
    ).all()
    assert paraphrases.groupby('dicom_id').question.nunique().tolist() == [4, 4, 4, 4, 3] and set(
        paraphrases['variant']
    ) == set('0123')
    assert (variants.text == '').all() and variants.question[1] == 'Does this film show edema?'


def test_funnels_tell_filters_and_why(tmp_path):
    cohort, _ = read('padchest', make_layout('padchest', tmp_path / 'root'))
    steps = [(s['removed'], s['why']) for s in cohort.attrs['funnel'] if s['why']]
    assert (3, 'the questions are about frontal films') in steps and (
        1,
        'a swap of texts needs a text',
    ) in steps
    assert cohort.attrs['funnel'][-1]['left'] == len(cohort)


@pytest.mark.parametrize('name', ['brset', 'nih_chestxray14', 'padchest'])
def test_tables_as_other_programs_save_them(name, tmp_path):
    """A byte-order mark changes nothing.

    Another separator is one line that names it; another encoding is one line.
    """
    root = make_layout(name, tmp_path / 'root')
    cohort, _ = read(name, root)
    table = main_table(name, root)
    text = table.read_text(encoding='utf-8')
    table.write_text('\ufeff' + text, encoding='utf-8')
    assert read(name, root)[0].equals(cohort)
    with open(table, 'w', newline='', encoding='utf-8') as f:
        csv.writer(f, delimiter=';').writerows(csv.reader(io.StringIO(text)))
    with pytest.raises(InputError, match="separator ';'") as e:
        read(name, root)
    assert one_line(e)
    table.write_bytes(text.replace(',', ',\u00e1', 1).encode('latin-1'))
    with pytest.raises(InputError, match='(?i)utf-8') as e:
        read(name, root)
    assert one_line(e)


def test_layout_folder_must_be_empty(tmp_path):
    make_layout('slake', tmp_path / 'a')
    for name, folder in (('slake', tmp_path / 'a'), ('nowhere', tmp_path / 'b')):
        with pytest.raises(InputError) as e:
            make_layout(name, folder)
        assert one_line(e)


@pytest.mark.parametrize('name', sorted(LAYOUTS))
def test_the_example_of_a_card_works_as_it_is_printed(name, tmp_path, capsys):
    "What `--example` writes, and the command that it suggests."
    import shlex
    from smsbench.cli.commands import main

    folder = tmp_path / 'my data'
    assert main(['cohort', name, '--example', str(folder)]) in (0, None)
    command = shlex.split(capsys.readouterr().out.splitlines()[-1].removeprefix('now: smsbench '))
    command[command.index('--out') + 1] = str(tmp_path / 'c.parquet')
    assert main(command) in (0, None), capsys.readouterr().err
    assert 'Audit of the files' in capsys.readouterr().out
