"""The published result files.

Every printed number is reproduced, the known faults are found, the table meets its schema.
"""

import json, os, re
from pathlib import Path

import numpy as np, pandas as pd, pytest

from smsbench import Bootstrap
from smsbench.core import read_json
from smsbench.report.published_figures import published_dots, published_heatmap, side_by_side
from smsbench.published.faults import void_arms
from smsbench.published.reanalysis import as_published, findings, reanalyse
from smsbench.published.files import ARMS, read_results
from smsbench.privacy import read_table, write_table

DATA = Path(os.environ.get('SMSBENCH_DATA', '')) / 'published_sms'
pytestmark = pytest.mark.skipif(
    not os.environ.get('SMSBENCH_DATA') or not DATA.is_dir(),
    reason='SMSBENCH_DATA does not name a folder that holds published_sms',
)
VOID_CODES = {
    'identical_to_baseline',
    'baseline_of_another_sample',
    'constant_output',
    'identical_to_other_arm',
}


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp('published')
    table, faults = reanalyse(DATA / 'results', 'medeval', out, boot=Bootstrap(500))
    return table, faults, out


@pytest.fixture(scope='module')
def numbers():
    (printed,) = json.loads((DATA / 'published_numbers.json').read_text()).values()
    return printed


def figure(table, model, arm, metric, tokens=''):
    return table.set_index(['dataset', 'model', 'arm', 'metric', 'tokens']).as_published.loc[
        'medeval', model, arm, metric, tokens
    ]


def agrees(got, printed, digits):
    return np.isnan(got) if printed is None else f'{got:.{digits}f}' == f'{printed:.{digits}f}'


def test_generated_text_to_four_digits(run, numbers):
    wrong = [
        (m, a, k, v, figure(run[0], m, a, k))
        for m, arms in numbers['generated_text'].items()
        for a, figures in arms.items()
        for k, v in figures.items()
        if k != 'n_scored' and figures['n_scored'] and not agrees(figure(run[0], m, a, k), v, 4)
    ]
    assert wrong == [] and len(numbers['generated_text']) == 8


def test_number_of_scored_answers(numbers):
    rows = read_results(DATA / 'results', 'medeval')
    scored = {
        m: as_published(g).query("metric == 'accuracy'").set_index('arm').n_published
        for m, g in rows[rows.dataset == 'medeval'].groupby('model')
    }
    assert all(
        scored[m][a] == v['n_scored']
        for m, arms in numbers['generated_text'].items()
        for a, v in arms.items()
    )


def test_negative_flips_of_generated_text_to_six_digits(run, numbers):
    assert all(
        agrees(figure(run[0], m, a, 'nfr'), v, 6)
        for m, arms in numbers['nfr_generated_text'].items()
        for a, v in arms.items()
    )


def test_first_token_heat_map_shows_lower_case(run, numbers):
    printed = {
        (m, a): v
        for m, arms in numbers['nfr_first_token_heatmap_png_transcribed'].items()
        for a, v in arms.items()
    }
    fits = {
        t: sum(
            agrees(figure(run[0], m, a, 'first_token_nfr', t), v, 2)
            for (m, a), v in printed.items()
        )
        for t in ('lower', 'upper')
    }
    assert fits['lower'] == len(printed) == 24 and fits['upper'] < 18, fits


def test_known_faults(run):
    faults = run[1]
    where = {
        c: {(f['model'], f['arm']) for f in faults if f['code'] == c and f['dataset'] == 'medeval'}
        for c in {f['code'] for f in faults}
    }
    models = set(run[0][run[0].dataset == 'medeval'].model)
    assert len(models) == 8 and where['identical_to_baseline'] == {
        (m, 'Image') for m in models
    }  # the image shift is a no-op
    assert where['baseline_of_another_sample'] == {
        (m, 'Text') for m in models
    }  # the text shift swaps both
    assert where['constant_output'] == {
        ('janus_pro_7b', 'Only_image')
    }  # a prompt without an image placeholder
    assert all(f['rows'] == f['checked'] == 2000 for f in faults if f['code'] in VOID_CODES)
    assert where['missing_arm'] == {('janus_pro_7b', 'Only_text'), ('paligemma2_10b', 'Only_text')}
    assert {m for m, _ in where['unequal_samples']} == {
        'biomedgpt',
        'llava_med_llava_v1',
        'llama3_10b',
        'paligemma2_10b',
    }  # fewer than 2000 scored
    assert {('llama3_10b', 'No'), ('llava_med_llava_v1', 'No')} <= where['unparsed_recoverable']
    assert {m for m, _ in where['ties']} == models and ('biomedgpt', 'Only_image') in where[
        'undefined_precision'
    ]
    assert where['logits_not_probabilities'] == {(m, '') for m in models}


