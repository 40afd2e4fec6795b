"The CLIP verbs as a person types them, on a synthetic collection and on real films."

import json, os
from pathlib import Path

import pandas as pd, pyarrow as pa, pyarrow.parquet as pq
import pytest
from PIL import Image

from smsbench.cli.commands import main
from smsbench.testing.tiny_clip import tiny_clip
from smsbench.data.phantom import phantom_cohort
from smsbench.privacy import read_table, write_table

DATA = os.environ.get('SMSBENCH_DATA', '')
TINY = [
    '--set',
    'texts=prompts',
    '--set',
    'batch_size=24',
    '--set',
    'lr=1e-3',
    '--set',
    'batch_norm=learn',
    '--set',
    'augment=0',
    '--set',
    'stop_on=auroc',
    '--set',
    'weight_decay=0.01',
]


@pytest.fixture(scope='module')
def place(tmp_path_factory):
    "A cohort, an external one, a random model, and the model that `clip train` made of it."
    d = tmp_path_factory.mktemp('clip')
    write_table(phantom_cohort(260, findings=('effusion',), seed=1), d / 'films.parquet', 'cohort')
    other = phantom_cohort(90, findings=('effusion',), seed=9, splits=dict(test=1.0))
    other.attrs['manifest'] = 'elsewhere'
    write_table(other, d / 'other.parquet', 'cohort')
    tiny_clip(d / 'random', 'resnet')
    assert (
        main(
            [
                'clip',
                'train',
                '--cohort',
                str(d / 'films.parquet'),
                '--model',
                str(d / 'random'),
                '--out',
                str(d / 'run'),
                '--set',
                'epochs=8',
                *TINY,
            ]
        )
        == 0
    )
    return d


def numbers(folder, metric, **where):
    t = read_table(folder / 'metrics.parquet', 'metrics')
    for k, v in where.items():
        t = t[t[k] == v]
    return t[t.metric == metric].iloc[0]


def test_training_leaves_a_checkpoint_that_the_other_verbs_take(place):
    best = place / 'run' / 'best'
    assert {p.name for p in best.iterdir()} >= {
        'open_clip_config.json',
        'thresholds.json',
        'prompts.json',
        'train_films.json',
        'smsbench.json',
    }
    history = pd.read_csv(place / 'run' / 'history.csv')
    assert (
        history.epoch.tolist() == list(range(9)) and history.val_auroc.max() > history.val_auroc[0]
    )


def test_started_again_it_is_done_and_other_settings_are_refused(place, capsys):
    words = [
        'clip',
        'train',
        '--cohort',
        str(place / 'films.parquet'),
        '--model',
        str(place / 'random'),
        '--out',
        str(place / 'run'),
    ]
    before = (place / 'run' / 'history.csv').read_bytes()
    assert (
        main([*words, '--set', 'epochs=8', *TINY]) == 0
        and (place / 'run' / 'history.csv').read_bytes() == before
    )
    assert main([*words, '--set', 'epochs=9', *TINY]) == 2 and 'epochs' in capsys.readouterr().err
    assert (
        main([*words, '--set', 'speed=9']) == 2 and 'no training setting' in capsys.readouterr().err
    )
    assert main([*words[:-1], str(place / 'slow'), *TINY, '--set', 'lr=1e-8']) == 2
    said = capsys.readouterr().err
    assert 'learning rate' in said and said.count('\n') == 1


def test_trained_on_films_it_beats_chance_elsewhere_and_seen_films_are_refused(place, capsys):
    out = place / 'external'
    assert (
        main(
            [
                'clip',
                'evaluate',
                '--cohort',
                str(place / 'other.parquet'),
                '--model',
                str(place / 'run' / 'best'),
                '--out',
                str(out),
                '--n-boot',
                '300',
                '--against',
                str(place / 'random'),
                '--json',
            ]
        )
        == 0
    )
    told = json.loads(capsys.readouterr().out)
    assert any('effusion' == r['subgroup'].removeprefix('class=') for r in told['metrics'])
    auroc = numbers(out, 'macro_auroc', arm='zero_shot')
    assert auroc.ci_low > 0.6  # well above the 0.5 of chance
    assert (
        read_table(out / 'comparison.parquet', 'metrics').metric.eq('macro_auroc_difference').any()
    )
    assert {'classes.csv', 'classes.tex', 'comparison.csv'} <= {
        p.name for p in (out / 'tables').iterdir()
    } and Image.open(out / 'figures' / 'curves.png').size[0] > 200
    films = read_table(place / 'films.parquet', 'cohort')
    attrs, films = films.attrs, films[films.split == 'train'].reset_index(drop=True)
    films.attrs = attrs
    write_table(films, place / 'seen.parquet', 'cohort')
    assert (
        main(
            [
                'clip',
                'evaluate',
                '--cohort',
                str(place / 'seen.parquet'),
                '--model',
                str(place / 'run' / 'best'),
                '--out',
                str(place / 'no'),
            ]
        )
        == 2
    )
    assert 'seen in training' in capsys.readouterr().err


