"""Run every notebook from top to bottom; a notebook that hangs is ended and named.

python -m pytest -n 2 --dist worksteal tests/notebooks.py
"""

import pytest
from nbdev.config import get_config
from nbdev.doclinks import nbglob
from nbdev.test import test_nb as run_notebook
from smsbench.privacy import open_messages

CONFIG = get_config()
NOTEBOOKS = sorted(p.absolute() for p in nbglob(as_path=True))


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: str(p.relative_to(CONFIG.nbs_path)))
def test_notebook(path):
    open_messages()  # the notebook before may have read credentialed data
    passed, _ = run_notebook(path, skip_flags=CONFIG.tst_flags.split(), basepath=CONFIG.config_path)
    assert passed, f'{path.name}: see the error above'
