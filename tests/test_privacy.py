"Tables of credentialed data stay what they are, and nothing of few patients comes out."

import pickle, re

import pandas as pd, pytest

from smsbench import Bootstrap
from smsbench.clip.dataset import images_of
from smsbench.clip.evaluate import classification_metrics
from smsbench.core import InputError
from smsbench.data.audit import audit
from smsbench.data.sealed_cohort import SealedCohort, audit_sealed, open_cohort
from smsbench.data.phantom import phantom_cohort
from smsbench.data.splits import assert_disjoint, make_splits, split_table
from smsbench.privacy import (
    access_of,
    cohort_summary,
    is_in_clear,
    is_sealed,
    read_table,
    shareable,
    with_access,
    write_table,
)
from smsbench.audit.metrics import measure
from smsbench.audit.run import AuditSettings, run_audit
from smsbench.audit.plan import attainable, cohort_hash, make_plan

N = 60
MORE = pd.DataFrame(dict(place=range(N), height=range(N)))
WAYS = {  # what is done to tables every day; each loses or keeps the metadata as pandas likes
    'merged': lambda t: t.merge(MORE, on='place'),
    'merged from the right': lambda t: MORE.merge(t, on='place'),
    'concatenated': lambda t: pd.concat([t[:20], t[20:].assign(late=1)], ignore_index=True),
    'grouped': lambda t: t.groupby('place', as_index=False).first(),
    'grouped and put together': lambda t: pd.concat([g for _, g in t.groupby('split')]),
    'pickled': lambda t: pickle.loads(pickle.dumps(t)),
    'sliced': lambda t: t[t.place >= 0].reset_index(drop=True),
    'copied': lambda t: t.copy().assign(age=50),
    'sorted': lambda t: t.sort_values('label').query('place < 1000'),
    'rebuilt': lambda t: pd.DataFrame(t.to_dict('records')),
}


def lend(table):
    "A credentialed table with secrets in ids, texts, a small stratum and a carried column."
    n, patient = len(table), pd.factorize(table.patient_id)[0]
    out = table.assign(
        place=range(n),
        patient_id=[f'SECRETpatient{k}' for k in patient],
        sample_id=[f'SECRETsample{i}' for i in range(n)],
        text='SECRETname ' + table.text,
        ward=['SECRETward' if k < 4 else 'north' for k in patient],
        split=['rare' if k < 3 else 'test' for k in patient],
    )
    out.attrs = table.attrs | dict(strata=['ward'])
    return with_access(out, 'credentialed')


@pytest.fixture(scope='module')
def held():
    "A cohort of credentialed data in hand: sealed, and in clear."
    made = phantom_cohort(N, findings=['effusion'], seed=3)
    h = open_cohort(lend(made))
    assert len(h.cohort) == N and is_sealed(h.cohort) and is_in_clear(h.plaintext)
    place = range(N)  # `place` of single patients is withheld in a sealed table
    return SealedCohort(h.cohort.assign(place=place), h.plaintext.assign(place=place), h.key)


def text_of(*things):
    return '\n'.join(
        t.to_csv() + str(t.attrs) if isinstance(t, pd.DataFrame) else str(t) for t in things
    )


def small_counts(table, columns):
    "Cells of count columns that tell of fewer than ten."
    cells = [str(c) for k in columns for c in table[k]]
    return [c for c in cells if re.fullmatch(r'[1-9](\.0)?', c)]


@pytest.mark.parametrize('way', WAYS)
def test_a_table_stays_what_it_is(held, tmp_path, way):
    sealed, opened = WAYS[way](held.cohort), WAYS[way](held.plaintext)
    assert access_of(sealed) == access_of(opened) == 'credentialed'
    assert is_sealed(sealed) and not is_in_clear(sealed) and is_in_clear(opened)
    for kind in ('', 'cohort'):
        with pytest.raises(InputError, match='in clear'):
            write_table(opened, tmp_path / 'x.parquet', kind)
    with pytest.raises(InputError, match='opened'):
        open_cohort(opened)
    assert not list(tmp_path.iterdir())
    write_table(sealed, tmp_path / 'x.parquet', 'cohort')
    back = read_table(tmp_path / 'x.parquet', 'cohort')
    assert is_sealed(back) and 'SECRET' not in text_of(back)


