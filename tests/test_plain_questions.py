"""Images and questions without reports: known truth, real questions, real loading code."""

import json
from pathlib import Path

import pytest

from smsbench.audit.arms import ARMS
from smsbench.audit.plan import attainable_lines, make_plan, question_keys
from smsbench.audit.prompts import opposite
from smsbench.audit.run import AuditSettings, load_results, run_audit, run_import
from smsbench.audit.runner import Source
from smsbench.core import content_hash
from smsbench.data.cohort import build_cohort, read_manifest
from smsbench.data.phantom import QUESTIONS, phantom_cohort
from smsbench.privacy import write_table
from smsbench.report.html import write_report
from smsbench.testing.plain_questions import plain_questions, save_yes_no_folders
from smsbench.testing.planted import planted

READER, PRIOR, BLIND = 'planted:image-only', 'planted:question-only', 'planted:loses-image'
SHARES = dict(effusion=1.0, cardiomegaly=0.5, nodule=0.2)  # questions are asked unequally often
MEANINGLESS = {a.name for a in ARMS.values() if a.needs_text}


def unequal_questions(n=900):
    "Most answers to each question are those of the question prior, so it is right three in four."
    says_yes = planted(PRIOR).says_yes
    rates = {f: 0.75 if says_yes(QUESTIONS[f]) else 0.25 for f in SHARES}
    return plain_questions(n, {f: (s, rates[f]) for f, s in SHARES.items()})


def keeping(cohort, **columns):
    "The cohort with other columns, and its metadata."
    out = cohort.assign(**columns)
    out.attrs = dict(cohort.attrs)
    return out


@pytest.fixture(scope='module')
def audited(tmp_path_factory):
    "A run with a reader of images, a question prior, and a model that loses its images."
    out = tmp_path_factory.mktemp('plain') / 'run'
    arms = ('image_swap', 'image_any', 'neither', 'blank_image')
    run_audit(out, unequal_questions(), [READER, PRIOR, BLIND], settings=AuditSettings(arms=arms))
    return out


def test_verdicts_are_the_planted_ones(audited):
    models = load_results(audited).verdicts
    assert models[READER]['relies_on_image']['verdict'] == 'relies'
    assert models[PRIOR]['relies_on_image']['verdict'] == 'ignores'
    assert models[BLIND]['relies_on_image']['verdict'] is None and models[BLIND]['void_arms']
    for m in models.values():
        assert (m['relies_on_text']['verdict'], m['relies_on_text']['state']) == (None, 'not asked')
    moved = {m: models[m].get('any_image', {}).get('moved') for m in models}
    assert 0.3 < moved[READER] < 0.7 and moved[PRIOR] == 0 and moved[BLIND] is None
    sizes = json.loads((audited / 'verdicts.json').read_text())['family']['sizes']
    assert sizes['all'] == 3  # one verdict a model: the text is no member of the family


def test_what_has_no_meaning_is_not_measured(audited):
    results = load_results(audited)
    plan, metrics = results.plan, results.metrics
    assert not MEANINGLESS & set(plan.arm) and set(plan.text_id) == {''}
    assert not metrics.metric.str.contains('phi_|text_following|silencing|interaction').any()
    of_any = set(metrics.metric[metrics.arm == 'image_any'])
    assert 'flips' in of_any and not of_any & {'nfr', 'accuracy', 'accuracy_change', 'auroc', 'ece'}
    right = metrics[(metrics.metric == 'accuracy') & (metrics.subgroup == 'all')]
    right = right.set_index(['model', 'arm']).value
    assert right[READER, 'original'] == 1 and right[READER, 'image_swap'] == 0
    assert right[PRIOR, 'original'] == right[PRIOR, 'image_swap'] == right[PRIOR, 'neither']
    assert 0.7 < right[PRIOR, 'original'] < 0.8  # good without looking, and found out


def test_the_report_says_what_can_be_said(audited):
    page = write_report(audited).read_text()
    assert 'relies on the image: another patient’s image with the opposite answer' in page
    assert 'there is no text in this cohort' in page and 'text: not asked' in page
    assert 'What that image would answer is not known' in page
    for absent in ('modality plane', 'text: undecided', 'report was swapped', 'text_swap'):
        assert absent not in page.split('id="method"')[0], absent


