"The main job as a newcomer meets it."

import json, re, time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope='session')
def demo(tmp_path_factory):
    import subprocess, sys

    out, begin = tmp_path_factory.mktemp('demo') / 'run', time.time()
    p = subprocess.run(
        [Path(sys.executable).parent / 'smsbench', 'demo', '--out', str(out)],
        capture_output=True,
        text=True,
        timeout=1500,
    )
    assert p.returncode == 0, p.stderr
    return out, p.stdout.strip().splitlines(), time.time() - begin


def test_verdicts_are_right(demo):
    out, printed, seconds = demo
    models = json.loads((out / 'verdicts.json').read_text())['models']

    def word(m, k):
        return models[m][f'relies_on_{k}']['verdict']

    assert {m: (word(m, 'image'), word(m, 'text')) for m in models} == {
        'reference-sighted-follower': ('ignores', 'relies'),
        'reference-image-reader': ('relies', 'ignores'),
    }
    for m in models.values():
        for k in ('relies_on_image', 'relies_on_text'):
            v = m[k]
            assert {'verdict', 'value', 'ci_low', 'ci_high', 'margin', 'n'} <= set(v) and v[
                'ci_low'
            ] <= v['value'] <= v['ci_high']
        assert m['void_arms'] == []
    assert (
        printed[-1] == str(out / 'report.html') and (out / 'report.html').stat().st_size > 100_000
    )


def test_run_directory_is_complete(demo):
    out = demo[0]
    files = 'config.json environment.json plan.parquet delivery.json metrics.parquet verdicts.json'
    for name in [*files.split(), 'report.html', 'log.txt']:
        assert (out / name).exists(), name
    assert list((out / 'predictions').glob('part-*.parquet')) and list(
        (out / 'figures').glob('*.png')
    )
    delivery = json.loads((out / 'delivery.json').read_text())
    assert all(
        a['verdict'] == 'ok' and a['violations'] == 0
        for arms in delivery.values()
        for a in arms.values()
    )
    page = (out / 'report.html').read_text()
    assert not re.search(r'/(home|root|work)/', page) and 'object at 0x' not in page


def test_readme_says_what_the_demo_prints(demo):
    readme = (ROOT / 'README.md').read_text()
    for line in demo[1][:-1]:
        assert line[:160].rstrip() in readme, (
            f'README.md does not hold the line the demo prints: {line}'
        )


def test_a_finished_run_is_rendered_again_without_a_model(demo, cli):
    code, out, err = cli('report', demo[0], '--json')
    assert code == 0 and set(json.loads(out)['models']) == {
        'reference-sighted-follower',
        'reference-image-reader',
    }, err
