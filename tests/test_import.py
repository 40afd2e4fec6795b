"Result tables of other programs, in the layouts that these programs write."

import json, os
from pathlib import Path

import pandas as pd, pytest

from smsbench.answers.reader import read_answer
from smsbench.privacy import read_table, write_table
from smsbench.results.card import ResultsCard, gather, read_answers
from smsbench.results.imports import import_table
from smsbench.testing.refused import refused

ASK = 'Is there a pleural effusion?'
LABELS = ['yes', 'no', 'no', 'yes', 'no', 'yes']
SAID = ['Yes, there is.', 'No.', 'There is a pleural effusion.', 'yes', 'I cannot tell.', 'No']
READ = [read_answer(t, question=ASK)[0] for t in SAID]
OPEN = ResultsCard(access='open')


def jsonl(path, rows):
    path.write_text('\n'.join(json.dumps(r) for r in rows))
    return path


def harness(path):
    rows = [
        dict(
            doc_id=i,
            doc=dict(question=ASK, image_id=f'{i}.png'),
            target=label,
            arguments=dict(gen_args_0=dict(arg_0=f'Q: {ASK}', arg_1=dict(until=['\n']))),
            resps=[[said]],
            filtered_resps=['[invalid]'],
            filter='none',
            metrics=['exact_match'],
            doc_hash='d',
            prompt_hash='p',
            target_hash='t',
        )
        for i, (label, said) in enumerate(zip(LABELS, SAID))
    ]
    return jsonl(path / 'samples_vqa_2026-01-01T00-00-00.jsonl', rows)


def lmms(path):
    rows = [
        dict(doc_id=i, input=ASK, target=label, filtered_resps=[said], doc_hash='h')
        for i, (label, said) in enumerate(zip(LABELS, SAID))
    ]
    return jsonl(path / '20260101_samples_vqa.jsonl', rows)


def kit(path):
    table = pd.DataFrame(
        dict(index=range(6), question=ASK, answer=[s.title() for s in LABELS], prediction=SAID)
    )
    table.to_csv(path / 'Model_VQA.tsv', sep='\t', index=False)
    return path / 'Model_VQA.tsv'


def sheet(path):
    pytest.importorskip('openpyxl')
    pd.read_csv(kit(path), sep='\t').to_excel(path / 'Model_VQA.xlsx', index=False)
    return path / 'Model_VQA.xlsx'


def llava(path):
    asked = [
        dict(question_id=i, image=f'{i}.png', text=ASK, label=label)
        for i, label in enumerate(LABELS)
    ]
    jsonl(path / 'questions.jsonl', asked)
    rows = [
        dict(question_id=i, prompt=ASK, text=said, answer_id='a', model_id='llava', metadata={})
        for i, said in enumerate(SAID)
    ]
    return jsonl(path / 'answers.jsonl', rows)


def batch(path):
    def body(said):
        message = dict(role='assistant', content=said, refusal=None)
        return dict(object='chat.completion', model='gpt', choices=[dict(index=0, message=message)])

    rows = [
        dict(id='r', custom_id=f'{i}.png', error=None)
        | dict(response=dict(status_code=200, request_id='q', body=body(said)))
        for i, said in enumerate(SAID)
    ]
    return jsonl(path / 'batch_output.jsonl', rows)


def inspect(path):
    log = pytest.importorskip('inspect_ai.log')
    from inspect_ai.dataset import Sample
    from inspect_ai.model import ModelOutput

    samples = [
        log.EvalSample(
            id=i, epoch=1, input=ASK, target=label, output=ModelOutput.from_content('mock', said)
        )
        for i, (label, said) in enumerate(zip(LABELS, SAID))
    ]
    assert Sample(input=ASK).input == ASK
    spec = log.EvalSpec(
        created='2026-01-01T00:00:00+00:00',
        task='vqa',
        dataset=log.EvalDataset(name='vqa'),
        model='mock/model',
        config=log.EvalConfig(),
    )
    log.write_eval_log(log.EvalLog(eval=spec, samples=samples), str(path / 'run.eval'))
    return path / 'run.eval'


