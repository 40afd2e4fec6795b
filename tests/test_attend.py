"""Comparison of the attention of two models.

Every family, a run that is killed, wrong input, and the truth with which the reference models were
built.
"""

import json, multiprocessing, os, signal, time

import numpy as np, pandas as pd, pytest

from smsbench.core import InputError, table_hash
from smsbench.data.phantom import phantom_cohort
from smsbench.report.attention_page import localises
from smsbench.attention.run import AttendSettings, attend, load_attention
from smsbench.attention.metrics import RANDOM
from smsbench.testing.tiny import TINY, tiny_checkpoint
from smsbench.privacy import read_table, write_table

READER, FOLLOWER = 'reference-image-reader', 'reference-blind-follower'


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
    "Family -> folder of its tiny checkpoint, made when first asked for."
    made, home = {}, tmp_path_factory.mktemp('tiny')

    def get(family):
        if family not in made:
            tiny_checkpoint(family, home / family)
            made[family] = home / family
        return made[family]

    return get


def refused(result, *words, code=2):
    got, out, err = result
    lines = [l for l in err.splitlines() if l.startswith('smsbench:')]
    assert (
        got == code
        and len(lines) == 1
        and all(w in lines[0] for w in words)
        and 'Traceback' not in err
    ), (got, out, err)


@pytest.mark.parametrize('family', TINY)
def test_every_family(family, folders, tmp_path):
    """Answers of the audit, rows that are a distribution, maps on the film, shares that add to 1.

    Three films, all arms, and the baseline.
    """
    films = phantom_cohort(3, size=96, findings=['effusion'], prevalence=1.0, seed=2)
    films['label'] = ['yes', 'no', 'yes']  # so that there are donors; no truth is asked here
    results = load_attention(
        attend(
            films,
            [str(folders(family))],
            tmp_path / 'run',
            settings=AttendSettings(n_boot=100, minimum=2),
            device='cpu',
        ).path
    )
    p, looks = results.predictions, results.looks
    assert (
        (p.parse_status == 'ok').all() and set(p.model) == {family} and len(p) == len(results.plan)
    )
    assert all(v['verdict'] == 'ok' for v in results.delivery[family].values()), results.delivery
    from smsbench.audit.runner import Source
    from smsbench.vlm.model import load_model

    model, source = load_model(folders(family), device='cpu'), Source(films)
    for t in list(results.plan.itertuples(index=False))[:2]:
        plain, kept = model.score([source.inputs(t)])[0], p.set_index('trial_id').loc[t.trial_id]
        assert np.allclose(kept.logprobs, plain.logprobs, atol=1e-3) and (
            kept.pixel_sha,
            kept.token_sha,
            kept.delivered_sha,
        ) == (plain.pixel_sha, plain.token_sha, plain.delivered_sha)
        rows = results.store.rows(family, t.trial_id)
        assert np.allclose(rows.weights.sum(-1), 1, atol=5e-3) and rows.layout.shape == (96, 96)
    shares = (
        looks[[c for c in looks if c.startswith('share_') and c != 'share_beside']]
        .fillna(0)
        .sum(axis=1)
    )
    assert (
        np.allclose(shares, 1, atol=5e-3)
        and looks.pixel_auroc.notna().any()
        and looks.pixel_auroc_random.notna().any()
    )
    assert {'share_image', 'mass_over_uniform', 'mass_over_random', 'accuracy'} <= set(
        results.metrics.metric
    )