@pytest.mark.parametrize('way', WAYS)
def test_no_small_count_is_told(held, way):
    lost = pd.DataFrame(dict(reason=['NaN label'] * 3, label='', patient_id='', sample_id='x'))
    for t in (WAYS[way](held.cohort), WAYS[way](held.plaintext)):
        t.attrs = dict(strata=['ward']) if 'ward' in t else {}
        told, parts = cohort_summary(t, lost), split_table(t)
        assert not small_counts(told, ['samples', 'patients']), told
        assert not small_counts(parts, ['samples', 'patients']), parts
        assert 'SECRET' not in text_of(told, parts)
        with pytest.raises(InputError) as e:
            make_splits(t[:2], dict(a=0.4, b=0.3, c=0.3))
        assert '<10 patients' in str(e.value)
        with pytest.raises(InputError) as e:
            assert_disjoint(t.assign(patient_id='one'))
        assert '<10 of' in str(e.value) and "'one'" not in str(e.value)


def test_the_files_are_audited_without_a_word_of_anybody(held):
    for h in (held, SealedCohort(held.cohort, WAYS['merged'](held.plaintext), held.key)):
        h.plaintext.attrs = held.plaintext.attrs
        found = audit_sealed(h, None)
        counts = found.tables['labels']
        assert 'SECRET' not in text_of(found.findings, *found.tables.values())
        assert not small_counts(counts, ['samples', 'patients'])
        assert not re.search(r'\b[1-9] (of|patients|samples)', ' '.join(found.findings.sentence))


def test_a_plan_keeps_its_access(held):
    rows = {r.sample_id: r for r in held.plaintext.itertuples(index=False)}
    plan, _ = make_plan(held.cohort, ['original', 'image_swap', 'image_swap_same'], opened=rows)
    few = plan[plan.sample_id.isin(sorted(set(plan.sample_id))[:5])]
    bare = few.merge(pd.DataFrame(dict(arm=few.arm.unique())), on='arm')
    bare.attrs = dict(tasks=plan.attrs['tasks'])
    assert access_of(plan) == access_of(bare) == 'credentialed' and 'SECRET' not in text_of(plan)
    assert not small_counts(attainable(bare), ['samples', 'patients', 'donors'])
    said = pd.DataFrame(
        [
            dict(trial_id=t, model='m', answer='yes', parse_status='ok', logprobs=[-0.1, -2.3])
            | dict(answer_mass=1.0, raw_text='', pixel_sha='', token_sha='', delivered_sha='')
            | dict(seconds=0.0)
            for t in bare.trial_id
        ]
    )
    table = measure(bare, said)
    assert len(table) and table.value.isna().all() and (table.n == 0).all()


def test_the_column_is_in_no_hash(held):
    for t in (held.cohort, phantom_cohort(8, seed=1)):
        assert cohort_hash(t) == cohort_hash(t.drop(columns='access'))
    plain = phantom_cohort(12, seed=1)
    old = plain.drop(columns='access')  # as it was made before there was the column
    made = [make_plan(t, ['image_swap'])[0].attrs['plan_hash'] for t in (plain, old)]
    assert made[0] == made[1] and old.attrs['access'] == 'open'


def test_a_file_from_before_the_column_is_read_with_it(held, tmp_path):
    for t, access in ((held.cohort, 'credentialed'), (phantom_cohort(4), 'open')):
        write_table(t.drop(columns='access'), tmp_path / 'old.parquet')
        back = read_table(tmp_path / 'old.parquet', 'cohort')
        assert set(back.access) == {access} == {access_of(back)}