@pytest.mark.parametrize('write', [harness, lmms, kit, sheet, inspect])
def test_layouts_need_no_card(write, tmp_path):
    "The same answers and labels come out of every layout that holds both."
    rows, about = gather(write(tmp_path), OPEN)
    table, left = read_answers(rows)
    assert about['layout'] and left.empty and set(table.question) == {ASK}
    assert table.said.tolist() == READ and table.truth.tolist() == LABELS
    assert table['item'].nunique() == 6


def test_llava_with_its_questions(tmp_path):
    card = ResultsCard(access='open', questions='questions.jsonl')
    table, _ = read_answers(gather(llava(tmp_path), card)[0])
    assert table.said.tolist() == READ and table.truth.tolist() == LABELS
    assert table.image.tolist() == [f'{i}.png' for i in range(6)] and set(table.model) == {'llava'}


def test_batches_get_labels_and_patients_from_a_cohort(tmp_path):
    from smsbench.audit.runner import Source
    from smsbench.data.phantom import phantom_cohort
    from smsbench.results.joining import with_cohort

    cohort = phantom_cohort(6, size=64, findings=['effusion'])
    cohort['image'] = [f'{i}.png' for i in range(6)]
    known = with_cohort(gather(batch(tmp_path), OPEN)[0], Source(cohort))
    assert known.patient.tolist() == cohort.patient_id.tolist()
    assert known.label.tolist() == cohort.label.tolist() and (known.question != '').all()
    assert read_answers(known)[0].said.tolist()[0] == 'yes'


def test_log_probabilities_of_a_harness_decide(tmp_path):
    rows = [
        dict(
            doc_id=i,
            doc=dict(question=ASK, choices=['no', 'yes']),
            target=int(label == 'yes'),
            resps=[[['-2.0', 'False']], [['-0.2', 'True']]],
            filtered_resps=[['-2.0', 'False'], ['-0.2', 'True']],
        )
        for i, label in enumerate(LABELS)
    ]
    table, _ = read_answers(gather(jsonl(tmp_path / 's.jsonl', rows), OPEN)[0])
    assert set(table.said) == {'yes'} and table.truth.tolist() == LABELS and table.scored.all()


def test_published_files_under_their_conditions(tmp_path):
    "Flips of a published file are those of its re-analysis."
    data = Path(os.environ.get('SMSBENCH_DATA', '')) / 'published_sms' / 'results'
    if not os.environ.get('SMSBENCH_DATA') or not data.is_dir():
        pytest.skip('SMSBENCH_DATA does not name a folder that holds published_sms')
    columns = dict(answer='prediction', label='ground_truth', image='filename', condition='shift')
    card = ResultsCard(**columns, baseline='No', patient='filename', access='open')
    path = data / 'qwen2_vl_7b' / 'medeval_base_shifted.csv'
    run, told, table = import_table(path, tmp_path / 'run', card)
    metrics = read_table(run / 'metrics.parquet', 'metrics')
    rows = metrics[metrics.subgroup == 'all'].set_index(['metric', 'arm']).value
    assert rows['flips', 'Image'] == 0 and f'{rows["accuracy", "No"]:.4f}' == '0.6105'
    assert f'{rows["accuracy", "Text"]:.4f}' == '0.3700' and rows['nfr', 'Text'] > 0.3
    assert any('Image: 0.0 % (0.0 to 0.2) of the answers changed' in s for s in told['said'])


def test_what_cannot_be_read_is_refused_in_one_line(tmp_path):
    for name, text, word in (
        ('a.csv', 'x,y\n1,2\n', '--map'),
        ('a.csv', '', 'empty'),
        ('a.jsonl', 'nothing', 'no objects'),
        ('a.csv', 'image,question,prediction,label\na,Is it?,?,yes\n', 'none of 1 answers'),
    ):
        (tmp_path / name).write_text(text)
        said = refused(lambda name=name: import_table(tmp_path / name, tmp_path / 'r', OPEN))
        assert word in said and '\n' not in said
    assert not (tmp_path / 'r').exists()