def test_the_whole_verb(folders, cli, here, tmp_path):
    write_table(phantom_cohort(14, findings=['effusion'], seed=3), tmp_path / 'c.parquet', 'cohort')
    args = [
        'attend',
        '--model',
        READER,
        '--model',
        folders('qwen2_vl'),
        '--cohort',
        'c.parquet',
        '--out',
        'run',
        '--n-boot',
        '200',
        '--limit',
        '10',
        '--arms',
        'original,text_swap',
        '--queries',
        'answer',
        '--methods',
        'gradient',
        '--paraphrases',
        '1',
        '--json',
    ]
    code, out, err = cli(*args)
    assert code == 0, err
    said = json.loads(out)
    assert (
        set(said['models']) == {READER, 'qwen2_vl'}
        and 'of its attention falls on the film' in said['models'][READER][0]
    )
    page = (tmp_path / 'run/report.html').read_text()
    assert (
        page.count('<img') >= 6
        and 'Does the map lie on the finding?' in page
        and str(tmp_path) not in page
    )
    results = load_attention(tmp_path / 'run')
    assert (
        set(results.looks.method) == {'raw', 'gradient'}
        and results.plan.variant.nunique() == 2
        and {'maps_1.png', 'shares.png', 'profile.png', 'change.png'}
        <= {f.name for f in (tmp_path / 'run/figures').iterdir()}
    )
    assert {
        'wording_flips',
        'wording_consistency',
        'wording_entropy',
        'wording_margin_spread',
        'map_change',
    } <= set(results.metrics.metric) and results.metrics.subgroup.str.startswith(
        'wording, strategy='
    ).any()
    pairs = results.metrics[(results.metrics.metric == 'js') & (results.metrics.subgroup == 'all')]
    assert (pairs.n == results.plan.sample_id.nunique()).all()  # rewordings are no further films
    code, again, err = here(*args)  # finished: nothing is loaded, nothing changes
    assert (
        code == 0
        and json.loads(again)['metrics'] == said['metrics']
        and 'Loading weights' not in err
    )
    refused(here(*args[:-1], '--heads', 'max'), 'another heads')


def test_wrong_input(folders, here, tmp_path):
    films = phantom_cohort(8, findings=['effusion'], seed=3)
    write_table(films, tmp_path / 'c.parquet', 'cohort')
    blind = films.assign(image='')
    blind.attrs = films.attrs
    write_table(blind, tmp_path / 'blind.parquet', 'cohort')

    def go(*more, cohort='c.parquet', model=READER):
        return here(
            'attend', '--model', model, '--cohort', cohort, '--out', 'run', '--n-boot', '100', *more
        )

    refused(go(cohort='blind.parquet'), 'no sample of this cohort has an image')
    refused(go('--layers', '7'), 'no layer 7', '0 to 2')
    refused(go('--heads', '9', cohort='c.parquet'), 'heads')
    refused(go('--arms', 'text_only'), 'text_only', 'nothing to map')
    refused(go('--methods', 'gradcam'), 'gradcam', 'rollout')
    refused(go('--keep', 'all'), 'rows or pooled')
    refused(go(model='planted:image-only'), 'planted', 'no attention')
    refused(go(cohort='none.parquet'), 'none.parquet')
    refused(here('attend', '--model', READER, '--out', 'run'), 'one way')
    (tmp_path / 'r.csv').write_text('film,x0,y0,x1,y1\na,1,2,3,4\n')
    refused(go('--regions', 'r.csv'), 'sample_id or image')
    (tmp_path / 'r.csv').write_text(
        f'sample_id,x0,y0,x1,y1\n{films.sample_id[0]},900,900,950,950\n'
    )
    refused(go('--regions', 'r.csv'), 'regions, row 1', 'no pixel')
    refused(
        go('--methods', 'composed', '--model', folders('qwen2_vl')), 'qwen2_vl', 'vision tower'
    )  # said before the first model is asked
    assert not (
        tmp_path / 'run' / 'config.json'
    ).exists()  # so the corrected command may use the same folder


def test_a_map_without_weight_on_the_film_is_told_not_fatal(here, tmp_path):
    "The gradient of the last layer is zero for every word but the answer."
    write_table(phantom_cohort(12, findings=['effusion'], seed=3), tmp_path / 'c.parquet', 'cohort')
    code, out, err = here(
        'attend',
        '--model',
        READER,
        '--cohort',
        'c.parquet',
        '--out',
        'run',
        '--arms',
        'original',
        '--queries',
        'asked,answer,asked',
        '--methods',
        'gradient',
        '--layers',
        '2',
        '--n-boot',
        '100',
        '--no-baseline',
    )
    assert code == 0, err
    results = load_attention(tmp_path / 'run')
    looks = results.looks
    assert (
        len(looks) == 12 * 2 * 2
        and looks['empty'].sum() == 12
        and set(looks[looks['empty']]['query']) == {'asked'}
        and looks[looks['empty']].focus.isna().all()
    )  # a query named twice counts once
    assert (
        number(results, READER, 'empty', subgroup='method=gradient').value == 1
        and (tmp_path / 'run' / 'report.html').exists()
    )