@pytest.mark.parametrize('way', ['merged', 'pickled', 'rebuilt'])
def test_an_opened_cohort_with_only_its_tasks_back_is_not_audited(held, tmp_path, way):
    t = WAYS[way](held.plaintext)
    t.attrs = dict(tasks=held.plaintext.attrs['tasks'])
    with pytest.raises(InputError, match='sealed cohort'):
        run_audit(tmp_path / 'run', t, ['planted:text-only'])
    assert not [p for p in tmp_path.rglob('*') if p.is_file()]


def test_an_audit_writes_nothing_of_anybody(tmp_path):
    cohort = WAYS['merged'](lend(phantom_cohort(24, findings=['effusion'], seed=4)))
    cohort.attrs = dict(tasks=phantom_cohort(2, findings=['effusion']).attrs['tasks'])
    asked = AuditSettings(arms=('image_swap', 'image_swap_same'), n_boot=50)
    run = run_audit(tmp_path / 'run', cohort, ['planted:text-only'], settings=asked)
    written = [p for p in run.path.rglob('*') if p.is_file()]
    tables = [read_table(p) for p in written if p.suffix == '.parquet']
    files = [p.read_bytes().decode('utf-8', 'replace') for p in written]
    assert written and 'SECRET' not in text_of(*tables, *files, *written)
    metrics = read_table(run / 'metrics.parquet', 'metrics')
    assert not small_counts(metrics, ['n', 'n_clusters', 'n_donors'])


def test_notes_hide_counts_whatever_is_counted():
    cohort = phantom_cohort(60, findings=['effusion', 'nodule'], seed=2)
    films = images_of(with_access(cohort, 'credentialed'))
    truth = films.targets.copy()
    truth.iloc[:3, 0] = float('nan')  # three films were not asked about one class
    scores = truth.fillna(0) * 0.5 + 0.2
    raw = classification_metrics(scores, truth, films.table.patient_id, boot=Bootstrap(20))
    assert raw.note.str.contains(r'\b3 films').any()
    shown = shareable(raw, access_of(films))
    assert shown.note.str.contains('<10 films').any()
    assert not shown.note.str.contains(r'(?<![<\d.])\b[1-9] (?:film|image|sample)').any()
    assert 'note_counts' not in shown and shareable(raw, 'open').note.equals(raw.note)
    for said in ('1 film', '3 images', '4 samples', '2 pictures of 5 people'):
        old = shareable(raw.drop(columns='note_counts').assign(note=said), 'credentialed')
        assert not old.note.str.contains(r'(?<!<)\b[1-9]\b').any()


def test_what_states_no_access_is_refused_and_told_what_to_do(held, tmp_path):
    bare = pd.DataFrame(dict(phantom_cohort(8, findings=['effusion'])))
    tasks = phantom_cohort(2, findings=['effusion']).attrs['tasks']
    none = bare.drop(columns='access')
    partly = pd.concat([bare[:4], none[4:]])
    empty = bare[:0]
    exclusions = pd.DataFrame(dict(reason=[]))
    asks = dict(
        access_of=access_of,
        open_cohort=open_cohort,
        cohort_summary=lambda t: cohort_summary(t, exclusions),
        split_table=split_table,
        make_plan=lambda t: make_plan(t, ['image_swap']),
        images_of=images_of,
        run_audit=lambda t: run_audit(tmp_path / 'run', t, ['planted:text-only']),
        write_table=lambda t: write_table(t, tmp_path / 'c.parquet', 'cohort'),
    )
    for name, ask in asks.items():
        tables = [none, partly, bare.assign(access=''), bare.assign(access='restricted')]
        for t in [*tables, *([empty] if name == 'access_of' else [])]:
            t.attrs = {} if t is empty else dict(tasks=tasks)
            with pytest.raises(InputError, match=r'smsbench\.privacy\.with_access') as e:
                ask(t)
            assert '\n' not in str(e.value), name
    with pytest.raises(InputError, match='with_access'):
        audit(none, None)
    assert not [p for p in tmp_path.rglob('*') if p.is_file()]
