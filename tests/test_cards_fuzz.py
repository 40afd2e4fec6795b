"Whatever stands in a card or in the files it names: a cohort, or one line."

import io, json, tarfile, zipfile

import pytest
import yaml
from hypothesis import HealthCheck, given, settings, strategies as st

from smsbench.core import InputError
from smsbench.data.cards import Manifest, read_manifest
from smsbench.data.cohort import build_cohort, manifest_path

FAST = settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
CARDS = sorted(manifest_path('csv_images').parent.glob('*.yaml'))


def one_line(f, *hidden):
    "The result of `f`, or None after an `InputError` of one line that tells none of `hidden`."
    try:
        return f()
    except InputError as e:
        assert '\n' not in str(e) and not any(h in str(e) for h in hidden), str(e)


def read(path):
    "A card, or None after one line that names the card."
    try:
        return read_manifest(path)
    except InputError as e:
        assert (
            '\n' not in str(e) and str(e).startswith(path.name) and str(path.parent) not in str(e)
        ), str(e)


def places(x, at=()):
    "Every place in a nested card."
    yield at
    for k, v in x.items() if isinstance(x, dict) else enumerate(x) if isinstance(x, list) else ():
        yield from places(v, (*at, k))


def changed(x, at, new):
    if not at:
        return new
    x = dict(x) if isinstance(x, dict) else list(x)
    x[at[0]] = changed(x[at[0]], at[1:], new)
    return x


junk = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=12)
    | st.sampled_from(
        [
            '',
            '{id}',
            '{',
            '{id:.x}',
            '*',
            '../x',
            '/etc/passwd',
            'a.zip!b',
            '(',
            '-1',
            'nan',
            'list',
            'exclude',
            'utf-7',
            '\x00',
            '\n',
        ]
    ),
    lambda c: (
        st.lists(c, max_size=3)
        | st.dictionaries(
            st.text(max_size=8)
            | st.sampled_from(
                [
                    'column',
                    'columns',
                    'path',
                    'on',
                    'rule',
                    'in',
                    'equals',
                    'table',
                    'file',
                    'label',
                ]
            ),
            c,
            max_size=3,
        )
    ),
    max_leaves=6,
)


@given(st.sampled_from(CARDS), st.data())
@FAST
def test_a_changed_card_is_read_or_refused_with_one_line_that_names_a_key(tmp_path, path, data):
    card = yaml.load(path.read_text(encoding='utf-8'), Loader=yaml.BaseLoader)
    for _ in range(data.draw(st.integers(1, 3))):
        card = changed(card, data.draw(st.sampled_from(list(places(card)))), data.draw(junk))
    (tmp_path / 'card.yaml').write_text(
        yaml.safe_dump(card, allow_unicode=True), encoding='utf-8', errors='replace'
    )
    m = read(tmp_path / 'card.yaml')
    if m is not None:
        assert (
            Manifest(**json.loads(json.dumps(m.model_dump(mode='json', by_alias=True)))) == m
            and len(m.hash) == 16
        )
        one_line(lambda: build_cohort(m, tmp_path / 'nothing', check_images=False))


@given(
    st.binary(max_size=200)
    | st.sampled_from(CARDS).flatmap(
        lambda p: st.tuples(
            st.just(p.read_bytes()), st.integers(0, 3000), st.binary(max_size=4)
        ).map(lambda x: x[0][: x[1]] + x[2] + x[0][x[1] + 1 :])
    )
)
@FAST
def test_any_bytes_as_a_card(tmp_path, content):
    (tmp_path / 'card.yaml').write_bytes(content)
    read(tmp_path / 'card.yaml')


def zipped(files):
    b = io.BytesIO()
    with zipfile.ZipFile(b, 'w') as z:
        for name, data in files.items():
            z.writestr(name, data)
    return b.getvalue()


def tarred(files):
    b = io.BytesIO()
    with tarfile.open(fileobj=b, mode='w:gz') as t:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            t.addfile(info, io.BytesIO(data))
    return b.getvalue()


