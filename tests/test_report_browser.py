"""A report in a real browser.

Nothing is fetched, nothing runs, every picture is there and described, and hostile data stay text.
"""

import json, os, shutil, tempfile
from pathlib import Path

import pytest

from smsbench.core import InputError
from smsbench.data.phantom import phantom_cohort
from smsbench.report.html import render, write_report
from smsbench.audit import run as sms_run, settings as sms_score
from smsbench.testing.planted import planted

FLAGS = (
    '--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking'
    ' --disable-component-update --disable-sync'.split()
)
SCRIPT, IMAGE, TEX = '<script>alert(1)</script>', '<img src=x onerror=alert(2)>', '$a_b$'
HOSTILE_MODEL = f'{IMAGE}{TEX}'


def chromium():
    "Path of the browser; without one the tests are skipped, but not where CI runs."
    path = shutil.which('chromium') or shutil.which('chromium-browser')
    if path is None:
        (pytest.fail if os.environ.get('CI') else pytest.skip)(
            'chromium is not installed: the report was not looked at in a browser'
        )
    return path


@pytest.fixture(scope='module')
def browser():
    "A fresh headless Chromium window that remembers requests, console errors and dialogs."
    path = chromium()
    from playwright.sync_api import sync_playwright

    with sync_playwright() as p, tempfile.TemporaryDirectory() as profile:
        context = p.chromium.launch_persistent_context(
            profile,
            executable_path=path,
            headless=True,
            args=FLAGS,
            viewport=dict(width=1200, height=900),
        )
        yield context
        context.close()


def opened(browser, report):
    page = browser.new_page()
    page.requests, page.errors, page.dialogs = [], [], []
    page.on('request', lambda r: page.requests.append(r.url))
    page.on(
        'console', lambda m: page.errors.append(m.text) if m.type in ('error', 'warning') else None
    )
    page.on('pageerror', lambda e: page.errors.append(str(e)))
    page.on('dialog', lambda d: (page.dialogs.append(d.message), d.dismiss()))
    page.goto(Path(report).resolve().as_uri())
    page.wait_for_timeout(500)
    return page


def holds_for_any_report(page, report):
    "What every report must show, whatever is in it."
    own = Path(report).resolve().as_uri()
    assert [u for u in page.requests if u != own and not u.startswith('data:')] == []
    assert page.errors == [] and page.dialogs == []
    images = page.evaluate('[...document.images].map(i => [i.complete, i.naturalWidth, i.alt])')
    assert len(images) >= 4 and all(
        done and width > 0 and len(alt.strip()) > 10 for done, width, alt in images
    )
    assert page.evaluate('document.documentElement.lang') == 'en' and page.title()
    assert page.evaluate('document.scripts.length') == 0
    for d in page.locator('details').all():
        d.locator('summary').first.click()
        assert d.evaluate('e => e.open') and d.locator('table').first.is_visible()
    assert page.locator('details').count() >= 4
    for width in (1200, 420):  # wide tables scroll in their own box
        page.set_viewport_size(dict(width=width, height=900))
        assert page.evaluate('document.documentElement.scrollWidth') <= width
    page.set_viewport_size(dict(width=1200, height=900))


def first_screen(page, text):
    "Is `text` visible without scrolling?"
    box = page.get_by_text(text).first.bounding_box()
    return box is not None and box['y'] + box['height'] <= 900


@pytest.fixture(scope='module')
def smoke(tmp_path_factory):
    "The run notebook with its defaults, rendered."
    out = tmp_path_factory.mktemp('smoke')
    return render('sms_audit', out, dict(out=str(out)))


def test_the_default_run_opens_with_the_planted_verdicts(browser, smoke):
    page = opened(browser, smoke)
    swap = 'another patient’s chest film with the opposite finding changes its answer by'
    assert first_screen(page, f'planted:text-only ignores the image: {swap} 0.0 points, at most by')
    assert first_screen(
        page,
        f'planted:image-only relies on the image: {swap} 100.0 points more than one with the same'
        ' finding, at least by',
    )
    assert first_screen(page, 'Less than 5 points, the margin, counts as no change that matters')
    holds_for_any_report(page, smoke)
    order = page.evaluate("[...document.querySelectorAll('h2[id]')].map(h => h.id)")
    assert (
        order
        == 'verdicts firmness delivery donors accuracy flips plane calibration subgroups examples'
        ' contrasts grounding confidence answers files funnel method provenance'.split()
    )
    assert (
        page.evaluate(
            "[...document.querySelectorAll('.contents a')].map(a =>"
            " a.getAttribute('href').slice(1))"
        )
        == order
    )
    text = page.inner_text('body')
    assert (
        'Not trained for this data' not in text
        and 'VOID' not in text
        and str(smoke.parent) not in page.content()
    )
    assert {
        'accuracy.png',
        'nfr.png',
        'modality_plane.png',
        'reliability.png',
        'subgroups.png',
        'verdicts.png',
        'regions.png',
        'donors.png',
        'example_1.png',
    } <= {p.name for p in (smoke.parent / 'figures').iterdir()}
    page.close()


