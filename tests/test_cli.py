"""Every kind of bad input gets one line and exit code 2.

A model that does not see the image gets exit code 1.
"""

import json

import numpy as np, pandas as pd, pytest
from PIL import Image

CARD = """
name: mine
title: My films
version: '1'
licence: CC0-1.0
access: open
table: table.csv
columns: {sample_id: id, patient_id: patient, image: image, text: text}
tasks:
  effusion:
    question: Is there pleural effusion?
    choices: ['yes', 'no']
    noun: chest film
    text_noun: report
    label: {column: label, map: {'1': 'yes', '0': 'no'}}
"""


@pytest.fixture
def dataset(tmp_path):
    "A small data set of one's own: 60 films of 30 patients."
    from smsbench.data.phantom import phantom_cohort, read_phantom

    c, rows = phantom_cohort(60, size=64, seed=5), []
    for i, r in enumerate(c.itertuples()):
        Image.fromarray(read_phantom(r.image)).save(tmp_path / f'{i}.png')
        rows.append(
            dict(
                id=f'{i:03d}',
                patient=r.patient_id,
                image=f'{i}.png',
                text=r.text,
                label=int(r.label == 'yes'),
            )
        )
    pd.DataFrame(rows).to_csv(tmp_path / 'table.csv', index=False)
    (tmp_path / 'card.yaml').write_text(CARD)
    return tmp_path


def refused(result, *words, code=2):
    got, out, err = result
    lines = [l for l in err.splitlines() if l.startswith('smsbench:')]
    assert got == code and len(lines) == 1 and err.strip().splitlines()[-1] == lines[0], (
        got,
        out,
        err,
    )
    assert all(w in lines[0] for w in words), lines[0]
    assert 'Traceback' not in err
    return lines[0]


def test_own_data_from_card_to_report(dataset, cli):
    code, out, err = cli('cohort', 'card.yaml', '--root', '.', '--out', 'c.parquet')
    assert code == 0 and '60 samples' in out, err
    code, out, err = cli(
        'plan',
        'c.parquet',
        '--arms',
        'image_swap,text_swap,image_only_swap,neither',
        '--seed',
        '2',
        '--out',
        'p.parquet',
    )
    assert code == 0 and 'image_swap_same' in out, err
    code, out, err = cli(
        'audit',
        '--plan',
        'p.parquet',
        '--model',
        'planted:image-only',
        '--model',
        'planted:text-only',
        '--out',
        'run',
        '--n-boot',
        '200',
    )
    assert (
        code == 0
        and 'planted:image-only: image relies' in out
        and out.strip().endswith('report.html')
    ), err
    code, out, err = cli('trials', 'p.parquet', '--out', 't.jsonl')
    lines = [json.loads(l) for l in (dataset / 't.jsonl').read_text().splitlines()]
    assert code == 0 and len(lines) == len(pd.read_parquet(dataset / 'p.parquet')), err
    (dataset / 'a.jsonl').write_text(
        '\n'.join(json.dumps(dict(trial_id=l['trial_id'], raw_text='Yes.')) for l in lines)
    )
    code, out, err = cli(
        'predictions',
        'a.jsonl',
        '--plan',
        'p.parquet',
        '--name',
        'always yes',
        '--out',
        'run2',
        '--n-boot',
        '200',
        '--json',
    )
    assert code == 0 and json.loads(out)['models']['always yes']['unproven_arms'], err


def test_broken_rows_are_listed_and_the_rest_goes_on(dataset, cli):
    t = pd.read_csv(dataset / 'table.csv', dtype=str)
    t.loc[0, 'image'] = 'missing.png'
    t.loc[1, 'label'] = np.nan
    t.loc[2, 'label'] = 'maybe'
    t.loc[3, 'id'] = t.id[4]
    t.loc[5, 'text'] = ' '
    t.loc[6, 'image'] = '../outside.png'
    (dataset / '7.png').write_bytes((dataset / '7.png').read_bytes()[:200])
    t.to_csv(dataset / 'table.csv', index=False)
    code, out, err = cli('cohort', 'card.yaml', '--root', '.', '--out', 'c.parquet', '--json')
    assert code == 0, err
    reasons = set(pd.read_parquet(dataset / 'c_exclusions.parquet').reason)
    assert len(reasons) >= 6 and json.loads(out)['samples'] >= 51, reasons
    for word in ('missing', 'label', 'duplicate', 'text', 'outside', 'truncated'):
        assert any(word in r for r in reasons), (word, reasons)


def test_too_many_exclusions_fail(dataset, cli):
    for p in list(dataset.glob('*.png'))[:40]:
        p.unlink()
    refused(cli('cohort', 'card.yaml', '--root', '.', '--out', 'c.parquet'), 'excluded')


def test_bad_cards(dataset, cli):
    for change, words in [
        (('image: image', 'image: picture'), ['picture']),
        (('access: open', 'acess: open'), ['acess']),
        (('access: open', 'access: [open'), []),
        (('table.csv', 'none.csv'), ['none.csv']),
        (('table: table.csv', 'table: ../table.csv'), ['table']),
    ]:
        (dataset / 'card.yaml').write_text(CARD.replace(*change))
        refused(cli('cohort', 'card.yaml', '--root', '.', '--out', 'c.parquet'), *words)