def test_every_prompt_is_image_and_question():
    cohort = plain_questions(60)
    plan, _ = make_plan(cohort, paraphrases=4)
    source, question = Source(cohort), dict(zip(cohort.sample_id, cohort.question))
    for t in plan.groupby(['arm', 'variant'], as_index=False).first().itertuples():
        x = source.inputs(t)
        shown = t.arm != 'neither'
        assert (x.image is not None) == shown == x.prompt.startswith('Here is an image.\n')
        assert (question[t.sample_id] in x.prompt) == (t.variant == 'plain')
        assert 'eport' not in x.prompt
    negated, own = plan[plan.inverted], plan[plan.variant == 'plain']
    label = own[own.arm == 'original'].set_index('sample_id').label
    assert len(negated) and (negated.label == negated.sample_id.map(label).map(opposite)).all()
    assert 'image_any' not in set(negated.arm)  # nobody knows what it would answer


@pytest.mark.parametrize('seed', range(3))
def test_swaps_answer_the_same_question(seed):
    cohort = unequal_questions(120)
    plan, _ = make_plan(cohort, seed=seed, donors=2)
    rows = cohort.set_index('sample_id')
    for arm, other in (('image_swap', True), ('image_swap_same', False)):
        for t in plan[plan.arm == arm].itertuples():
            a, b = rows.loc[t.sample_id], rows.loc[t.image_id]
            assert a.question == b.question and (a.label != b.label) == other
            assert a.patient_id != b.patient_id


def test_questions_of_their_own_do_not_change_other_plans():
    films = phantom_cohort(40)
    told = keeping(films, question=QUESTIONS['effusion'])
    one, two = (make_plan(c, seed=1)[0] for c in (films, told))
    assert one.attrs['plan_hash'] == two.attrs['plan_hash'] and not {
        'texts',
        'same_question',
    } & set(two.attrs)
    reports = keeping(films, question=[f'Is there effusion {i % 2}?' for i in range(len(films))])
    plan, _ = make_plan(reports, ['image_swap', 'text_swap'])  # with texts, donors agree as well
    asked = reports.set_index('sample_id').question
    swapped = plan[plan.arm == 'text_swap']
    assert (swapped.sample_id.map(asked) == swapped.text_id.map(asked)).all() and len(swapped)


def test_questions_that_nobody_else_is_asked(tmp_path):
    cohort = plain_questions(60)
    cohort = keeping(cohort, question=[f'{q} No. {i}' for i, q in enumerate(cohort.question)])
    run_audit(tmp_path / 'run', cohort, [READER])
    log = (tmp_path / 'run' / 'log.txt').read_text()
    assert f'donors answer the same question: 0 of {len(cohort)} samples' in log
    assert log.index('donors answer') < log.index('trials, 0 failed')  # before scoring
    found = load_results(tmp_path / 'run').verdicts[READER]
    assert found['relies_on_image']['state'] == 'too few' and found['any_image']['moved'] > 0.2
    assert [c for c in found['caveats'] if c['kind'] == 'questions']
    page = write_report(tmp_path / 'run').read_text()
    assert 'because no other patient is asked the same question' in page


def test_wrong_requests_are_one_line(here, tmp_path):
    write_table(plain_questions(40), tmp_path / 'c.parquet', 'cohort')
    for asked, why in (
        (('--arms', 'text_swap'), 'no text'),
        (('--arms', 'image_swap,image_only'), 'image_only'),
        (('--probes', 'foil'), 'no text'),
        (('--variants', 'plain,unmatched'), 'contradict'),
        (('--primary', 'text'), 'no text'),
    ):
        run = ('audit', '--cohort', 'c.parquet', '--model', READER, *asked, '--out', 'run')
        code, _, err = here(*run)
        assert code == 2 and why in err and len(err.strip()) < 400, (asked, err)
        assert not (tmp_path / 'run').exists()  # before anything is written


def test_a_folder_per_answer(here, tmp_path):
    save_yes_no_folders(tmp_path / 'films', 160)
    run = ('audit', 'kermany_cxr', '--root', 'films', '--model', 'planted:question-only')
    code, out, err = here(*run, '--out', 'run')
    assert code == 0 and 'image no verdict, text not asked' in out, err
    assert 'It gives one answer' in out  # one question, one answer: nothing was read
    card = read_manifest('kermany_cxr')
    seen = {'pneumonia': card.tasks['pneumonia'].model_copy(update=dict(question='Any opacity?'))}
    cohort, lost = build_cohort(card.model_copy(update=dict(tasks=seen)), tmp_path / 'films')
    assert lost.empty and cohort.groupby('label').size().tolist() == [80, 80]
    run_audit(tmp_path / 'own', cohort, [READER])
    found = load_results(tmp_path / 'own').verdicts[READER]
    assert found['relies_on_image']['verdict'] == 'relies', found['relies_on_image']
    assert found['relies_on_text']['state'] == 'not asked'


