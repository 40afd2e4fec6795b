"""The same question in other words, and altered reports.

Planted models of known habits go through the whole audit.
"""

import contextlib, io, json, re
from pathlib import Path

import numpy as np, pandas as pd, pytest

from smsbench.core import array_hash, table_hash
from smsbench.testing.layouts import make_layout
from smsbench.data.phantom import phantom_cohort
from smsbench.audit.runner import Source
from smsbench.audit.paraphrases import STRATEGIES, paraphrases, understand
from smsbench.audit.run import AuditSettings, load_results, run_audit
from smsbench.vlm.model import Answer
from smsbench.testing.planted import PLANTED, planted

NEGATION = re.compile(r"\b(absent|free of|ruled out|wrong|no|not)\b")


class Wordy:
    """A planted model whose answer depends on its wording in a way known in advance.

    `rule` maps (question, log-odds of the model inside, picture) to log-odds of yes.
    """

    def __init__(self, name, rule, inside='planted:image-only'):
        self.name, self.rule, self.inside, self.info = name, rule, planted(inside), dict(id=name)

    def score(self, batch):
        out = []
        for x, a in zip(batch, self.inside.score(batch)):
            odds = self.rule(
                x.prompt.split('Question: ')[1].split('\n')[0],
                a.logprobs[0] - a.logprobs[1],
                x.image,
            )
            lp = np.log([1 / (1 + np.exp(-odds)), 1 / (1 + np.exp(odds))]) - 0.1
            out.append(
                Answer(
                    tuple([*lp, *[-20.0] * (len(x.choices) - 2)]),
                    float(np.exp(-0.1)),
                    a.pixel_sha,
                    a.token_sha,
                    a.delivered_sha,
                )
            )
        return out


def hears(question, odds, image):
    return -odds if NEGATION.search(question) else odds


def certainty(image):
    return 3 * int(array_hash(image)[:4], 16) / 65535  # 0..3, from the picture alone


def weak(question, odds, image):
    return hears(
        question,
        np.sign(odds) * certainty(image) - (1.5 if question.startswith('Any') else 0),
        image,
    )


MODELS = {
    'robust': lambda: Wordy('planted:robust', hears),
    'deaf': lambda: Wordy('planted:deaf', lambda q, o, i: o),
    'keyword': lambda: Wordy('planted:keyword', lambda q, o, i: 2.0 if 'there' in q else -2.0),
    'weak': lambda: Wordy('planted:weak', weak),
}


class Detector:
    """Says unmatched where film and report disagree, as far as the choices allow.

    Otherwise it says what the film shows.
    """

    name, info = 'planted:detector', dict(id='planted:detector')

    def score(self, batch):
        film, text = (
            planted('planted:image-only').score(batch),
            planted('planted:text-only').score(batch),
        )

        def one(x, a, b):
            apart = x.image is not None and (a.logprobs[0] > a.logprobs[1]) != (
                b.logprobs[0] > b.logprobs[1]
            )
            lp = [*a.logprobs[:2], *[-0.05 if apart else -9.0] * (len(x.choices) - 2)]
            return Answer(
                tuple(lp),
                min(1.0, float(np.exp(lp).sum())),
                a.pixel_sha,
                a.token_sha,
                a.delivered_sha,
            )

        return [one(x, a, b) for x, a, b in zip(batch, film, text)]


@pytest.fixture(autouse=True, scope='module')
def more_planted():
    PLANTED.update(MODELS, detector=Detector)
    yield
    for name in [*MODELS, 'detector']:
        PLANTED.pop(name)


@pytest.fixture(scope='module')
def cohort():
    return phantom_cohort(110, size=64, seed=6, findings=('effusion',))


def audited(out, cohort, models, **settings):
    with contextlib.redirect_stderr(io.StringIO()):
        return load_results(
            run_audit(
                out, cohort, models, settings=AuditSettings(n_boot=200, **settings), batch_size=64
            ).path
        )


@pytest.fixture(scope='module')
def results(cohort, tmp_path_factory):
    return audited(
        tmp_path_factory.mktemp('wordings') / 'run',
        cohort,
        [f'planted:{m}' for m in MODELS],
        arms=('identity',),
        paraphrases=12,
    )


def number(results, model, metric, subgroup='all', arm='original'):
    m = results.metrics
    return m[
        (m.model == f'planted:{model}')
        & (m.metric == metric)
        & (m.subgroup == subgroup)
        & (m.arm == arm)
    ].iloc[0]


