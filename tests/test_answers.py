"""The reader of answers: labelled answers, echo, negation and cost.

Also: properties of the reader under dressing of an answer.
"""

import itertools, json, os, subprocess, sys, time
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st

from smsbench.answers.reader import MEASURED, NO_SIDE, measure_reader, outcome, read_answer, reading
from smsbench.answers.languages import WORDS
from smsbench.answers.stripping import strip_answer

OWN = [
    json.loads(line) for line in (Path(__file__).parent / 'answers.jsonl').read_text().splitlines()
]
TOLD = ('finding', 'question', 'prompt', 'inverted', 'options')
REAL = Path(os.environ.get('SMSBENCH_DATA', '')) / 'answers/answers.jsonl'
PROMPT = (
    'Here are an image and its report.\nReport: No pneumonia. Heart normal.\n'
    'Question: Does this patient have pneumonia?\nAnswer with one of: yes or no.'
)
ABOUT = dict(finding='pneumonia', question='Does this patient have pneumonia?')
SAID = [
    'Yes',
    'no',
    'There is no pneumonia.',
    'Pneumonia is seen.',
    'Possible pneumonia.',
    "I'm sorry, I cannot tell.",
    'A chest film.',
    'Yes, with no effusion.',
    'The lungs are normal.',
    '',
]


def told(row):
    return {k: row[k] for k in TOLD if row.get(k)}


def test_answers_of_our_own():
    """Forms from public reports about the extraction of answers, written by hand.

    The rules were corrected on them, so they guard and do not measure.
    """
    rates = measure_reader(OWN, TOLD).set_index('kind')
    assert len(OWN) > 300 and rates.of.min() > 60
    assert (
        rates.n['opposite'] == 0 and rates.share['invented'] <= 0.05 and rates.share['lost'] <= 0.03
    )


@pytest.mark.skipif(
    not os.environ.get('SMSBENCH_DATA') or not REAL.is_file(),
    reason='SMSBENCH_DATA holds no answers/answers.jsonl',
)
def test_real_answers():
    "Answers of real models, labelled one by one: the goals of the reader."
    made = measure_reader(REAL).set_index('kind')
    rates = made.share
    assert {k: (r.n, r.of) for k, r in made.iterrows()} == MEASURED  # what reports say
    assert rates['opposite'] <= 0.005 and rates['invented'] <= 0.03 and rates['lost'] <= 0.07
    blind = (
        measure_reader(REAL, told=('finding', 'inverted')).set_index('kind').share
    )  # without the question more is lost, nothing turned
    assert blind['opposite'] <= 0.005 and blind['invented'] <= 0.03


def test_without_a_reader_the_rates_are_bad():
    "The measure tells a bad reader: one that always says yes."
    made = [outcome(r, 'yes') for r in OWN if r['choices'] == ['yes', 'no']]
    assert made.count('opposite') > 60 and made.count('invented') > 60


@pytest.mark.parametrize(
    'dress',
    [
        '**{}**',
        '"{}"',
        '{}</s>',
        '<|im_start|>assistant\n{}<|im_end|>',
        '<think>yes? no?</think>\n{}',
        '```\n{}\n```',
        '["{}"]',
        '{{"answer": "{}"}}',
        '[INST] <image> [/INST] {}',
        'ASSISTANT: {}',
        '\n\n{}  ',
        '<answer>{}</answer>',
    ],
)
def test_dress_changes_nothing(dress):
    for text in SAID[:-1]:
        assert reading(dress.format(text), **ABOUT)[:2] == reading(text, **ABOUT)[:2], (dress, text)


@pytest.mark.parametrize(
    'echo',
    [
        '{p}\n{a}',
        'USER: <image>\n{p} ASSISTANT: {a}',
        '<s>[INST] {p} [/INST] {a}</s>',
        '{p} {a}',
        'user\n{p}\nassistant\n{a}',
        '<|im_start|>user\n{p}<|im_end|>\n<|im_start|>assistant\n{a}<|im_end|>',
        'Question: {q}\nAnswer: {a}',
    ],
)
@pytest.mark.parametrize('known', [PROMPT, PROMPT.split('\n', 2)[2], PROMPT.split('\n')[-1]])
def test_an_echo_changes_nothing(echo, known):
    """The whole prompt, its end, or its last line are enough to remove an echo.

    The report in it is never read.
    """
    for text in SAID:
        whole = echo.format(p=PROMPT, q=ABOUT['question'], a=text)
        assert read_answer(whole, prompt=known, **ABOUT) == read_answer(text, **ABOUT), whole