def test_a_word_that_is_not_in_the_prompt_fails_the_run(here, tmp_path):
    write_table(phantom_cohort(8, findings=['effusion'], seed=3), tmp_path / 'c.parquet', 'cohort')
    refused(
        here(
            'attend',
            '--model',
            READER,
            '--cohort',
            'c.parquet',
            '--out',
            'words',
            '--queries',
            'kidney',
            '--n-boot',
            '100',
        ),
        'trials failed',
        "'kidney' is not a word",
        code=1,
    )
    assert (
        read_table(next((tmp_path / 'words/predictions').glob('*.parquet'))).parse_status == 'error'
    ).all()  # what failed is a row


ONCE = AttendSettings(
    arms=('original', 'text_swap'), queries=('answer',), n_boot=100, part_size=4, baseline=False
)


def work(folder, ready):
    from smsbench.attention import store as map_store

    looked = map_store.look_at

    def slow(*a):
        time.sleep(0.05)
        ready.set()
        return looked(*a)  # from the first trial on a kill hits the work itself

    map_store.look_at = slow
    cohort = phantom_cohort(12, findings=['effusion'], seed=4)
    try:
        attend(cohort, [READER], folder, settings=ONCE, device='cpu')
    finally:
        ready.set()  # nothing was left to look at


def test_a_run_that_is_killed_ends_the_same(tmp_path):
    whole = attend(
        phantom_cohort(12, findings=['effusion'], seed=4),
        [READER],
        tmp_path / 'whole',
        settings=ONCE,
        device='cpu',
    )

    def content(path):
        return (
            table_hash(load_attention(path).predictions.drop(columns='seconds')),
            table_hash(load_attention(path).looks.round(9)),
            table_hash(load_attention(path).metrics.round(9)),
        )

    context, rng = multiprocessing.get_context('spawn'), np.random.default_rng(5)
    for pause in rng.uniform(0.05, 1.0, 2):
        ready = context.Event()
        p = context.Process(target=work, args=(str(tmp_path / 'often'), ready))
        p.start()
        assert ready.wait(120)
        p.join(pause)
        if p.exitcode is None:
            os.kill(p.pid, signal.SIGKILL)
        p.join()
        for f in (tmp_path / 'often/predictions').glob('part-*.parquet'):  # what is there is whole
            assert (
                len(read_table(f, 'predictions'))
                and (tmp_path / 'often/maps' / f.with_suffix('.npz').name).exists()
            )
    attend(
        phantom_cohort(12, findings=['effusion'], seed=4),
        [READER],
        tmp_path / 'often',
        settings=ONCE,
        device='cpu',
    )
    assert content(tmp_path / 'often') == content(whole.path)
    sorted((tmp_path / 'often/maps').iterdir())[0].unlink()  # the comparison can fail
    with pytest.raises(InputError, match='gone|no such'):
        [
            load_attention(tmp_path / 'often').store.rows(READER, t)
            for t in load_attention(tmp_path / 'often').plan.trial_id
        ]


@pytest.fixture(scope='module')
def truth(tmp_path_factory):
    "The two reference models on films with known findings; neither was trained on them."
    films = phantom_cohort(60, findings=('effusion', 'opacity', 'cardiomegaly'), seed=21)
    run = attend(
        films,
        [READER, FOLLOWER],
        tmp_path_factory.mktemp('truth') / 'run',
        settings=AttendSettings(
            arms=('original', 'text_swap'),
            queries=('answer',),
            methods=('raw', 'gradient'),
            limit=110,
            n_boot=1000,
        ),
        device='cpu',
    )
    return load_attention(run.path)


