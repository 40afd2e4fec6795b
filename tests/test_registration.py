"An audit that was registered keeps to what it said, and its page says when that was written."

import json, shutil
from pathlib import Path

import pytest

from smsbench.core import read_json, write_json
from smsbench.audit.registration import UNREGISTERED, read_registration, registration_note

REASON = 'ten points would change what is done for a patient'


@pytest.fixture(scope='module')
def made(tmp_path_factory):
    "A cohort of 30 made-up films and two plans of it."
    from smsbench.cli.commands import main
    from smsbench.data.phantom import phantom_cohort
    from smsbench.privacy import write_table

    folder = tmp_path_factory.mktemp('made')
    write_table(phantom_cohort(30, seed=5), folder / 'c.parquet', 'cohort')
    plan = ('plan', str(folder / 'c.parquet'), '--arms', 'image_swap,text_swap')
    assert (
        main(
            [
                *plan,
                '--out',
                str(folder / 'p.parquet'),
                '--seed',
                '2',
                '--margin',
                '.1',
                '--margin-reason',
                REASON,
            ]
        )
        == 0
    )
    assert main([*plan, '--out', str(folder / 'q.parquet'), '--seed', '3']) == 0
    return folder


@pytest.fixture
def plans(made, tmp_path):
    "A copy of them."
    return Path(shutil.copytree(made, tmp_path, dirs_exist_ok=True))


def audit(here, out, *more, plan='p.parquet'):
    return here(
        'audit',
        '--plan',
        plan,
        '--cohort',
        'c.parquet',
        '--model',
        'planted:image-only',
        '--n-boot',
        '100',
        '--out',
        out,
        *more,
    )


def refused(result, *words):
    code, _, err = result
    lines = [line for line in err.splitlines() if line.startswith('smsbench:')]
    assert code == 2 and len(lines) == 1 and all(w in lines[0] for w in words), (code, err)


def test_a_person_and_a_program_read_the_registration(plans):
    text, record = (
        (plans / 'p_registration.yaml').read_text(),
        read_registration(plans / 'p_registration.yaml'),
    )
    assert (
        record.margin == 0.1
        and record.margin_reason == REASON
        and record.seed == 2
        and record.primary == 'image'
    )
    for line in (
        'margin: 0.1',
        f'margin_reason: {REASON}',
        'primary: image   # Do the answers rely on the image?',
        'seed: 2',
        'arms:',
        'rates:',
    ):
        assert line in text
    assert len(text.splitlines()) < 50


def test_a_registered_audit_is_older_than_its_first_answer(plans, here):
    code, out, err = audit(here, 'run', '--registration', 'p_registration.yaml')
    assert code == 0 and 'registered before the first answer' in out.splitlines(), err
    note = registration_note(plans / 'run')
    assert (
        note['older']
        and note['registered']
        and REASON in note['sentence']
        and 'Margin 10 points' in note['sentence']
    )
    verdicts, config = (
        read_json(plans / 'run/verdicts.json')['models']['planted:image-only'],
        read_json(plans / 'run/config.json')['config'],
    )
    assert (
        verdicts['relies_on_image']['margin'] == 0.1
        and config['seed'] == 2
        and config['margin_reason'] == REASON
    )  # taken from the registration
    assert (plans / 'run/registration.yaml').read_text() == (
        plans / 'p_registration.yaml'
    ).read_text()
    code, out, _ = here('report', 'run', '--json')
    assert code == 0 and json.loads(out)['registration'] == note


@pytest.mark.parametrize(
    'more, words',
    [
        (('--margin', '.05'), ('margin (0.1)', '(0.05)')),
        (('--seed', '7'), ('seed (2)', '(7)')),
        (('--family', 'none'), ('family (run)', '(none)')),
        (('--primary', 'text'), ('primary (image)', '(text)')),
        (('--donors', '7'), ('number of donors', '(7)')),
        (('--margin-reason', 'chosen after the answers'), (f'margin ({REASON})', '(chosen after')),
    ],
)
def test_what_deviates_is_refused_and_leaves_nothing(plans, here, more, words):
    refused(audit(here, 'run', '--registration', 'p_registration.yaml', *more), 'another', *words)
    assert not (plans / 'run').exists()