def test_a_run_of_an_earlier_version_says_what_to_do(smoke, tmp_path):
    run = shutil.copytree(smoke.parent, tmp_path / 'run')
    v = dict(verdict='relies', value=0.9, ci_low=0.8, ci_high=1.0, margin=0.05, n=300)
    old = {
        m: dict(relies_on_image=v, relies_on_text=v, void_arms=[], unproven_arms=[], findings={})
        for m in ('planted:text-only', 'planted:image-only')
    }
    (run / 'verdicts.json').write_text(json.dumps(dict(models=old)))
    with pytest.raises(InputError, match='earlier version .*run the audit again with a new --out'):
        write_report(run)


def test_on_paper_everything_is_open_and_fits(browser, smoke):
    page = opened(browser, smoke)
    page.set_viewport_size(dict(width=690, height=1000))  # A4 less its margins
    page.emulate_media(media='print')
    assert page.evaluate('document.documentElement.scrollWidth') <= 690
    assert all(
        page.evaluate(
            "[...document.querySelectorAll('details table')].map(t =>"
            " t.checkVisibility({contentVisibilityAuto: true}) && t.getBoundingClientRect().height"
            " > 0)"
        )
    )
    page.close()


@pytest.fixture(scope='module')
def hostile(tmp_path_factory):
    """A run with attacks in finding, strata, reports, title and model names.

    One model lost its image.
    """
    cohort = phantom_cohort(44, findings=['effusion'], seed=3)
    about = {
        **cohort.attrs,
        'title': f'{SCRIPT} {TEX}',
        'tasks': {
            SCRIPT: cohort.attrs['tasks']['effusion'],
            IMAGE: cohort.attrs['tasks']['effusion'],
        },
    }
    cohort = cohort.assign(
        finding=[(SCRIPT, IMAGE)[i % 2] for i in range(len(cohort))],
        text=[f'{IMAGE} {TEX} {t}' for t in cohort.text],
        sex=[(TEX, SCRIPT)[i // 3 % 2] for i in range(len(cohort))],
    )
    cohort.attrs = about
    models = {
        HOSTILE_MODEL: planted('text-only'),
        'planted:loses-image': planted('loses-image'),
        SCRIPT: planted('image-only'),
    }
    for name, m in models.items():
        m.name, m.info = (
            name,
            {**m.info, 'id': name, 'trained_on': f'other {IMAGE}', 'notes': [SCRIPT]},
        )
    out = tmp_path_factory.mktemp('hostile')
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sms_run, 'check_model', lambda spec, **how: models[spec])
        for place in (sms_run, sms_score):
            patch.setattr(place, 'open_model', lambda m, **how: models[getattr(m, 'name', m)])
        sms_run.run_audit(
            out,
            cohort,
            list(models),
            settings=sms_run.AuditSettings(
                arms=(
                    'image_swap',
                    'text_swap',
                    'text_only',
                    'image_only',
                    'neither',
                    'image_only_swap',
                ),
                n_boot=100,
            ),
        )
    return write_report(out)


def test_hostile_data_stay_text(browser, hostile):
    page = opened(browser, hostile)
    holds_for_any_report(page, hostile)
    text = page.inner_text('body')
    assert all(h in text for h in (SCRIPT, IMAGE, TEX, HOSTILE_MODEL))
    assert page.evaluate("[...document.images].every(i => i.src.startsWith('data:image/png'))")
    assert (
        page.locator('blockquote').count() >= 1
        and IMAGE in page.locator('blockquote').first.inner_text()
    )
    assert all(page.locator('th, td', has_text=h).count() for h in (SCRIPT, IMAGE, TEX))
    page.close()


def test_a_void_model_gets_a_warning_and_no_verdict(browser, hostile):
    page = opened(browser, hostile)
    card = page.locator('.verdict', has=page.get_by_text('planted:loses-image', exact=True))
    assert (
        card.count() == 1
        and 'did not reach it' in card.locator('.warning').first.inner_text()
        and 'pixels must differ' in card.locator('.warning').nth(1).inner_text()
    )
    assert (
        all(
            word not in card.inner_text() for word in ('relies', 'ignores', 'unstable', 'undecided')
        )
        and card.locator('.chip.void').count() == 2
    )
    assert page.locator('.bad', has_text='VOID').count() >= 1
    assert page.get_by_text('Not trained for this data').count() == 3
    page.close()


def test_credentialed_data_stay_home(tmp_path):
    cohort = phantom_cohort(40, findings=['effusion'], seed=5)
    cohort = cohort.assign(
        text='SECRET note. ' + cohort.text,
        sample_id='SECRET' + cohort.sample_id,
        patient_id='SECRET' + cohort.patient_id,
        sex=['rare' if i < 4 else 'common' for i in range(len(cohort))],
    ).pipe(lambda d: (d.attrs.update({**cohort.attrs, 'access': 'credentialed'}), d)[1])
    sms_run.run_audit(
        tmp_path,
        cohort,
        ['planted:text-only'],
        settings=sms_run.AuditSettings(arms=('image_swap', 'text_swap'), n_boot=100),
    )
    page = write_report(tmp_path).read_text(encoding='utf-8')
    assert (
        'SECRET' not in page
        and 'no picture and no text of a patient is shown' in page
        and 'example_1' not in page
    )
    assert (
        not list((tmp_path / 'figures').glob('example*'))
        and 'sex=rare' not in page
        and 'suppressed' in page
        and '&lt;10' in page
    )