def test_command_joins_to_a_cohort_and_predictions_follow(cli, tmp_path):
    "From a table without trial ids to a verdict: import, answer what is missing, predictions."
    from smsbench.audit.runner import Source
    from smsbench.data.phantom import phantom_cohort

    cohort = phantom_cohort(60, size=64, findings=['effusion'])
    write_table(cohort, tmp_path / 'c.parquet', 'cohort')
    task = next(iter(Source(cohort).tasks.values()))
    rows = [
        dict(image=r.image, question=task.question, pred=f'{r.label.title()}.')
        for r in cohort.itertuples()
    ]
    pd.DataFrame(rows).to_csv(tmp_path / 'theirs.csv', index=False)
    given = ['import', 'theirs.csv', '--cohort', 'c.parquet', '--access', 'open', '--out', 'i']
    code, out, err = cli(*given)
    assert code == 0, err
    page = (tmp_path / 'i' / 'report.html').read_text()
    assert 'right in 100.0 %' in out and 'are missing for a verdict' in out
    assert 'opposite choice' in page and 'Towards a verdict' in page
    made = (tmp_path / 'i' / 'answers_theirs.jsonl').read_text().splitlines()
    missing = (tmp_path / 'i' / 'missing_theirs.jsonl').read_text().splitlines()
    plan = pd.read_parquet(tmp_path / 'i' / 'plan.parquet')
    assert len(made) == (plan.arm == 'original').sum() and len(made) + len(missing) == len(plan)
    answers = [
        *made,
        *(json.dumps(dict(trial_id=json.loads(m)['trial_id'], raw_text='Yes')) for m in missing),
    ]
    (tmp_path / 'all.jsonl').write_text('\n'.join(answers))
    given = ['predictions', 'all.jsonl', '--plan', 'i/plan.parquet', '--cohort', 'c.parquet']
    code, out, err = cli(*given, '--n-boot', '100', '--out', 'r')
    assert code == 0, err
    assert 'all: image' in out


KEYS = ['custom_id', 'response', 'error', 'doc_id', 'doc', 'target', 'resps', 'filtered_resps']
KEYS += ['index', 'question', 'answer', 'prediction', 'A', 'B', 'question_id', 'text', 'prompt']
KEYS += ['image', 'label', 'model', 'options', 'choices', 'input', 'arguments', 'metadata', 'n']


def test_any_objects_are_read_or_refused(tmp_path):
    "Whatever stands under the keys of the layouts: a table, or one line that says why not."
    from hypothesis import HealthCheck, given, settings, strategies as st
    from smsbench.core import InputError
    from smsbench.results.measures import measure_table, reading_counts, say_table

    leaf = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
    leaf = leaf | st.sampled_from(['yes', 'No.', 'A', '[-0.1, -3]', '{"a": 1}', '\ud800'])
    value = st.recursive(leaf, lambda v: st.lists(v, max_size=3) | st.dictionaries(
        st.sampled_from(KEYS + ['body', 'message', 'content', 'arg_0', 'text']), v, max_size=3
    ), max_leaves=6)  # fmt: skip
    layout = st.sampled_from([KEYS[:3], KEYS[3:8], KEYS[8:14], KEYS[14:17], ['answer', 'label']])
    row = st.dictionaries(st.sampled_from(KEYS), value, max_size=8)
    seen = dict(read=0, refused=0)

    @given(layout, st.lists(row, min_size=1, max_size=5), value)
    @settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
    def whatever(keys, rows, filling):
        rows = [{**dict.fromkeys(keys, filling), **r} for r in rows]
        try:
            table, _ = read_answers(gather(jsonl(tmp_path / 'any.jsonl', rows), OPEN)[0])
        except InputError as e:
            seen['refused'] += 1
            assert '\n' not in str(e)
            return
        say_table(measure_table(table, access='open')[0])
        reading_counts(table)
        seen['read'] += 1

    whatever()
    assert min(seen.values()) > 10