def test_stripping_twice_changes_nothing():
    for row in OWN:
        bare = strip_answer(
            row['answer'],
            row.get('prompt', ''),
            row.get('question', ''),
            choices=tuple(row['choices']),
        )
        assert (
            strip_answer(
                bare, row.get('prompt', ''), row.get('question', ''), choices=tuple(row['choices'])
            )
            == bare
        )


def test_the_order_of_the_choices_does_not_matter():
    for row in OWN:
        if len(row['choices']) > 3:
            continue
        read = {
            read_answer(row['answer'], order, **told(row))
            for order in itertools.permutations(row['choices'])
        }
        assert len(read) == 1, row


@pytest.mark.parametrize('text', [t for t in SAID if t not in ('', 'The lungs are normal.')])
def test_a_negated_question_turns_statements_and_leaves_answers(text):
    plain, turned = (reading(text, finding='pneumonia', inverted=i) for i in (False, True))
    other = {'yes': 'no', 'no': 'yes', '': ''}
    assert turned.choice == (other[plain.choice] if plain.layer == 'statement' else plain.choice)


def test_what_was_said_of_another_finding_has_no_side():
    for finding, text in itertools.product(
        ('pneumothorax', 'lung nodule', 'rib fracture'),
        ('There is no pneumonia.', 'Pneumonia is present.', 'Pneumonia: no'),
    ):
        assert read_answer(text, finding=finding, question=f'Is there a {finding}?')[0] == '', (
            finding,
            text,
        )


def test_yes_and_no_of_every_language():
    for language, table in WORDS.items():
        for side in ('yes', 'no'):
            for word in table[side].split('|'):
                assert read_answer(f'{word}.') == (side, 'ok'), (language, word)


@given(
    st.one_of(
        st.text(max_size=200),
        st.lists(
            st.sampled_from(
                [
                    'yes',
                    'no',
                    'not',
                    'pneumonia',
                    'is',
                    '.',
                    ',',
                    '\n',
                    '(A)',
                    'B.',
                    '**',
                    '[',
                    '{',
                    '</think>',
                    ':',
                ]
            ),
            max_size=30,
        ).map(' '.join),
        st.recursive(
            st.one_of(st.none(), st.booleans(), st.floats(), st.text(max_size=9)),
            lambda s: st.lists(s, max_size=3) | st.dictionaries(st.text(max_size=5), s, max_size=3),
            max_leaves=6,
        ),
    ),
    st.sampled_from(
        [('yes', 'no'), ('A', 'B', 'C'), ('pneumonia', 'normal'), ('ja', 'nein'), ('(', '*')]
    ),
    st.sampled_from(['', 'pneumonia', '(', '\\', 'a' * 50]),
    st.booleans(),
)
@settings(max_examples=400, deadline=None)
def test_noise_never_raises(value, choices, finding, inverted):
    choice, status, layer = reading(
        value,
        choices,
        finding=finding,
        question=finding and f'Is there {finding}?',
        prompt=finding,
        inverted=inverted,
    )
    assert (choice in choices) == (status == 'ok') and (
        choice or status in ('empty', 'refused', 'ambiguous', 'unparsed')
    )


def test_surrogates_and_long_texts_are_survived():
    assert read_answer('\ud800 No.')[1] in ('ok', 'unparsed') and read_answer('no ' * 50_000)[
        0
    ] in ('no', '')
    assert (
        read_answer('[' * 5000)[0] == ''
        and read_answer('(' * 3000 + 'A' + ')' * 3000, ('A', 'B'))[1]
    )


def test_ten_thousand_answers_take_seconds():
    texts = [
        f'{r["answer"]} ({i})'
        for i, r in enumerate(
            itertools.islice(
                itertools.cycle(r for r in OWN if isinstance(r['answer'], str)), 10_000
            )
        )
    ]
    started = time.process_time()
    for text in texts:
        read_answer(text, **ABOUT)
    assert time.process_time() - started < 60  # some five seconds on a quiet core


def test_the_door_is_light():
    code = (
        "import sys, smsbench; assert not {'pandas', 'numpy', 'torch'} & set(sys.modules); "
        "assert smsbench.read_answer('No.') == ('no', 'ok') and 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, '-c', code], check=True)
    assert set(NO_SIDE) == {'ambiguous', 'refused', 'empty', 'other'}
