"""The project's own promises.

Light imports, README from the notebook, run notebooks that can be parameterized.
"""

import json, re, subprocess, sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
RUNS = sorted((ROOT / 'nbs/runs').glob('*.ipynb'))


def imported(code):
    heavy = 'torch transformers open_clip matplotlib'.split()
    p = subprocess.run(
        [
            sys.executable,
            '-c',
            f'{code}\nimport sys; print([m for m in {heavy} if m in sys.modules])',
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    return p.stdout.strip().splitlines()[-1]


def test_imports_are_light():
    assert imported('import smsbench') == '[]'
    assert imported('import smsbench.cli.commands as c; c.main(["--help"])') == '[]'
    assert (
        imported(
            'import smsbench.audit.run, smsbench.published.reanalysis, smsbench.report.figures,'
            ' smsbench.vlm.model, smsbench.cli.commands'
        )
        == '[]'
    )
    assert imported('import matplotlib') == "['matplotlib']"  # the probe can see one


@pytest.mark.parametrize('notebook', RUNS, ids=lambda p: p.stem)
def test_run_notebooks_can_be_parameterized(notebook):
    import papermill

    cells = json.loads(notebook.read_text())['cells']
    source = next(
        ''.join(c['source']) for c in cells if 'parameters' in c['metadata'].get('tags', [])
    )
    assigned = re.findall(r'^(\w+)\s*:', source, re.M)
    assert (
        assigned and list(papermill.inspect_notebook(str(notebook))) == assigned
    )  # papermill sees each of them
    assert not any(
        re.search(r'^\s*(def|class) ', ''.join(c['source']), re.M)
        for c in cells
        if c['cell_type'] == 'code'
    )


def test_notebooks_hold_no_machine_paths_and_little_output():
    for p in (ROOT / 'nbs').rglob('*.ipynb'):
        for c in json.loads(p.read_text())['cells']:
            text = json.dumps(c.get('outputs', []))
            assert not re.search(r'/(home|root|tmp|work|Users)/', text), p.name
            assert len(text) < 300_000, p.name


def test_contributing_names_what_is_there():
    "Notebooks are named by their numbers, and numbers change."
    text = (ROOT / 'CONTRIBUTING.md').read_text()
    named = re.findall(r'`(nbs/[\w/]+\.ipynb)`', text)
    assert named and [p for p in named if not (ROOT / p).exists()] == []
    folders = {p.name for p in (ROOT / 'nbs').iterdir() if p.name[:2].isdigit()}
    assert folders <= set(re.findall(r'`(\d\d_\w+)`', text))