def test_another_plan_and_another_cohort_are_refused(plans, here):
    from smsbench.privacy import read_table, write_table

    refused(
        audit(here, 'run', '--registration', 'p_registration.yaml', plan='q.parquet'),
        'another plan',
    )
    cohort = read_table(plans / 'c.parquet', 'cohort')
    write_table(cohort.iloc[:-2], plans / 'd.parquet', 'cohort')
    plan = ('plan', 'd.parquet', '--out', 'd_plan.parquet', '--arms', 'image_swap')
    code, out, _ = here(*plan)
    explained = ('effective_donors:', 'alike:', 'patients_for_ignores:')  # columns of its table
    assert code == 0 and all(w in out for w in explained)
    refused(
        here(
            'audit',
            '--plan',
            'd_plan.parquet',
            '--cohort',
            'd.parquet',
            '--model',
            'planted:constant',
            '--out',
            'run',
            '--registration',
            'p_registration.yaml',
        ),
        'another cohort',
    )
    assert not (plans / 'run').exists()


def test_an_edited_registration_is_noticed(plans, here):
    file = plans / 'p_registration.yaml'
    file.write_text(file.read_text().replace('margin: 0.1', 'margin: 0.2'))
    refused(audit(here, 'run', '--registration', file), 'was edited')
    refused(audit(here, 'run', '--registration', 'c.parquet'), 'not a registration')
    refused(audit(here, 'run', '--registration', 'none.yaml'), 'no such file')
    assert not (plans / 'run').exists()


def test_a_registration_without_its_plan_makes_the_same_plan(plans, here):
    code, _, err = here(
        'audit',
        '--cohort',
        'c.parquet',
        '--model',
        'planted:constant',
        '--n-boot',
        '100',
        '--out',
        'run',
        '--registration',
        'p_registration.yaml',
    )
    assert code == 0, err
    assert (
        read_json(plans / 'run/config.json')['config']['seed'] == 2
        and registration_note(plans / 'run')['older']
    )


def test_a_run_that_was_not_registered_says_so(plans, here):
    code, out, _ = audit(here, 'run', '--margin', '.1', '--seed', '2', '--margin-reason', REASON)
    assert code == 0 and 'not registered before' in out.splitlines()
    assert registration_note(plans / 'run') == dict(
        sentence=UNREGISTERED, short='not registered before', registered=False, older=None
    )
    write_json(
        dict(time='2001-01-01T00:00:00Z'), plans / 'run/first_answer.json'
    )  # answers that are older than the registration
    code, out, err = audit(here, 'run', '--registration', 'p_registration.yaml')
    assert code == 0 and 'registered after the first answer' in out.splitlines(), err
    note = registration_note(plans / 'run')
    assert note['older'] is False and 'did not bind this analysis' in note['sentence']


def test_a_reason_that_was_not_registered_does_not_count(plans, here):
    "Whatever wrote the run: what the page says of the margin is what was registered."
    code, _, err = audit(here, 'run', '--registration', 'p_registration.yaml')
    assert code == 0, err
    held = read_json(plans / 'run/config.json')
    for change in (dict(margin_reason='chosen after the answers'), dict(donors=7)):
        write_json(held | dict(config=held['config'] | change), plans / 'run/config.json')
        note = registration_note(plans / 'run')
        assert not note['registered'] and str(*change.values()) in note['sentence']


def test_answers_that_were_made_elsewhere_have_no_known_time(plans, here):
    assert here('trials', 'p.parquet', '--cohort', 'c.parquet', '--out', 't.jsonl')[0] == 0
    lines = [json.loads(line) for line in (plans / 't.jsonl').read_text().splitlines()]
    (plans / 'a.jsonl').write_text(
        '\n'.join(json.dumps(dict(trial_id=t['trial_id'], raw_text='Yes.')) for t in lines)
    )
    given = (
        'predictions',
        'a.jsonl',
        '--plan',
        'p.parquet',
        '--cohort',
        'c.parquet',
        '--n-boot',
        '100',
        '--registration',
        'p_registration.yaml',
    )
    refused(here(*given, '--margin', '.2', '--out', 'other'), 'another margin')
    code, out, err = here(*given, '--out', 'run', '--json')
    note = json.loads(out)['registration']
    later = ('--margin-reason', 'chosen after the answers')
    refused(here(*given, *later, '--out', 'other'), 'another reason of the margin')
    assert (
        code == 0
        and note['registered']
        and note['older'] is None
        and 'may be younger' in note['sentence']
    ), err


def test_bad_words_are_named(plans, here):
    for option, value in (
        ('--primary', 'both'),
        ('--family', 'all'),
        ('--donors', 'many'),
        ('--margin', '0'),
    ):
        refused(here('plan', 'c.parquet', '--out', 'x.parquet', option, value), option)
    code, text, _ = here('plan', '--help')
    assert code == 0 and '--margin-reason' in text and 'registration' in text.lower()