XML = (
    b'<eCitation><uId id="1"/><AbstractText Label="FINDINGS">clear lungs, normal heart, no'
    b' effusion</AbstractText><MeSH><major>normal</major></MeSH><parentImage id="7"/></eCitation>'
)
FILES = {
    't.csv': (
        b'id,patient,text,label,boxes,path\n7,p1,a note,yes,"[[0, 0, 2,'
        b' 2]]",x/p12/y\n8,p2,another,no,,x/p13/y\n'
    ),
    't.json': (
        b'[{"id": "7", "patient": "p1", "text": "a note", "label": true, "boxes": [[0, 0, 2, 2]]}]'
    ),
    't.jsonl': b'{"id": 7, "patient": 1, "text": "a note", "label": "yes"}\n',
    'l.txt': b'7\n9\n',
    'r/7.txt': b'FINDINGS: clear lungs, normal heart, no effusion',
    'r.zip': zipped({'7.txt': 'FINDINGS: clear lungs', 't.csv': 'id\n7\n'}),
    'o.tgz': tarred({'e/1.xml': XML}),
    'b.csv': b'id,x,y,w,h\n7,0,0,2,2\n',
    's.csv': b'id,split\n7,train\n8,test\n',
    'films/a/7.png': b'\x89PNG\r\n\x1a\n',
}
COLUMNS = [
    *['id', 'patient', 'text', 'label', 'boxes', 'path', '{id}', '{id:.1}.png', 'films/*/{id}.png']
    * 4,
    'value',
    'uid',
    'image_id',
    'findings',
    'folder',
    'stem',
    'split',
    '_table',
    'n',
    '{no}',
    '',
]
column = st.sampled_from(COLUMNS)
table = (
    st.sampled_from(
        ['t.csv'] * 6
        + [
            't.json',
            't.jsonl',
            'o.tgz',
            's.csv',
            'r.zip!t.csv',
            'gone.csv',
            '../t.csv',
            ['gone.csv', 't.csv'],
        ]
    )
    | st.sampled_from(
        [
            dict(path=dict(a='t.csv', b='t.json')),
            dict(path='films', kind='folders'),
            dict(path='l.txt'),
        ]
    )
    | st.fixed_dictionaries(
        dict(path=st.sampled_from([*FILES, 'films', 'r.zip!t.csv'])),
        optional=dict(
            kind=st.sampled_from(['csv', 'json', 'jsonl', 'list', 'folders', 'openi']),
            separator=st.sampled_from([',', ';']),
            encoding=st.sampled_from(['utf-8', 'utf-16', 'latin-1']),
            under=st.sampled_from(['', 'rows']),
        ),
    )
)
words = st.lists(st.sampled_from(['yes', '1', '7', 'a', 'normal', 'train']), min_size=1, max_size=2)


def one_of(always, forms, more=None):
    "A part of a card in one of its forms, each with what always goes with it."
    return st.sampled_from(sorted(forms)).flatmap(
        lambda k: st.fixed_dictionaries({**always, k: forms[k]}, optional=more or {})
    )