def test_a_robust_model_never_flips(results):
    for subgroup in ('all', 'wordings=not negated', *(f'strategy={s}' for s in STRATEGIES)):
        got = number(results, 'robust', 'wording_flips', subgroup)
        assert (
            got.value == 0
            and got.ci_low == 0
            and 0 < got.ci_high < 0.1
            and got.n_clusters == results.plan.patient_id.nunique()
        )
    assert (
        number(results, 'robust', 'wording_consistency').value == 1
        and number(results, 'robust', 'wording_entropy').value == 0
        and number(results, 'robust', 'wording_margin_spread').value < 0.1
    )


def test_a_model_deaf_to_negation_is_found_by_negated_forms_alone(results):
    assert (
        number(results, 'deaf', 'wording_flips', 'strategy=negated').value == 1
        and number(results, 'deaf', 'wording_flips', 'wordings=not negated').value == 0
    )
    assert (
        number(results, 'deaf', 'accuracy').value
        > 0.9
        > 0.1
        > number(results, 'deaf', 'wording_accuracy', 'strategy=negated').value
    )  # the expected answer is inverted
    assert (
        number(results, 'deaf', 'accuracy', 'variant=negated-1').value < 0.1
        and number(results, 'deaf', 'margin', 'variant=negated-1').value < -2
    )
    assert (
        number(results, 'robust', 'accuracy', 'variant=negated-1').value
        == number(results, 'robust', 'accuracy').value
        and number(results, 'robust', 'margin', 'variant=negated-1').value > 2
    )


def test_a_keyword_flips_what_was_known_in_advance(results):
    plan = results.plan[(results.plan.arm == 'original') & (results.plan.strategy != '')]

    def says(q):
        return 'yes' if 'there' in q else 'no'

    own = says(plan[plan.variant == 'plain'].question.iloc[0])
    worded = plan[plan.variant != 'plain'].drop_duplicates('variant')
    flips = [
        (says(q) == own) == bool(turned) for q, turned in zip(worded.question, worded.inverted)
    ]
    assert 0 < sum(flips) < len(flips) and number(
        results, 'keyword', 'wording_flips'
    ).value == pytest.approx(np.mean(flips))
    for strategy, of in worded.assign(flips=flips).groupby('strategy'):
        assert number(
            results, 'keyword', 'wording_flips', f'strategy={strategy}'
        ).value == pytest.approx(of.flips.mean())


def test_a_prior_on_a_word_flips_the_uncertain_ones(results, cohort):
    source, plan = Source(cohort), results.plan
    first = plan[(plan.arm == 'original') & (plan.variant == 'plain')]
    own = (
        results.predictions[results.predictions.model == 'planted:weak']
        .set_index('trial_id')
        .answer[first.trial_id]
    )
    expected = np.mean(
        [a == 'yes' and certainty(source.image(i)) < 1.5 for a, i in zip(own, first.sample_id)]
    )  # shorthand pulls towards no
    any_ = plan[(plan.arm == 'original') & plan.question.str.startswith('Any')]
    assert set(any_.strategy) >= {'register'}
    share = (
        any_[any_.strategy == 'register'].variant.nunique()
        / plan[plan.strategy == 'register'].variant.nunique()
    )
    got = number(results, 'weak', 'wording_flips', 'strategy=register')
    assert (
        0.1 < expected < 0.5
        and got.value == pytest.approx(expected * share)
        and got.ci_low < got.value < got.ci_high
    )
    assert (
        number(results, 'weak', 'wording_flips', 'strategy=voice').value == 0
        and number(results, 'weak', 'wording_margin_spread').value
        > number(results, 'robust', 'wording_margin_spread').value
    )


def test_verdicts_do_not_move_when_questions_are_reworded_too(cohort, tmp_path):
    arms = ('image_swap', 'text_swap')
    bare, worded = (
        audited(tmp_path / str(n), cohort, ['planted:mixture:0.5'], arms=arms, paraphrases=n)
        for n in (0, 3)
    )
    assert json.dumps(bare.verdicts) == json.dumps(worded.verdicts) and set(
        bare.plan.trial_id
    ) < set(worded.plan.trial_id)

    def plain(r):
        return r.metrics[
            ~r.metrics.subgroup.str.startswith(('variant=', 'strategy=', 'wordings='))
            & ~r.metrics.metric.str.startswith(('wording', 'state_', 'consistent_'))
        ].reset_index(drop=True)

    pd.testing.assert_frame_equal(plain(bare), plain(worded))