def test_grad_cam_of_the_trained_model_beats_the_middle_of_the_film(place, capsys):
    out = place / 'where'
    assert (
        main(
            [
                'clip',
                'explain',
                '--cohort',
                str(place / 'other.parquet'),
                '--model',
                str(place / 'run' / 'best'),
                '--out',
                str(out),
                '--n-boot',
                '300',
            ]
        )
        == 0
    )
    for number in (
        'auroc_over_centre',
        'mass_over_centre',
        'auroc_over_shuffled',
        'auroc_over_uniform',
    ):
        assert numbers(out, number, subgroup='all').ci_low > 0, number
    assert (
        Image.open(out / 'figures' / 'panels.png').size[0] > 400
        and 'auroc_over_centre' in capsys.readouterr().out
    )


def test_marks_that_name_findings_otherwise_are_translated(place, tmp_path, capsys):
    other = read_table(place / 'other.parquet', 'cohort')
    rows = [
        dict(
            dicom_id=r.sample_id.removesuffix('-effusion'),
            category_name='Pleural Effusion',
            label_text='=SUM(1)',
            x=b[0],
            y=b[1],
            w=b[2] - b[0],
            h=b[3] - b[1],
            image_width=64,
            image_height=64,
        )
        for r in other.itertuples()
        if r.label == 'yes'
        for b in json.loads(r.boxes)
    ]
    pd.DataFrame([*rows, dict(rows[0], dicom_id='=cmd()')]).to_csv(tmp_path / 'm.csv', index=False)
    words = [
        'clip',
        'explain',
        '--cohort',
        str(place / 'other.parquet'),
        '--model',
        str(place / 'run' / 'best'),
        '--marks',
        str(tmp_path / 'm.csv'),
        '--limit',
        '12',
        '--n-boot',
        '50',
        '--out',
        str(tmp_path / 'where'),
    ]
    assert main(words) == 2 and 'Pleural Effusion' in capsys.readouterr().err
    assert main([*words, '--names', 'pleural_effusion=effusion']) == 0
    said = capsys.readouterr().out
    assert (
        'deletion_gain_over_random' in said
        and 'finding=effusion' in said
        and '12 marked films' in said
        and 'weights of the image tower shuffled' in said
    )
    left = pd.read_csv(tmp_path / 'where' / 'tables' / 'left_out.csv')
    assert (
        left.film.tolist() == ["'=cmd()"]
        and left.row.tolist() == [len(rows) + 1]
        and (tmp_path / 'where' / 'figures' / 'localisation_0_effusion.png').exists()
        and not (tmp_path / 'where' / 'figures' / 'agreement.png').exists()
    )
    assert (
        main([*words, '--names', 'pleural_effusion=effusion,x=effusion']) == 2
        and 'another names' in capsys.readouterr().err
    )


def test_two_readers_are_compared_with_each_other(place, tmp_path, capsys):
    other = read_table(place / 'other.parquet', 'cohort')
    rows = [
        dict(
            film=r.sample_id.removesuffix('-effusion'),
            finding='effusion',
            reader=who,
            x0=b[0] + d,
            y0=b[1],
            x1=b[2],
            y1=b[3],
        )
        for r in other.itertuples()
        if r.label == 'yes'
        for b in json.loads(r.boxes)
        for who, d in (('A', 0), ('B', 2))
    ]
    pd.DataFrame(rows).to_csv(tmp_path / 'm.csv', index=False)
    assert (
        main(
            [
                'clip',
                'explain',
                '--cohort',
                str(place / 'other.parquet'),
                '--model',
                str(place / 'run' / 'best'),
                '--marks',
                str(tmp_path / 'm.csv'),
                '--limit',
                '10',
                '--n-boot',
                '50',
                '--out',
                str(tmp_path / 'where'),
            ]
        )
        == 0
    )
    said = capsys.readouterr().out
    assert (
        'reader_iou' in said
        and 'iou_under_readers' in said
        and (tmp_path / 'where' / 'figures' / 'agreement.png').exists()
    )