def test_fault_records(run):
    assert read_json(run[2] / 'faults.json') == run[1]
    assert all(
        set(f) == {'model', 'dataset', 'arm', 'code', 'rows', 'checked', 'evidence'}
        and f['evidence'].endswith('.')
        and 0 <= f['rows'] <= f['checked']
        for f in run[1]
    )


def test_a_table_of_an_earlier_version_gets_its_states_from_the_notes(run, tmp_path):
    table = read_table(run[2] / 'published.parquet', 'published')
    write_table(table.drop(columns='state'), tmp_path / 'old.parquet')
    old = read_table(tmp_path / 'old.parquet', 'published')
    assert old.state.tolist() == table.state.tolist() and 'void' in set(old.state)


def test_table_meets_its_schema(run):
    table = read_table(run[2] / 'published.parquet', 'published')
    assert list(
        table.columns
    ) == 'model dataset arm metric tokens as_published recomputed ci_low ci_high n note'.split() + [
        'state'
    ]
    assert (
        set(table.dataset) == {'medeval', 'medeval_unmatched'}
        and set(table.arm) == set(ARMS)
        and set(table.tokens) == {'', 'lower', 'upper'}
    )
    first = {
        f'first_token_{m}' for m in ('accuracy', 'precision', 'recall', 'specificity', 'ece', 'nfr')
    }
    assert (
        set(table.metric) == first | {'accuracy', 'precision', 'recall', 'specificity', 'nfr'}
        and set(table[table.tokens != ''].metric) == first
    )
    assert not table.duplicated(['model', 'dataset', 'arm', 'metric', 'tokens']).any()
    shown = table[table.recomputed.notna()]
    assert (
        (shown.ci_low <= shown.recomputed) & (shown.recomputed <= shown.ci_high)
    ).mean() > 0.99 and shown.recomputed.between(0, 1).all()


def test_void_arms_have_no_recomputed_figure(run):
    table, faults, _ = run
    void = void_arms(faults)
    is_void = pd.Series(list(zip(table.model, table.dataset, table.arm))).isin(list(void))
    assert (
        len(void) == 13 + 13 + 2
        and table[is_void.to_numpy()].recomputed.isna().all()
        and table[is_void.to_numpy()].note.str.startswith('void').all()
    )
    assert (table[is_void.to_numpy() & (table.metric == 'accuracy')].as_published > 0).all()


def accuracy_of(table, model, arm, dataset='medeval'):
    (row,) = table[
        (table.metric == 'accuracy')
        & (table.model == model)
        & (table.arm == arm)
        & (table.dataset == dataset)
    ].itertuples()
    return row


def test_a_figure_is_recomputed_as_the_quantity_that_was_published(run):
    table = run[0]
    llama = accuracy_of(table, 'llama3_10b', 'No')  # 251 answers like '**Answer:** yes' come back
    assert f'{llama.as_published:.4f}' == '0.6609' and f'{llama.recomputed:.4f}' == '0.6445'
    assert llama.n == 2000 and 'published on 1749' in llama.note
    few = accuracy_of(table, 'biomedgpt', 'Only_text')  # another quantity stands in the note alone
    assert f'{few.as_published:.4f}' == f'{few.recomputed:.4f}' == '0.6047' and few.n == 129
    assert few.note.startswith(
        'on 129 of 2,000 answers that say yes or no; with the others counted as not right it would'
        ' be 0.0390'
    )
    assert (
        few.ci_low < few.recomputed < few.ci_high and few.ci_high - few.ci_low > 0.1
    )  # 129 answers, not 2,000
    silent = accuracy_of(table, 'qwen2_vl_7b', 'Only_image', 'medeval_unmatched')
    assert (
        np.isnan(silent.recomputed)
        and silent.n == 0
        and silent.note == 'none of 2,000 answers says yes or no'
    )


def test_every_sample_counts_in_every_arm_and_n_counts_answers(run):
    t = run[0][(run[0].metric == 'accuracy') & run[0].recomputed.notna()]
    whole = (
        t.note.str.extract(r'^on [\d,]+ of ([\d,]+) answers')[0].str.replace(',', '').astype(float)
    )
    assert (
        (t.n[whole.isna()] == 2000).all()
        and (whole.dropna() == 2000).all()
        and (t.n[whole.notna()] < 2000).all()
    )
    absent = run[0][run[0].note == 'arm not in the file']
    assert set(absent.arm) == {'Only_text'} and (absent.n == 0).all()


def test_sentences_name_the_quantity_and_call_nothing_corrected(run):
    told = findings(run[0], run[1])
    assert (
        'Accuracies that rest on fewer than half of the answers: biomedgpt, medeval, Only_text:'
        ' 0.6047 on 129 of 2,000.' in told
    )
    assert told[-1].startswith(
        'The accuracy that changes most when it is recomputed is llama3_10b, medeval, No: published'
        ' 0.6609, recomputed 0.6445'
    )
    assert not any(re.search('correct|0.0390', line) for line in told)