def test_the_frozen_plan_says_what_is_asked_and_a_stopped_run_goes_on(cohort, tmp_path):
    a = audited(
        tmp_path / 'a',
        cohort,
        ['planted:robust'],
        arms=('identity',),
        paraphrases=5,
        probes=('foil', 'history'),
    )
    assert (a.plan.question != '').all() and a.plan.attrs['wordings']['ids'] == [
        'synonym-1',
        'phrasing-1',
        'register-1',
        'negated-1',
        'voice-1',
    ]
    parts = sorted((tmp_path / 'a' / 'predictions').glob('*.parquet'))
    parts[0].unlink()
    again = audited(
        tmp_path / 'a',
        cohort,
        ['planted:robust'],
        arms=('identity',),
        paraphrases=5,
        probes=('foil', 'history'),
    )
    assert table_hash(again.predictions.drop(columns='seconds')) == table_hash(
        a.predictions.drop(columns='seconds')
    ) and again.metrics.equals(a.metrics)
    with pytest.raises(ValueError, match='paraphrases'):
        audited(
            tmp_path / 'a',
            cohort,
            ['planted:robust'],
            arms=('identity',),
            paraphrases=4,
            probes=('foil', 'history'),
        )


def test_probes_tell_a_report_repeater_from_a_film_reader(cohort, tmp_path):
    r = audited(
        tmp_path / 'p',
        cohort,
        ['planted:text-only', 'planted:image-only', 'planted:detector'],
        arms=('image_swap', 'text_swap'),
        probes=('foil', 'removed', 'history', 'unmatched'),
    )

    def arm(model, metric, arm, subgroup='all'):
        return number(r, model, metric, subgroup, arm)

    assert (
        arm('text-only', 'flips', 'foil').value == 1
        and arm('text-only', 'excess_flips', 'foil').value == 1
        and arm('text-only', 'text_following', 'foil').value == 1
    )
    assert (
        arm('image-only', 'flips', 'foil').value
        == arm('image-only', 'flips', 'removed').value
        == arm('image-only', 'flips', 'history').value
        == 0
    )
    assert (
        arm('text-only', 'flips', 'foil_other').value
        == arm('text-only', 'flips', 'removed_other').value
        == arm('text-only', 'flips', 'history_same').value
        == 0
    )
    assert (
        0.2 < arm('text-only', 'flips', 'removed').value < 0.8
    )  # without the statement it says no

    def seen(a, metric='unmatched_share'):
        return arm('detector', metric, a, 'variant=unmatched')

    assert (
        seen('image_swap').value == seen('text_swap').value == seen('foil').value == 1
        and seen('original').value == seen('image_swap_same').value == seen('foil_other').value == 0
    )
    assert (
        seen('foil', 'unmatched_excess').ci_low > 0.8
        and seen('image_swap', 'unmatched_auroc').value == 1
        and arm('image-only', 'unmatched_share', 'image_swap', 'variant=unmatched').value == 0
    )
    assert {v['verdict'] for m in r.delivery.values() for v in m.values()} == {'ok'}
    reasons = r.exclusions['plan']
    assert reasons.empty or set(reasons.arm) <= {'foil', 'foil_other', 'removed', 'removed_other'}


def test_wordings_that_a_card_brings_as_rows(cli, tmp_path):
    root = make_layout('vqa_paraphrases', tmp_path / 'data')
    (tmp_path / 'open.yaml').write_text(
        (Path(__file__).parent.parent / 'data_manifests' / 'vqa_paraphrases.yaml')
        .read_text()
        .replace('access: credentialed', 'access: open')
    )
    code, out, err = cli(
        'audit',
        '--manifest',
        'open.yaml',
        '--root',
        root,
        '--arms',
        'image_only',
        '--paraphrases',
        'cohort',
        '--model',
        'planted:constant',
        '--n-boot',
        '100',
        '--out',
        'run',
    )
    assert (
        code == 0
        and '5 samples' in err
        and 'In other words' in (tmp_path / 'run' / 'report.html').read_text()
    ), err  # films without reports: the film alone is the baseline
    plan = load_results(tmp_path / 'run').plan
    assert (
        {'plain', 'synonym-1', 'synonym-2', 'word-order-1'} >= set(plan.variant)
        and set(plan.strategy) == {'original', 'synonym', 'word-order'}
        and plan.question_id[plan.variant != 'plain'].ne('').all()
    )
    assert not set(plan.question_id[plan.variant != 'plain']) & set(plan.sample_id)


def test_words_of_credentialed_rows_are_asked_and_not_written_down(tmp_path):
    films = phantom_cohort(40, size=64, seed=3).drop_duplicates('patient_id')
    secret = films.assign(question='Does this film show pleural effusion?')
    secret.attrs = films.attrs | dict(access='credentialed')
    r = audited(tmp_path / 'run', secret, ['planted:deaf'], arms=('identity',), paraphrases=4)
    assert (
        (r.plan.question == '').all()
        and 'this film' not in ''.join(map(str, r.plan.to_numpy().ravel()))
        and number(r, 'deaf', 'wording_flips', 'strategy=negated').value == 1
    )
    from smsbench.report.audit_page import wording_section, wording_table

    assert 'this film' not in str(wording_section(r)) and not str(wording_table(r))