def test_a_study_whose_maps_are_all_empty_has_its_report(tmp_path, capsys):
    words = [
        'run',
        'clip_benchmark',
        '-p',
        'epochs',
        '0',
        '-p',
        'n_films',
        '120',
        '-p',
        'n_boot',
        '50',
        '--out',
        str(tmp_path / 'a'),
    ]
    assert main(words) == 0
    page = (tmp_path / 'a' / 'report.html').read_text()
    assert 'Nothing to show: none of' in page and 'empty map' in page and 'guessing' in page
    assert (
        main([*words, '-p', 'n_explained', '3']) == 2
        and 'another n_explained' in capsys.readouterr().err
        and (tmp_path / 'a' / 'report.html').read_text() == page
    )
    assert (
        main([*words[:-1], str(tmp_path / 'b'), '-p', 'method', 'rollout']) == 2
        and 'convolutional' in capsys.readouterr().err
        and not (tmp_path / 'b' / 'study').exists()
    )


def test_a_credentialed_study_shows_no_film_and_no_curve_of_few_patients(tmp_path):
    films = phantom_cohort(120, findings=('effusion',), seed=4)
    about = json.dumps({**films.attrs, 'access': 'credentialed'}).encode()
    table = pa.Table.from_pandas(films.drop(columns='access'))
    table = table.replace_schema_metadata({b'smsbench': about})
    pq.write_table(table, tmp_path / 'c.parquet')  # as somebody else may have made it
    tiny_clip(tmp_path / 'native', 'native')
    assert (
        main(
            [
                'run',
                'clip_benchmark',
                '-p',
                'cohort',
                str(tmp_path / 'c.parquet'),
                '-p',
                'model',
                str(tmp_path / 'native'),
                '-p',
                'method',
                'chefer',
                '-p',
                'epochs',
                '0',
                '-p',
                'n_explained',
                '6',
                '-p',
                'n_boot',
                '50',
                '--out',
                str(tmp_path / 'run'),
            ]
        )
        == 0
    )
    page = (tmp_path / 'run' / 'report.html').read_text()
    assert not {'faithfulness.png', 'space_0.png', 'panels.png', 'iou.png'} & {
        p.name for p in (tmp_path / 'run' / 'figures').iterdir()
    }
    assert (
        '&lt;10 marked films' in page
        and 'Chefer relevance' in page
        and 'withheld, fewer than ten' in page
    )


def test_class_folders_are_refused_before_training(tmp_path, capsys):
    write_table(phantom_cohort(60, findings=('effusion',)), tmp_path / 'c.parquet', 'cohort')
    for given, words in (
        (
            ['-p', 'steps', 'smoking', '-p', 'n_patients', '60'],
            ("no column 'smoking'", "-p steps ''"),
        ),
        (['-p', 'cohort', str(tmp_path / 'c.parquet')], ('no split named external',)),
    ):
        assert main(['run', 'ssa_orbital', *given, '--out', str(tmp_path / 'run')]) == 2
        said = capsys.readouterr().err
        assert all(w in said for w in words) and not any((tmp_path / 'run').iterdir()), said


def test_class_folders_without_facts_have_a_report_and_keep_their_directory(tmp_path, capsys):
    words = [
        'run',
        'ssa_orbital',
        '-p',
        'n_patients',
        '60',
        '-p',
        'epochs',
        '1',
        '-p',
        'n_boot',
        '50',
        '-p',
        'steps',
        '',
        '--out',
        str(tmp_path / 'run'),
    ]
    assert (
        main(words) == 0
        and 'no columns were named' in (tmp_path / 'run' / 'report.html').read_text()
    )
    before = {p: p.read_bytes() for p in (tmp_path / 'run').rglob('*') if p.is_file()}
    assert main([*words, '-p', 'n_patients', '75']) == 2 and 'another' in capsys.readouterr().err
    assert before == {p: p.read_bytes() for p in (tmp_path / 'run').rglob('*') if p.is_file()}


def test_each_further_fact_is_measured(place, capsys):
    out = place / 'ssa'
    assert (
        main(
            [
                'clip',
                'ssa',
                '--cohort',
                str(place / 'films.parquet'),
                '--model',
                str(place / 'run' / 'best'),
                '--steps',
                'age,sex',
                '--out',
                str(out),
                '--n-boot',
                '200',
            ]
        )
        == 0
    )
    t = read_table(out / 'metrics.parquet', 'metrics')
    assert {'sensitivity', 'sensitivity_change', 'specificity_effect'} <= set(t.metric) and (
        out / 'figures' / 'steps.png'
    ).exists()
    each = pd.read_csv(out / 'tables' / 'scores.csv', keep_default_na=False)
    assert list(each) == ['image', 'class', 'given', 'score', 'decision', 'label']
    assert {'', 'age', 'age, sex'} <= set(each.given) and 'age, sex' in (
        out / 'report.html'
    ).read_text()
    assert (
        main(
            [
                'clip',
                'ssa',
                '--cohort',
                str(place / 'films.parquet'),
                '--vlm',
                'planted:image-only',
                '--steps',
                'view',
                '--out',
                str(place / 'vlm'),
                '--n-boot',
                '200',
            ]
        )
        == 0
    )
    assert (
        main(
            [
                'clip',
                'ssa',
                '--cohort',
                str(place / 'films.parquet'),
                '--model',
                str(place / 'run' / 'best'),
                '--steps',
                'smoking',
                '--out',
                str(place / 'mistyped'),
            ]
        )
        == 2
    )
    assert (
        "no column 'smoking'" in capsys.readouterr().err
        and not (place / 'mistyped' / 'config.json').exists()
    )  # the corrected command may use the same folder