def test_a_missing_arm_has_no_figure(run):
    absent = run[0][run[0].note == 'arm not in the file']
    assert set(absent.arm) == {'Only_text'} and absent.as_published.isna().all()


def test_known_damage_is_found_in_real_files(run):
    power = pd.DataFrame(read_json(run[2] / 'power.json'))
    by_share = power.groupby('share').found.mean()
    assert by_share[0.03] > 0.9 and (by_share[by_share.index >= 0.3] == 1).all()
    assert (power.void == (power.share >= 0.5)).all() and len(power.groupby('kind')) == 4
    assert 'would have been found' in (run[2] / 'log.txt').read_text()


def written(folder, table, **how):
    (folder / 'janus').mkdir(parents=True, exist_ok=True)
    table.to_csv(folder / 'janus' / 'medeval_base_shifted.csv', index=False, **how)
    return folder


def test_without_logits_nothing_is_certified(tmp_path):
    "Every answer of the image arm is that of the baseline: no evidence, no figure."
    table = pd.read_csv(DATA / 'results' / 'janus_pro_7b' / 'medeval_base_shifted.csv')
    bare = table.drop(columns=['p_yes', 'p_no', 'p_Yes', 'p_No'])
    found = reanalyse(written(tmp_path / 'in', bare), '', tmp_path / 'out', n_boot=100)
    told, image = ' '.join(findings(*found)), accuracy_of(found[0], 'janus', 'Image')
    assert 'No shifted arm is shown' in told and 'For 3 shifted arms the delivery' in told
    assert np.isnan(image.recomputed) and image.note.startswith('unproven: ')
    codes = {(f['arm'], f['code']): f for f in found[1]}
    assert codes['Image', 'identical_answers']['rows'] == 2000


def test_what_could_not_be_used_is_said_at_once(tmp_path):
    from smsbench.published.files import example_results, example_table

    folder = example_results(tmp_path / 'in', n=40)
    (folder / 'broken').mkdir()
    (folder / 'broken' / 'example_base_shifted.csv').write_bytes(bytes(range(256)))
    table = example_table('clean', 40)
    odd = pd.concat([table, table.head(3), table.tail(2).assign(shift='Sideways')])
    (folder / 'odd').mkdir()
    odd.to_csv(folder / 'odd' / 'example_base_shifted.csv', index=False)
    told = findings(*reanalyse(folder, '', tmp_path / 'out', n_boot=100))
    assert [s.split(' (such as')[0] for s in told[1:4]] == [
        'Files that could not be read: 1',
        'Rows of an unknown arm: 2, left out',
        'Rows that repeat a sample: 3, in arms: 1',
    ]


def test_the_page_says_how_answers_were_read(run):
    counts = read_json(run[2] / 'reading.json')
    assert counts['llava_med_llava_v1, medeval']['unread'] >= 1687
    assert sum(c['from_text'] for c in counts.values()) == len(read_results(DATA / 'results'))


def test_a_spreadsheet_changes_nothing(tmp_path, run):
    "Semicolons, decimal commas and another case of the header give the published figures."
    table = pd.read_csv(DATA / 'results' / 'janus_pro_7b' / 'medeval_base_shifted.csv')
    names = dict(ground_truth='Ground Truth', prediction='PREDICTION', shift='Shift', p_no='P_no')
    saved = written(tmp_path / 'in', table.rename(columns=names), sep=';', decimal=',')
    got = reanalyse(saved, '', tmp_path / 'out', n_boot=100)[0]
    same = run[0][(run[0].model == 'janus_pro_7b') & (run[0].dataset == 'medeval')]
    for column in ('as_published', 'recomputed'):
        assert np.allclose(got[column], same[column], equal_nan=True)


def test_no_page_calls_another_quantity_a_correction(run):
    for text in (
        side_by_side(run[0], 'accuracy').to_csv(),
        published_dots(run[0]).alt,
        published_heatmap(run[0]).alt,
    ):
        assert 'correct' not in text.lower()
    only_text = side_by_side(run[0], 'accuracy').set_index('model').loc['biomedgpt', 'Only text']
    assert only_text.startswith('0.6047 | 0.6047 [') and only_text.endswith('] on 129 of 2,000')


def test_readme_says_which_data_set_and_praises_nobody():
    text = (Path(__file__).parent.parent / 'nbs' / 'index.ipynb').read_text()
    assert 'FairVLMed' in text and 'MIMIC-CXR files' in text
    assert not re.search('much-cited|corrected|0.0390', text)
