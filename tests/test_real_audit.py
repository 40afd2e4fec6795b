"The audit on films and notes that nobody here made."

import json


def test_covid_notes_through_the_whole_audit(real_data, cli, tmp_path):
    code, out, err = cli(
        'cohort',
        'covid_notes',
        '--root',
        real_data / 'covid_notes',
        '--out',
        'covid.parquet',
        '--limit',
        '110',
        '--json',
    )
    assert code == 0 and json.loads(out)['samples'] > 50, err
    code, out, err = cli('plan', 'covid.parquet', '--seed', '1', '--out', 'plan.parquet')
    assert code == 0 and 'image_swap' in out, err
    code, out, err = cli(
        'audit',
        '--plan',
        'plan.parquet',
        '--model',
        'reference-image-reader',
        '--model',
        'reference-blind-follower',
        '--out',
        'run',
        '--n-boot',
        '500',
        timeout=1500,
    )
    assert code == 0, err
    page = (tmp_path / 'run/report.html').read_text()
    assert 'Not trained for this data' in page  # said plainly
    models = json.loads((tmp_path / 'run/verdicts.json').read_text())['models']
    assert set(models) == {'reference-image-reader', 'reference-blind-follower'} and all(
        m['void_arms'] == [] for m in models.values()
    )


def test_published_results_end_to_end(real_data, cli, tmp_path):
    code, out, err = cli(
        'published',
        real_data / 'published_sms/results',
        '--dataset',
        'medeval',
        '--out',
        'published',
        timeout=1500,
    )
    assert code == 0 and out.strip().endswith('report.html'), err
    faults = json.loads((tmp_path / 'published/faults.json').read_text())
    void = {
        f['model'] for f in faults if f['code'] == 'identical_to_baseline' and f['arm'] == 'Image'
    }
    assert len(void) == 8, void  # in no published file did the image change