@pytest.mark.skipif(
    not DATA or not Path(DATA).is_dir(),
    reason='SMSBENCH_DATA does not name the folder of real data (absolute path)',
)
def test_real_films_with_fourteen_labels_and_boxes(tmp_path, capsys):
    "A model trained for a moment on real films: the numbers are what they are."
    assert (
        main(
            [
                'cohort',
                'nih_cxr14',
                '--root',
                str(Path(DATA, 'nih_cxr')),
                '--out',
                str(tmp_path / 'nih.parquet'),
                '--limit',
                '260',
            ]
        )
        == 0
    )
    tiny_clip(tmp_path / 'random', 'native')
    assert (
        main(
            [
                'clip',
                'train',
                '--cohort',
                str(tmp_path / 'nih.parquet'),
                '--model',
                str(tmp_path / 'random'),
                '--out',
                str(tmp_path / 'run'),
                '--set',
                'epochs=1',
                *TINY,
            ]
        )
        == 0
    )
    best = str(tmp_path / 'run' / 'best')
    assert (
        main(
            [
                'clip',
                'evaluate',
                '--cohort',
                str(tmp_path / 'nih.parquet'),
                '--model',
                best,
                '--out',
                str(tmp_path / 'eval'),
                '--test',
                'test',
                '--n-boot',
                '100',
            ]
        )
        == 0
    )
    auroc = numbers(tmp_path / 'eval', 'macro_auroc', arm='zero_shot')
    assert 0 < auroc.ci_low <= auroc.value <= auroc.ci_high <= 1
    assert (
        main(
            [
                'clip',
                'explain',
                '--cohort',
                str(tmp_path / 'nih.parquet'),
                '--model',
                best,
                '--out',
                str(tmp_path / 'where'),
                '--findings',
                'pneumonia',
                '--test',
                'train,val,test',
                '--limit',
                '12',
                '--method',
                'rollout',
                '--n-boot',
                '100',
            ]
        )
        == 0
    )
    assert (
        'some of these films' in capsys.readouterr().out
        and numbers(tmp_path / 'where', 'mass', arm='centre', subgroup='all').n > 0
    )


@pytest.mark.skipif(
    not DATA or not Path(DATA).is_dir(),
    reason='SMSBENCH_DATA does not name the folder of real data (absolute path)',
)
def test_real_pictures_by_organ(tmp_path, capsys):
    assert (
        main(
            [
                'cohort',
                'vqa_rad_organs',
                '--root',
                str(Path(DATA, 'vqa_rad')),
                '--out',
                str(tmp_path / 'o.parquet'),
            ]
        )
        == 0
    )
    assert (
        main(
            [
                'split',
                str(tmp_path / 'o.parquet'),
                '--sizes',
                'train=0.6,val=0.2,test=0.2',
                '--by',
                'label',
                '--out',
                str(tmp_path / 's.csv'),
            ]
        )
        == 0
    )
    tiny_clip(tmp_path / 'random', 'resnet')
    data = ['--cohort', str(tmp_path / 'o.parquet'), '--splits', str(tmp_path / 's.csv')]
    assert (
        main(
            [
                'clip',
                'train',
                *data,
                '--model',
                str(tmp_path / 'random'),
                '--out',
                str(tmp_path / 'run'),
                '--set',
                'epochs=8',
                *TINY,
            ]
        )
        == 0
    )
    assert (
        main(
            [
                'clip',
                'evaluate',
                *data,
                '--model',
                str(tmp_path / 'run' / 'best'),
                '--test',
                'test',
                '--out',
                str(tmp_path / 'eval'),
                '--n-boot',
                '200',
            ]
        )
        == 0
    )
    assert numbers(tmp_path / 'eval', 'accuracy', subgroup='all').ci_low > 1 / 3  # three organs