def number(results, model, metric, arm='original', subgroup='all'):
    m = results.metrics
    return m[
        (m.model == model) & (m.metric == metric) & (m.arm == arm) & (m.subgroup == subgroup)
    ].iloc[0]


@pytest.mark.parametrize('subgroup', ['all', 'method=gradient'])
@pytest.mark.parametrize('measure', ['mass', 'pointing'])
def test_the_one_that_looks_localises_and_the_one_that_repeats_does_not(truth, subgroup, measure):
    assert localises(truth.metrics, READER, subgroup=subgroup, measure=measure) == 'yes'
    assert localises(truth.metrics, FOLLOWER, subgroup=subgroup, measure=measure) == 'no'
    assert (
        number(truth, READER, f'{measure}_over_random', subgroup=subgroup).ci_low > 0
    )  # nor is it the grid, or the order of tokens
    assert number(truth, FOLLOWER, f'{measure}_over_centre', subgroup=subgroup).ci_high < 0


def test_layer_and_head_chosen_on_other_films(truth):
    reader, follower = (
        number(truth, m, 'pixel_auroc_chosen_over_centre') for m in (READER, FOLLOWER)
    )
    assert (
        reader.ci_low > 0 > follower.ci_high
        and number(truth, READER, 'pixel_auroc_chosen').ci_low > 0.85
    )
    chosen = truth.looks[(truth.looks.model == READER) & truth.looks.chosen_head.notna()]
    assert len(chosen) > 30


def test_shares_tell_who_looks(truth):
    d = number(truth, f'{FOLLOWER} − {READER}', 'share_image_difference')
    assert (
        d.ci_high < -0.1
        and 'p (Holm)' in d.note
        and number(truth, READER, 'share_image').ci_low
        > 0.3
        > number(truth, FOLLOWER, 'share_image').ci_high
    )
    assert (
        number(truth, READER, 'accuracy').value > 0.95
        and number(truth, f'{FOLLOWER} × {READER}', 'agreement', 'text_swap').value < 0.5
    )
    assert (
        number(truth, FOLLOWER, 'flips_same_film', 'text_swap').value > 0.9
        and number(truth, READER, 'flips_same_film', 'text_swap').value < 0.1
    )
    assert not any(m.endswith(RANDOM) for m in truth.metrics.model)


def test_the_assertion_can_fail(truth):
    "The maps of one film laid on the region of another localise no better than chance."
    looks = truth.looks[
        (truth.looks.model == READER)
        & (truth.looks.arm == 'original')
        & (truth.looks.method == 'raw')
        & truth.looks.region.notna()
    ]
    from smsbench.audit.runner import Source
    from smsbench.attention.store import kept_map
    from smsbench.attention.tables import Regions, map_line

    regions, store, one = (
        Regions(Source(truth.cohort)),
        truth.store,
        looks[looks.finding == 'effusion'],
    )
    here, there = one.trial_id.tolist(), one.sample_id.tolist()[1:] + one.sample_id.tolist()[:1]
    side = dict(zip(truth.cohort.sample_id, truth.cohort.side))
    apart = [
        (t, s) for t, s, own in zip(here, there, one.sample_id) if side[s] != side[own]
    ]  # the finding lies on the other side
    mass = [
        map_line(kept_map(store.rows(READER, t)), regions(s, (64, 64)))['mass'] for t, s in apart
    ]
    assert len(mass) >= 5 and np.mean(mass) < one.mass.mean() / 2