def test_every_question_of_vqa_rad_is_reworded_soundly(real_data):
    table = pd.read_csv(real_data / 'vqa_rad' / 'metadata.csv', dtype=str, keep_default_na=False)
    questions, taken = sorted(set(table.question[table.yesno != ''])), 0
    for q in questions:
        made, asked = paraphrases(q), understand(q)
        taken += bool(asked.kind)
        assert len({v.text.lower() for v in made}) == len(made)
        for v in made[1:]:
            assert (
                v.text.endswith('?')
                and not re.search(
                    r'  |\{|\}|\?\?|\b(the the|a an|an a)\b(?! the)', v.text.replace(q, '')
                )
                or asked.kind == ''
            ), v
            if asked.kind == 'exists' and v.strategy not in ('synonym', 'combined', 'negated'):
                assert re.sub('^(an?|any|some) ', '', asked.thing).lower() in v.text.lower(), (q, v)
            if asked.kind:
                assert bool(NEGATION.search(v.text)) == v.inverted, (q, v)
    assert taken > 0.5 * len(questions), (taken, len(questions))


def test_command_line_end_to_end(cli, tmp_path):
    from smsbench.privacy import read_table, write_table

    write_table(phantom_cohort(60, size=64, seed=3), tmp_path / 'c.parquet', 'cohort')
    code, out, err = cli(
        'audit',
        '--cohort',
        'c.parquet',
        '--model',
        'planted:image-only',
        '--model',
        'planted:text-only',
        '--arms',
        'image_swap,text_swap',
        '--paraphrases',
        '4',
        '--probes',
        'foil,unmatched',
        '--n-boot',
        '200',
        '--out',
        'run',
    )
    assert code == 0 and 'planted:image-only: image relies' in out, err
    page = (tmp_path / 'run' / 'report.html').read_text()
    assert 'object at 0x' not in page and 'right in every wording' in page
    assert (
        'In other words' in page
        and 'Altered reports' in page
        and 'Is pleural effusion absent?' in page
        and '--paraphrases 4' in page
        and '--probes foil,unmatched' in page
    )
    assert {'wordings.png', 'wording_answers.png', 'probes.png'} <= {
        p.name for p in (tmp_path / 'run' / 'figures').iterdir()
    }
    metrics = (
        read_table(tmp_path / 'run' / 'metrics.parquet', 'metrics')
        .set_index(['model', 'metric', 'arm', 'subgroup'])
        .value
    )
    assert (
        metrics['planted:image-only', 'wording_flips', 'original', 'strategy=negated'] == 1
        and metrics['planted:image-only', 'wording_flips', 'original', 'wordings=not negated'] == 0
    )  # planted models hear no negation
    code, out, err = cli(
        'audit',
        '--cohort',
        'c.parquet',
        '--model',
        'planted:image-only',
        '--arms',
        'original',
        '--n-boot',
        '200',
        '--out',
        'bare',
    )
    assert code == 0 and 'In other words' not in (tmp_path / 'bare' / 'report.html').read_text(), (
        err
    )
    pd.DataFrame(
        dict(
            question='Is there pleural effusion?',
            question_variant=[
                'Is there pleural effusion?',
                'Wet chest: effusion?',
                'Dry chest, without effusion?',
            ],
            variant_index=list('012'),
            strategy=['original', 'slang', 'slang'],
            answer=['yes', 'yes', 'no'],
        )
    ).to_csv(tmp_path / 'mine.csv', index=False)
    code, out, err = cli(
        'plan', 'c.parquet', '--arms', 'original', '--paraphrases', 'mine.csv', '--out', 'p.parquet'
    )
    own = read_table(tmp_path / 'p.parquet', 'plan')
    assert (
        code == 0
        and set(own.variant) == {'plain', 'slang-1', 'slang-2'}
        and own.inverted[own.variant == 'slang-2'].all()
    ), err
    assert cli('trials', 'p.parquet', '--cohort', 'c.parquet', '--out', 't.jsonl')[0] == 0
    assert (
        sum(
            'Wet chest' in json.loads(l)['prompt']
            for l in (tmp_path / 't.jsonl').read_text().splitlines()
        )
        == (own.variant == 'slang-1').sum()
    )
    for args, word in (
        (('--paraphrases', 'lots'), '--paraphrases'),
        (('--probes', 'foils'), 'unknown probe'),
        (('--paraphrases', 'none.csv'), 'no such file'),
    ):
        code, out, err = cli(
            'audit', '--cohort', 'c.parquet', '--model', 'planted:image-only', '--out', 'bad', *args
        )
        assert code == 2 and word in err and 'Traceback' not in err, err
