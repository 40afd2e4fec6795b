"""The explorer in JupyterLab, in a real browser.

Controls are changed by keyboard; the picture, the shares and the answer follow within half a
second. Where widgets cannot run, pictures replace them.
"""

import json, os, secrets, shutil, signal, socket, subprocess, sys, tempfile, time, urllib.request
from contextlib import contextmanager
from pathlib import Path

import pytest

from smsbench.data.phantom import phantom_cohort
from smsbench.attention.run import AttendSettings, attend

FLAGS = (
    '--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking'
    ' --disable-component-update --disable-sync'.split()
)


@pytest.fixture(scope='module')
def home(tmp_path_factory):
    "A folder with a finished run and a notebook that opens it."
    home = tmp_path_factory.mktemp('explorer')
    attend(
        phantom_cohort(6, findings=('effusion', 'opacity'), seed=5),
        ['reference-image-reader', 'reference-blind-follower'],
        home / 'run',
        settings=AttendSettings(n_boot=100, minimum=3, methods=('raw', 'rollout', 'gradient')),
        device='cpu',
    )

    def cell(kind, source):
        return dict(
            cell_type=kind,
            id=secrets.token_hex(4),
            metadata={},
            source=source,
            **(dict(execution_count=None, outputs=[]) if kind == 'code' else {}),
        )

    nb = dict(
        cells=[
            cell('markdown', '# Explorer'),
            cell('code', "from smsbench.report.explorer import explore\nexplore('run')"),
        ],
        metadata=dict(kernelspec=dict(name='python3', display_name='python3', language='python')),
        nbformat=4,
        nbformat_minor=5,
    )
    (home / 'look.ipynb').write_text(json.dumps(nb))
    return home


def chromium():
    path = shutil.which('chromium') or shutil.which('chromium-browser')
    if path is None:
        (pytest.fail if os.environ.get('CI') else pytest.skip)(
            'chromium is not installed: the explorer was not opened in a browser'
        )
    return path


@contextmanager
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as p, tempfile.TemporaryDirectory() as profile:
        context = p.chromium.launch_persistent_context(
            profile,
            executable_path=chromium(),
            headless=True,
            args=FLAGS,
            viewport=dict(width=1500, height=1000),
        )
        page = context.new_page()
        page.errors, page.requests = [], []
        page.on('pageerror', lambda e: page.errors.append(str(e)))
        page.on('request', lambda r: page.requests.append(r.url))
        try:
            yield page
        finally:
            context.close()