def test_credentialed_films_stay_home(tmp_path):
    films = phantom_cohort(30, findings=['effusion'], seed=5)
    films = films.assign(
        text='SECRET note. ' + films.text,
        sample_id='SECRET' + films.sample_id,
        patient_id='SECRET' + films.patient_id,
    )
    films.attrs = {**phantom_cohort(1, findings=['effusion']).attrs, 'access': 'credentialed'}
    from smsbench.report.html import render

    run = attend(
        films,
        [READER],
        tmp_path / 'run',
        settings=AttendSettings(arms=('original', 'text_swap'), queries=('answer',), n_boot=100),
        device='cpu',
    )
    page = render(
        'attention_compare', run.path, dict(out=str(run.path), report_only=True)
    ).read_text(encoding='utf-8')
    assert (
        'SECRET' not in page
        and 'no picture of a patient is shown' in page
        and not [
            f for f in (run.path / 'figures').iterdir() if f.name.startswith(('maps_', 'change'))
        ]
    )
    assert not any(b'SECRET' in f.read_bytes() for f in run.path.rglob('*') if f.is_file())
    from smsbench.report.explorer import explore

    with pytest.raises(InputError, match='credentialed'):
        explore(run.path)


def test_boxes_of_radiologists(real_data, tmp_path):
    """NIH films have boxes and no reports: results of the models, compared with chance.

    The models were trained on drawn films, so no verdict is asked.
    """
    from smsbench.data.cohort import build_all

    cohort = build_all('nih_cxr', real_data / 'nih_cxr', check_images=False).cohort
    boxed = cohort[cohort.boxes.str.len() > 2]
    others = (
        cohort[
            (cohort.boxes.str.len() <= 2)
            & cohort.finding.isin(set(boxed.finding))
            & (cohort.label == 'no')
        ]
        .groupby('finding')
        .head(8)
    )
    some = pd.concat([boxed, others], ignore_index=True)
    some.attrs = cohort.attrs
    results = load_attention(
        attend(
            some,
            [READER, FOLLOWER],
            tmp_path / 'run',
            settings=AttendSettings(queries=('answer',), n_boot=300),
            device='cpu',
        ).path
    )
    own = results.looks[(results.looks.arm == 'image_only') & results.looks.region.notna()]
    assert (
        set(results.plan.arm) == {'image_only', 'image_only_swap'}
        and len(own) >= 2 * 20
        and own.pixel_auroc_random.notna().all()
    )
    for m in (READER, FOLLOWER):
        assert (
            abs(number(results, m, 'mass_uniform', 'image_only').value - own.region.mean()) < 0.02
        )
        print(
            m,
            localises(results.metrics, m, 'image_only'),
            {
                k: round(number(results, m, k, 'image_only').value, 3)
                for k in (
                    'mass',
                    'mass_uniform',
                    'mass_centre',
                    'mass_random',
                    'pixel_auroc',
                    'pixel_auroc_centre',
                    'pointing',
                    'share_image',
                )
            },
        )


def test_masks_of_radiologists(real_data, tmp_path):
    "COVID films: masks of opacities as a table of regions of one's own."
    from smsbench.data.cohort import build_all

    root = real_data / 'covid_notes'
    cohort = build_all('covid_notes', root, check_images=False).cohort
    masks = pd.read_csv(root / 'masks.csv', dtype=str)
    masks = masks[
        masks.structure.isin(['ground_glass_opacities', 'consolidation'])
        & (masks.aspect_ok == 'True')
    ]
    table = masks.rename(columns=dict(id='sample_id'))[['sample_id', 'mask']]  # as the card says
    some = cohort[cohort.sample_id.isin(set(table.sample_id))]
    rest = cohort[~cohort.sample_id.isin(set(table.sample_id))].head(30)
    films = pd.concat([some, rest], ignore_index=True)
    films.attrs = cohort.attrs
    results = load_attention(
        attend(
            films,
            [READER],
            tmp_path / 'run',
            settings=AttendSettings(arms=('original',), queries=('answer',), n_boot=300, minimum=5),
            regions=table,
            device='cpu',
        ).path
    )
    own = results.looks[results.looks.region.notna()]
    assert (
        len(own) >= 5
        and own.region.between(0.005, 0.8).all()
        and own.mass.between(0, 1).all()
        and (results.path / 'regions.parquet').exists()
    )
    print(
        {
            k: round(number(results, READER, k).value, 3)
            for k in (
                'mass',
                'mass_uniform',
                'mass_centre',
                'mass_random',
                'pixel_auroc',
                'pixel_auroc_centre',
                'pointing',
                'share_image',
            )
        },
        len(own),
    )
