"A model that smsbench cannot load answers the same plan: trials out, a foreign script, answers in."

import ast, json, subprocess, sys
from pathlib import Path

import pandas as pd

RUNNER = Path(__file__).resolve().parent.parent / 'colab' / 'foreign_runner.py'


def test_foreign_runner_end_to_end(cli, tmp_path):
    from smsbench.data.phantom import phantom_cohort
    from smsbench.privacy import write_table

    write_table(phantom_cohort(200, size=64, seed=3), tmp_path / 'c.parquet', 'cohort')
    code, out, err = cli(
        'plan',
        'c.parquet',
        '--arms',
        'image_swap,text_swap,image_only,text_only',
        '--seed',
        '1',
        '--out',
        'p.parquet',
    )
    assert code == 0, err
    assert cli('trials', 'p.parquet', '--cohort', 'c.parquet', '--out', 't.jsonl')[0] == 0
    done = subprocess.run(
        [sys.executable, '-I', RUNNER, 't.jsonl', 'a.jsonl'],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    answers = [json.loads(l) for l in (tmp_path / 'a.jsonl').read_text().splitlines()]
    assert {a['trial_id'] for a in answers} == set(
        pd.read_parquet(tmp_path / 'p.parquet').trial_id
    ) and {a['raw_text'] for a in answers} == {'yes', 'no'}
    code, out, err = cli(
        'predictions',
        'a.jsonl',
        '--plan',
        'p.parquet',
        '--name',
        'foreign',
        '--out',
        'run',
        '--n-boot',
        '200',
        '--json',
    )
    assert code == 0, err
    verdict = json.loads((tmp_path / 'run' / 'verdicts.json').read_text())['models']['foreign']
    assert (
        not verdict['void_arms'] and not json.loads(out)['models']['foreign']['unproven_arms']
    )  # its hashes prove that every change was delivered
    # its answers have nothing to do with the question, so there is no verdict
    assert verdict['answers']['state'] == 'does not answer' == verdict['relies_on_text']['state']
    statements = [n for n in ast.walk(ast.parse(RUNNER.read_text())) if isinstance(n, ast.stmt)]
    assert sum(not isinstance(n, ast.Import | ast.ImportFrom) for n in statements) <= 12
    assert (tmp_path / 'run' / 'report.html').is_file()


def test_report_states_the_errors_of_the_reader(cli, tmp_path):
    "A report on answers in words says how many were lost, on which side, and how often it errs."
    from smsbench.data.phantom import phantom_cohort
    from smsbench.privacy import write_table

    write_table(phantom_cohort(60, size=64, seed=3), tmp_path / 'c.parquet', 'cohort')
    asked = ['plan', 'c.parquet', '--arms', 'image_swap', '--out', 'p.parquet']
    assert cli(*asked)[0] == 0
    ids = pd.read_parquet(tmp_path / 'p.parquet').trial_id
    said = ['Yes.', 'No.', 'Yes', 'No such thing is certain']
    lines = [json.dumps(dict(trial_id=t, raw_text=said[i % 4])) for i, t in enumerate(ids)]
    (tmp_path / 'a.jsonl').write_text('\n'.join(lines))
    given = ['predictions', 'a.jsonl', '--plan', 'p.parquet', '--out', 'run', '--n-boot', '100']
    code, out, err = cli(*given)
    assert code == 0, err
    page = (tmp_path / 'run' / 'report.html').read_text()
    assert 'unread, looks like no' in page and 'opposite choice' in page
    assert '95 % interval' in page