def test_bad_arguments(dataset, cli):
    refused(cli('cohort', 'nothing', '--root', '.', '--out', 'c.parquet'), 'nothing')
    assert cli('cohort', 'card.yaml', '--root', '.', '--out', 'c.parquet')[0] == 0
    refused(cli('plan', 'c.parquet', '--arms', 'image_swop', '--out', 'p.parquet'), 'image_swop')
    refused(cli('plan', 'c.parquet', '--match', 'shoe_size', '--out', 'p.parquet'), 'shoe_size')
    refused(cli('plan', 'card.yaml', '--out', 'p.parquet'), 'parquet')
    refused(
        cli('audit', '--cohort', 'c.parquet', '--model', 'planted:nobody', '--out', 'r'), 'nobody'
    )
    refused(
        cli('audit', '--cohort', 'c.parquet', '--model', 'no/such/folder/model', '--out', 'r1'),
        'no/such/folder/model',
    )
    refused(
        cli('audit', '--cohort', 'c.parquet', '--model', 'planted:constant', '--out', 'card.yaml'),
        'directory',
    )
    refused(
        cli(
            'audit',
            '--cohort',
            'c.parquet',
            '--model',
            'planted:constant',
            '--margin',
            '2',
            '--out',
            'r2',
        ),
        'margin',
    )
    refused(cli('report', '.'), 'not a finished run')
    refused(
        cli('run', 'sms_audit', '-p', 'n_pateints', '5', '--out', 'r3'), 'n_pateints', 'n_patients'
    )
    refused(cli('published', '.', '--out', 'r4'))
    refused(cli('audit', '--nonsense'), '--nonsense')


def test_another_plan_does_not_mix_in(dataset, cli):
    assert cli('cohort', 'card.yaml', '--root', '.', '--out', 'c.parquet')[0] == 0

    def go(seed):
        return cli(
            'audit',
            '--cohort',
            'c.parquet',
            '--model',
            'planted:constant',
            '--arms',
            'image_swap',
            '--seed',
            seed,
            '--out',
            'run',
            '--n-boot',
            '100',
        )

    assert go(1)[0] == 0
    refused(go(2), 'seed')


def test_a_model_that_never_gets_the_image_is_void(dataset, cli):
    assert cli('cohort', 'card.yaml', '--root', '.', '--out', 'c.parquet')[0] == 0
    line = refused(
        cli(
            'audit',
            '--cohort',
            'c.parquet',
            '--model',
            'planted:loses-image',
            '--arms',
            'image_swap,text_swap',
            '--out',
            'run',
            '--n-boot',
            '100',
        ),
        'void',
        'image_swap',
        code=1,
    )
    v = json.loads((dataset / 'run/verdicts.json').read_text())['models']['planted:loses-image']
    assert (
        'image_swap' in v['void_arms']
        and v['relies_on_image']['verdict'] is None
        and 'no verdict' in line
    )
    assert (dataset / 'run/report.html').exists()  # what was found is shown all the same


def test_a_pickle_checkpoint_is_refused(dataset, cli):
    folder = dataset / 'pickled'
    folder.mkdir()
    (folder / 'config.json').write_text(
        json.dumps(dict(model_type='llava', architectures=['LlavaForConditionalGeneration']))
    )
    (folder / 'pytorch_model.bin').write_bytes(b'\x80\x04evil')
    assert cli('cohort', 'card.yaml', '--root', '.', '--out', 'c.parquet')[0] == 0
    refused(cli('audit', '--cohort', 'c.parquet', '--model', folder, '--out', 'run'), 'safetensors')


def test_credentialed_data_stay_home(dataset, cli):
    "Secrets planted in text, ids and file names appear in no report, log or printed line."
    t = pd.read_csv(dataset / 'table.csv', dtype=str)
    t['text'] = 'SECRETTEXT ' + t.text
    t['patient'] = 'SECRETPATIENT' + t.patient
    t['id'] = 'SECRETSAMPLE' + t.id
    t.to_csv(dataset / 'table.csv', index=False)
    (dataset / 'card.yaml').write_text(CARD.replace('access: open', 'access: credentialed'))
    shown = [cli('cohort', 'card.yaml', '--root', '.', '--out', 'c.parquet')]
    shown.append(
        cli(
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
    )
    assert [s[0] for s in shown] == [0, 0], shown
    refused(
        cli('trials', 'run/plan.parquet', '--cohort', 'c.parquet', '--out', 't.jsonl'),
        'credentialed',
        '--allow-credentialed mine',
    )
    assert not (dataset / 't.jsonl').exists()
    texts = [s for r in shown for s in r[1:]] + [
        (dataset / 'run' / f).read_text()
        for f in (
            'report.html',
            'log.txt',
            'config.json',
            'verdicts.json',
            'delivery.json',
            'environment.json',
        )
    ]
    assert not any('SECRET' in s for s in texts)