@contextmanager
def jupyter(root):
    "JupyterLab on loopback with a random token, ended by its own process group."
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    token, where = secrets.token_hex(16), tempfile.mkdtemp()
    env = {
        **os.environ,
        'JUPYTER_CONFIG_DIR': where,
        'JUPYTER_DATA_DIR': f'{where}/d',
        'JUPYTERLAB_WORKSPACES_DIR': f'{where}/w',
        'OMP_NUM_THREADS': '1',
    }
    with open(f'{where}/log', 'w') as log:
        p = subprocess.Popen(
            [
                Path(sys.executable).parent / 'jupyter',
                'lab',
                '--no-browser',
                '--ServerApp.ip=127.0.0.1',
                f'--ServerApp.port={port}',
                '--ServerApp.port_retries=0',
                f'--IdentityProvider.token={token}',
                f'--ServerApp.root_dir={root}',
                '--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate',
                '--LabApp.extension_manager=readonly',
                *(['--allow-root'] if os.geteuid() == 0 else []),
            ],
            env=env,
            start_new_session=True,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    base = f'http://127.0.0.1:{port}'
    try:
        for _ in range(240):
            try:
                urllib.request.urlopen(f'{base}/api?token={token}', timeout=2)
                break
            except OSError:
                time.sleep(0.5)
            assert p.poll() is None, Path(f'{where}/log').read_text()
        yield base, token
    finally:
        os.killpg(p.pid, signal.SIGTERM)
        try:
            p.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(p.pid, signal.SIGKILL)
        shutil.rmtree(where, ignore_errors=True)


def opened(page, base, token):
    "The notebook, run; returns when the picture is there."
    page.goto(f'{base}/lab/tree/look.ipynb?token={token}')
    page.wait_for_selector('.jp-Notebook .jp-Cell', timeout=120_000)
    for _ in range(480):  # 'idle' is shown before the session exists
        kernels = [
            s.get('kernel') or {}
            for s in page.request.get(f'{base}/api/sessions?token={token}').json()
        ]
        if any(k.get('connections') and k.get('execution_state') == 'idle' for k in kernels):
            break
        page.wait_for_timeout(250)
    page.wait_for_timeout(1000)
    page.keyboard.press('Escape')
    page.get_by_role('menuitem', name='Run', exact=True).click()
    page.get_by_role('menuitem', name='Run All Cells', exact=True).click()
    page.locator('img.smsbench-picture').wait_for(state='attached', timeout=180_000)


def state(page):
    return (
        page.locator('img.smsbench-picture').last.get_attribute('src'),
        page.locator('.smsbench-text').last.inner_text(),
    )


def changed(page, before, timeout=20.0):
    "Seconds until picture and text are others; both must change."
    begin = time.perf_counter()
    while time.perf_counter() - begin < timeout:
        now = state(page)
        if now[0] != before[0] and now[1] != before[1]:
            return now, time.perf_counter() - begin
        page.wait_for_timeout(20)
    raise AssertionError('nothing was redrawn')


def clock(page):
    return (
        int(page.locator('.smsbench-clock').last.inner_text().split(' in ')[1].split(' ms')[0])
        / 1000
    )


def test_knobs_in_jupyterlab(home):
    with jupyter(home) as (base, token), browser() as page:
        opened(page, base, token)
        now, took = state(page), [clock(page)]
        assert (
            'says' in now[1]
            and 'margin of the label' in now[1]
            and 'image' in now[1]
            and now[1].count('reference-') == 2
        )
        handle = page.locator(
            '.widget-slider .noUi-handle'
        ).first  # layer: all -> last_half -> last_quarter -> 0
        handle.evaluate("e => e.scrollIntoView({block: 'center'})")
        handle.focus()
        for _ in range(3):
            page.keyboard.press('ArrowRight')
            now, seconds = changed(page, now)
            took.append(clock(page))
        handle = page.locator('.widget-slider .noUi-handle').nth(1)
        handle.focus()
        page.keyboard.press('ArrowRight')
        now, seconds = changed(page, now)
        took.append(clock(page))
        for k, option in (
            (0, 1),
            (1, 'text_swap'),
            (2, 'asked'),
            (3, 'rollout'),
        ):  # sample, arm, query, method
            (
                page.locator('.widget-dropdown select').nth(k).select_option(index=option)
                if isinstance(option, int)
                else page.locator('.widget-dropdown select').nth(k).select_option(label=option)
            )
            now, seconds = changed(page, now)
            took.append(clock(page))
        assert 'arm text_swap, query asked' in now[1]
        page.locator('.widget-dropdown select').nth(3).select_option(label='gradient')
        handle = page.locator('.widget-slider .noUi-handle').first
        handle.focus()
        page.keyboard.press('ArrowRight')
        page.keyboard.press('ArrowRight')
        page.wait_for_function(
            "() => [...document.querySelectorAll('.smsbench-text')].at(-1).innerText.split('no"
            " attention at all').length == 3"
        )  # the last layer has no gradient at this word: both models say so
        assert state(page)[0] != now[0]  # and no old map stands above it
        assert max(took) < 0.5, took
        if shot := os.environ.get('SMSBENCH_SHOT'):
            page.screenshot(path=shot)
        assert page.errors == [] and not [
            u
            for u in page.requests
            if not u.startswith((base, base.replace('http', 'ws'), 'data:', 'blob:'))
        ]


def test_pictures_stand_in_where_widgets_cannot_run(home):
    "The same notebook as a page: no script, the static views in their place."
    import nbformat
    from nbclient import NotebookClient
    from smsbench.report.html import check_page, to_html

    nb = nbformat.read(home / 'look.ipynb', as_version=4)
    NotebookClient(
        nb, timeout=180, kernel_name='python3', resources=dict(metadata=dict(path=str(home)))
    ).execute()
    page = to_html(nb)
    check_page(page, images=4)
    assert (
        'of sample' in page
        and 'layer all' in page
        and 'says' in page
        and '<summary>The same as pictures</summary>' in page
    )