label = (
    column
    | one_of(
        dict(column=column),
        dict(
            equals=st.just('yes'),
            any_of=words,
            none_of=words,
            threshold=st.just('3'),
            rule=st.sampled_from(['sms_brset', 'sms_ham10000', 'no']),
            uncertain=st.sampled_from(['exclude', 'no', '?']),
            map=st.just({'yes': 'yes', '1': 'no'}),
        ),
        dict(split_on=st.sampled_from(['list', '|'])),
    )
    | one_of(
        {},
        dict(columns=st.lists(column, min_size=1, max_size=2)),
        dict(rule=st.just('sms_mimic'), uncertain=st.just('exclude'), empty=st.just('no')),
    )
)
conditions = one_of(
    dict(column=column),
    {
        'equals': st.just('yes'),
        'in': words,
        'not_in': words,
        'at_least': st.just('3'),
        'at_most': st.just('3'),
        'not_empty': st.just('true'),
    },
    dict(why=st.text(max_size=5)),
) | one_of(dict(any_in=words), dict(columns=st.lists(column, min_size=1, max_size=2)))
derived = one_of(
    dict(column=column),
    dict(
        pattern=st.sampled_from([r'p(\d+)', '(', 'x', '()', r'(a)|b']),
        lists=st.dictionaries(
            st.sampled_from(['train', 'test']),
            st.sampled_from(['l.txt', 's.csv', 'gone.txt']),
            min_size=1,
            max_size=2,
        ),
        map=st.just({'7': 'x'}),
    ),
    dict(otherwise=st.just('o')),
)
texts = one_of(
    {},
    dict(
        file=st.sampled_from(
            ['r/{id}.txt', 'r.zip!{id}.txt', '../{id}', '{id', ['gone/{id}', 'r/{id}.txt']]
        ),
        columns=st.dictionaries(
            st.sampled_from(['findings', 'odd']), column, min_size=1, max_size=2
        ),
        min_chars=st.sampled_from(['0', '30', '-1']),
    ),
    dict(sections=st.lists(st.sampled_from(['findings', 'odd']), max_size=2)),
)
boxes = st.fixed_dictionaries(
    dict(
        table=st.just('b.csv') | table,
        key=column,
        columns=st.sampled_from([['x', 'y', 'w', 'h'], ['boxes'], ['x']]),
    ),
    optional=dict(of=column, size=st.sampled_from([['8', '8'], ['w', 'h'], ['0', '8'], ['8']])),
)
cards = st.fixed_dictionaries(
    dict(
        name=st.just('x'),
        title=st.just('x'),
        version=st.just('1'),
        licence=st.just('x'),
        access=st.sampled_from(['open', 'credentialed']),
        table=table,
        max_excluded=st.just('1'),
        columns=st.fixed_dictionaries(
            dict(
                sample_id=st.just('id') | column,
                patient_id=st.just('patient') | column,
                image=column,
            ),
            optional=dict(text=column, split=column, finding=column, boxes=column),
        ),
        tasks=st.just(dict(t=dict(question='Is it?', label='label')))
        | st.dictionaries(
            st.sampled_from(['a', 'b']),
            st.fixed_dictionaries(dict(question=st.just('Is it?'), label=label)),
            min_size=1,
            max_size=2,
        ),
    ),
    optional=dict(
        joins=st.lists(
            st.fixed_dictionaries(
                dict(
                    table=st.just('s.csv') | table,
                    on=st.just(['id'])
                    | st.lists(column, min_size=1, max_size=2)
                    | st.dictionaries(column, column, min_size=1, max_size=1),
                ),
                optional=dict(
                    columns=st.lists(column, max_size=1),
                    required=st.sampled_from(['true', 'false']),
                ),
            ),
            max_size=2,
        ),
        derive=st.dictionaries(st.sampled_from(['n', 'split', 'site']), derived, max_size=2),
        filters=st.lists(conditions, max_size=2),
        text=texts,
        boxes=boxes,
        strata=st.dictionaries(st.sampled_from(['sex', 'row', 'height']), column, max_size=1),
        keep=st.lists(column | st.sampled_from(['*', '?d']), max_size=2),
        expected=st.fixed_dictionaries({}, optional=dict(n=st.just('1'))),
        needs_text=st.just('false'),
    ),
)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    d = tmp_path_factory.mktemp('data')
    for name, content in FILES.items():
        (d / name).parent.mkdir(parents=True, exist_ok=True)
        (d / name).write_bytes(content)
    return d


@given(cards, st.booleans())
@settings(FAST, max_examples=200)
def test_any_combination_of_what_a_card_may_say(folder, card, check):
    def made():
        (folder / 'card.yaml').write_text(yaml.safe_dump(card), encoding='utf-8')
        cohort, exclusions = build_cohort(
            folder / 'card.yaml', folder, check_images=check, workers=1
        )
        steps = cohort.attrs['funnel']
        if card['access'] == 'open':
            assert steps[-1]['left'] == len(cohort) and all(
                a['left'] - b['left'] == b['removed']
                for a, b in zip(steps, steps[1:])
                if b['step'] != 'questions'
            )
        assert (
            Manifest(**cohort.attrs['card']).hash == cohort.attrs['manifest_hash']
            and cohort.sample_id.is_unique
            and (exclusions.reason != '').all()
        )
        return cohort

    one_line(made, str(folder))


@given(
    st.sampled_from(sorted(FILES)), st.integers(0, 400), st.binary(max_size=5), st.integers(0, 5)
)
@FAST
def test_a_broken_file_is_one_line_or_exclusions(folder, name, at, new, drop):
    whole = FILES[name]
    card = dict(
        name='x',
        title='x',
        version='1',
        licence='x',
        access='open',
        max_excluded='1',
        columns=dict(sample_id='id', patient_id='patient', image='{id}.png', split='split'),
        table=dict(path=dict(a='t.csv', b='t.json', c='t.jsonl')),
        joins=[
            dict(table='s.csv', on=['id']),
            dict(
                table=dict(path='o.tgz'),
                on=dict(id='image_id'),
                columns=['findings'],
                required=False,
            ),
        ],
        derive=dict(part=dict(column='id', lists=dict(x='l.txt'))),
        text=dict(file=['r.zip!{id}.txt', 'r/{id}.txt']),
        boxes=dict(table='b.csv', key='id', columns=['x', 'y', 'w', 'h']),
        tasks=dict(
            t=dict(
                question='Is it?',
                label=dict(column='label', map=dict(yes='yes', true='yes', no='no')),
            )
        ),
    )
    (folder / name).write_bytes(whole[:at] + new + whole[at + drop :])
    try:
        one_line(lambda: build_cohort(Manifest(**card), folder, check_images=False), str(folder))
    finally:
        (folder / name).write_bytes(whole)