def imported(plan, cohort, says, path):
    "Answers of a model as a program elsewhere would write them, with hashes of what it was shown."
    key, image = (
        dict(zip(cohort.sample_id, question_keys(cohort))),
        dict(zip(cohort.sample_id, cohort.image)),
    )
    lines = []
    for t in plan.itertuples():
        question, shown = key[t.sample_id], image.get(t.image_id, '')
        logprobs = [-0.1, -3.0] if says(question, shown) == 'yes' else [-3.0, -0.1]
        told = content_hash(question, bool(shown))
        hashes = dict(pixel_sha=shown, token_sha=told, delivered_sha=content_hash(shown, told))
        lines.append(json.dumps(dict(trial_id=t.trial_id, logprobs=logprobs, **hashes)))
    Path(path).write_text('\n'.join(lines) + '\n')


def test_vqa_rad_has_a_verdict(real_data, tmp_path):
    "Real questions: one model knows every answer about the image it is shown, one the questions."
    cohort, _ = build_cohort('vqa_rad', real_data / 'vqa_rad', check_images=False)
    plan, _ = make_plan(cohort, ['image_swap', 'image_any', 'neither'], donors='auto')
    key, organ = question_keys(cohort), dict(zip(cohort.sample_id, cohort.organ))
    by_id = dict(zip(cohort.sample_id, key))
    swaps = plan[plan.arm.isin(['image_swap', 'image_swap_same'])]
    assert (swaps.sample_id.map(by_id) == swaps.image_id.map(by_id)).all()
    other = plan[plan.arm == 'image_any']
    assert (other.sample_id.map(organ) == other.image_id.map(organ)).all()
    assert len(other) == len(cohort) and 'answer the same question' in attainable_lines(plan)[0]

    truth = dict(zip(zip(key, cohort.image), cohort.label))
    usual = cohort.label.groupby(key).agg(lambda s: s.mode()[0])
    models = dict(
        oracle=lambda q, image: truth.get((q, image), usual[q]),
        prior=lambda q, image: usual[q],
    )
    found = {}
    for name, says in models.items():
        file = tmp_path / f'{name}.jsonl'
        imported(plan, cohort, says, file)
        run_import(tmp_path / name, file, plan, cohort=cohort, name=name)
        found[name] = load_results(tmp_path / name).verdicts[name]
        assert found[name]['relies_on_text']['state'] == 'not asked'
    image = {n: f['relies_on_image'] for n, f in found.items()}
    assert image['oracle']['verdict'] == 'relies' and image['oracle']['n_patients'] > 90
    assert image['prior']['verdict'] in ('ignores', 'undecided') and image['prior']['value'] == 0
    assert found['prior']['any_image']['moved'] == 0 < found['oracle']['any_image']['moved']
    page = write_report(tmp_path / 'oracle').read_text()
    assert 'oracle relies on the image' in page and 'of the same organ changes its answer' in page


def test_a_tiny_real_architecture_on_real_questions(real_data, here, tmp_path):
    from smsbench.testing.tiny import tiny_checkpoint

    tiny_checkpoint('llava', tmp_path / 'tiny')
    cohort, _ = build_cohort('vqa_rad', real_data / 'vqa_rad', check_images=False)
    some = keeping(cohort)[question_keys(cohort) == 'is heart enlarged'].reset_index(drop=True)
    some.attrs = dict(cohort.attrs)
    write_table(some, tmp_path / 'c.parquet', 'cohort')
    asked = ('--arms', 'image_swap,image_any,neither', '--check', '2', '--device', 'cpu')
    run = ('--cohort', 'c.parquet', '--root', real_data / 'vqa_rad', '--model', 'tiny')
    code, out, err = here('audit', *run, *asked, '--out', 'run')
    assert code == 0 and 'text not asked' in out, err
    delivery = load_results(tmp_path / 'run').delivery['tiny']
    assert {v['verdict'] for v in delivery.values()} == {'ok'}
