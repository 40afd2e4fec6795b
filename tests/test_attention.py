"""What the answer looked at: every method for every family.

Compared with the library and with planted truth, and within its memory.
"""

import logging, os, subprocess, sys
from dataclasses import replace

import numpy as np, pandas as pd, pytest, torch, transformers as tf

from smsbench.core import InputError, RunError
from smsbench.data.phantom import QUESTIONS, phantom_cohort, phantom_masks, read_phantom
from smsbench.audit.prompts import Task, render
from smsbench.vlm.attention import attention_map, attention_rows, eager, on_weights, shares
from smsbench.vlm.attribution_baselines import randomised
from smsbench.vlm.composed import Tower, vision_modules, vision_tokens
from smsbench.saliency.metrics import entropy, focus, localisation, ssim
from smsbench.vlm.attribution import METHODS, rows_of
from smsbench.vlm.model import Inputs, load_model
from smsbench.testing.reference import REFERENCE, reference_path
from smsbench.testing.tiny import TINY, tiny_checkpoint

tf.logging.set_verbosity_error()
tf.logging.disable_progress_bar()
logging.getLogger('transformers').setLevel(logging.ERROR)
REPORT = 'Report: the lungs are clear. No pneumothorax.'
every_family = pytest.mark.parametrize('family', list(TINY))
NO_TOWER = ('qwen2_vl', 'qwen2_5_vl', 'qwen3_vl')  # their vision towers hand out no weights


@pytest.fixture(scope='module')
def vlms(tmp_path_factory):
    root, loaded = tmp_path_factory.mktemp('attention'), {}

    def vlm(family):
        if family not in loaded:
            loaded[family] = load_model(
                tiny_checkpoint(family, root / family, seed=1), device='cpu'
            )
        return loaded[family]

    return vlm


def asked(shape=(90, 130), seed=0):
    return Inputs(
        np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8),
        REPORT + ' Is there pleural effusion? Answer yes or no.',
        ('yes', 'no'),
    )


@every_family
@pytest.mark.parametrize('method', list(METHODS))
def test_every_method_gives_a_map_or_says_why_not(vlms, family, method):
    m = vlms(family)
    if method == 'composed' and family in NO_TOWER:
        with pytest.raises(InputError, match='hands out no attention weights'):
            rows_of(m, asked(), method)
        return
    rows = rows_of(m, asked(), method, report=REPORT)
    for heads in ('mean', 'max', 'entropy'):
        a = attention_map(rows, 'answer', 'all', heads)
        assert sum(g.sum() for g in a.grids.values()) > 0 and all(
            np.isfinite(g).all() and (g >= 0).all() for g in a.grids.values()
        )
        assert np.isclose(
            sum(v for k, v in a.shares.items() if k != 'beside' and not np.isnan(v)), 1, atol=1e-5
        )
        assert np.isclose(
            sum(g.sum() for g in a.grids.values()) + a.shares['beside'],
            a.shares['image'],
            atol=1e-5,
        )
        assert {
            'method',
            'layers',
            'heads',
            'query',
            'position',
            'grids',
            'model',
            'id',
            'revision',
            'dtype',
            'family',
        } <= set(a.about)
        assert (
            a.about['method'] == method
            and a.about['revision'].startswith('files:')
            and a.about['model'] == family
            and a.about['query'] == 'answer'
        )
    for v in a.layout.views:
        film = a.on_image(v.name)
        assert (
            film.shape == (90, 130)
            and np.nanmin(film) >= 0
            and 0 <= focus(film) <= 1
            and entropy(film) > 0
        )
        assert ssim(film, film) == pytest.approx(1) and localisation(
            film, np.indices(film.shape)[1] > 70
        ).shape == (3, 5)


@every_family
def test_raw_rows_are_those_of_a_plain_eager_forward(vlms, family):
    m, x = vlms(family), asked((160, 70), 3)
    rows, row = (
        attention_rows(m, x, ('answer', 'lungs', 'said'), report=REPORT, said='no'),
        m.encode(x)[0],
    )
    with torch.inference_mode(), eager(m):
        full = m.model(**m.put(row), output_attentions=True, use_cache=False).attentions
    for i, w in zip(rows.layers, rows.weights):
        assert np.allclose(
            w[:, :2, : full[i].shape[-1]],
            full[i][0][:, list(rows.positions[:2])].numpy(),
            atol=1e-6,
        )
    assert np.allclose(rows.weights.sum(-1), 1, atol=1e-5)


@every_family
def test_what_was_said_has_a_share_and_changes_nothing_before_it(vlms, family):
    m, x = vlms(family), asked()
    for method in ('raw', 'rollout') + ('composed',) * (family not in NO_TOWER):
        a, b = (
            rows_of(m, x, method, report=REPORT),
            rows_of(m, x, method, queries=('answer', 'said'), report=REPORT, said='yes'),
        )
        before, after = (shares(r, 'all').fillna(0) for r in (a, b))
        assert np.allclose(after.sum(axis=1) - after.beside, 1, atol=1e-5) and np.allclose(
            before.loc['answer'], after.loc['answer'], atol=1e-4
        ), method
        if method == 'rollout' or not m.caps.cross_attention:
            assert after.said['said'] > 0 == after.said['answer']
    for method in ('gradient', 'relevance'):
        a, b = (
            attention_map(rows_of(m, x, method, said=s, choice='yes'), 'answer', 'all')
            for s in ('', 'yes')
        )
        for n in a.grids:
            assert np.allclose(a.grids[n], b.grids[n], atol=1e-4)


@every_family
def test_rollout_rows_are_distributions_over_what_came_before(vlms, family):
    m, x = vlms(family), asked()
    rows = rows_of(m, x, 'rollout', queries=('answer', 'lungs'))
    assert np.allclose(rows.weights.sum(-1), 1, atol=1e-5) and (rows.weights >= 0).all()
    if not m.caps.cross_attention and not m.caps.bidirectional_prefix:
        assert (
            rows.weights[0, 0, 1, rows.positions[1] + 1 :].sum() < 1e-6
        )  # nothing from the future
    last = (
        rows.layout.keys - rows_of(m, x, 'raw').layout.keys * m.caps.cross_attention - 1
        if m.caps.cross_attention
        else rows.positions[0]
    )
    assert rows.weights[
        0, 0, 0, (rows_of(m, x, 'raw').layout.keys if m.caps.cross_attention else 0) + last
    ] >= 0.5 ** len(m.model.get_decoder().layers)  # what stayed in every layer


@pytest.mark.parametrize('family', [f for f in TINY if f not in NO_TOWER])
@pytest.mark.parametrize('shape', [(90, 130), (160, 70), (64, 333)], ids=str)
def test_the_towers_tokens_lie_where_the_patches_do(vlms, family, shape):
    "A bright patch of the film changes the token that enters the tower at its place."
    m = vlms(family)
    grey = replace(asked(shape), image=np.full(shape, 128, np.uint8))
    first = next(
        mod
        for mod in m.model.get_encoder('image').modules()
        if type(mod).__name__.endswith('Attention')
    )

    def entering(x):
        got = []
        handle = first.register_forward_pre_hook(
            lambda module, args, kwargs: got.append((args or (kwargs['hidden_states'],))[0]),
            with_kwargs=True,
        )
        try:
            with torch.inference_mode():
                m.model(**m.put(m.encode(x)[0]), use_cache=False)
        finally:
            handle.remove()
        return got[0].flatten(0, -2).float().numpy(), got[0].shape

    before, size = entering(grey)
    rows = rows_of(m, grey, 'composed')
    laid, patches = vision_tokens(
        m, attention_rows(m, grey).layout, int(np.prod(size[:-2])), size[-2]
    )
    off, rng = [], np.random.default_rng(0)
    for v, t in zip(rows.layout.views, laid):
        assert v.grid == t.shape and patches[t % len(patches)].all() and len(np.unique(t)) == t.size
        inside = [
            rc
            for rc in np.ndindex(v.grid)
            if np.prod(np.diff(np.clip(v.cell(*rc).reshape(2, 2), 0, shape[::-1]), axis=0).clip(0))
            > 0.33 * np.linalg.det(v.affine[:, :2])
        ]
        for r, c in [inside[i] for i in rng.permutation(len(inside))[:6]]:
            film = grey.image.copy()
            x0, y0, x1, y1 = v.cell(r, c)
            film[
                max(0, int(np.ceil(y0))) : max(0, int(y1)),
                max(0, int(np.ceil(x0))) : max(0, int(x1)),
            ] = 255
            if (film == grey.image).all():
                continue  # a cell thinner than a pixel
            change = np.linalg.norm(entering(replace(grey, image=film))[0] - before, axis=-1)[t]
            off.append(
                np.abs(np.subtract(np.unravel_index(change.argmax(), t.shape), (r, c))).max()
            )
    assert len(off) >= 3 and np.mean(np.array(off) == 0) >= 0.8 and max(off) <= 1, off


@pytest.mark.parametrize('family', ['llava', 'gemma3', 'mllama', 'qwen2_5_vl'])
def test_half_precision_says_the_same(vlms, family, tmp_path):
    small = load_model(
        tiny_checkpoint(family, tmp_path / 'half', seed=1), dtype='bfloat16', device='cpu'
    )
    for method in ('raw', 'rollout', 'gradient', 'relevance'):
        a, b = (
            attention_map(
                (
                    rows_of(v, asked(), method, choice='yes')
                    if 'choice' in METHODS[method].options
                    else rows_of(v, asked(), method)
                ),
                'answer',
                'all',
            )
            for v in (vlms(family), small)
        )
        for n in a.grids:
            assert np.corrcoef(a.grids[n].ravel(), b.grids[n].ravel())[0, 1] > 0.8, (method, n)
        assert b.about['dtype'] == 'bfloat16'


@every_family
def test_randomised_weights_change_the_map_and_come_back(vlms, family):
    m, x = vlms(family), asked()
    before, kept = (
        attention_map(attention_rows(m, x), 'answer', 'all'),
        {n: p.clone() for n, p in m.model.named_parameters()},
    )
    for part in ('language', 'all'):
        with randomised(m, 3, part) as other:
            blank = attention_map(attention_rows(other, x), 'answer', 'all')
        assert (
            any(not np.allclose(blank.grids[n], before.grids[n], rtol=1e-3) for n in before.grids)
            and part in blank.about['model']
        )
        assert (
            all(torch.equal(p, kept[n]) for n, p in m.model.named_parameters()) and m.name == family
        )


def _localised(name, method, cohort, **options):
    """Mean localisation of a reference VLM on the positive films of a cohort.

    Each finding counts alike.
    """
    model, out = load_model(reference_path(name), device='cpu'), []
    for r in cohort.itertuples():
        x = Inputs(
            read_phantom(r.image), render(Task(QUESTIONS[r.finding]), 'both', r.text), ('yes', 'no')
        )
        a = attention_map(
            rows_of(model, x, method, report=r.text, **options), 'answer', 'all', 'entropy'
        )
        out.append(
            localisation(a.on_image(), phantom_masks(r.image)[r.finding]).stack().rename(r.finding)
        )
    return pd.DataFrame(out).groupby(level=0).mean().mean().unstack()


def test_the_reader_looks_at_the_finding_and_the_follower_does_not():
    "Method, layers and heads were chosen on the films of another seed."
    cohort = phantom_cohort(
        n=28, size=64, seed=502, findings=('effusion', 'opacity', 'cardiomegaly')
    )
    cohort = cohort[cohort.label == 'yes']
    raw, gradient = (_localised('reference-image-reader', m, cohort) for m in ('raw', 'gradient'))
    assert (
        raw.auroc['map'] > raw.auroc['centre'] + 0.02
        and raw.auroc['map'] > 0.75
        and raw.mass['map'] > 1.4 * raw.mass['centre'] > 1.4 * raw.mass['uniform']
        and raw.iou['map'] > raw.iou['centre'] + 0.05
    )
    assert (
        gradient.mass['map'] > 1.7 * gradient.mass['centre']
        and gradient.pointing['map'] > gradient.pointing['centre'] + 0.05
    )
    for m in ('raw', 'gradient'):
        f = _localised('reference-blind-follower', m, cohort)
        assert (
            f.mass['map'] < 1.3 * f.mass['uniform']
            and f.pointing['map'] < f.pointing['centre']
            and f.auroc['map'] < 0.65 < f.auroc['centre']
        ), m


def test_the_reader_reads_effusions_far_from_the_middle():
    cohort = phantom_cohort(n=40, size=64, seed=503)
    cohort = cohort[cohort.label == 'yes']
    reader, follower = (
        _localised(n, 'raw', cohort) for n in ('reference-image-reader', 'reference-blind-follower')
    )
    assert (
        reader.auroc['map'] > 0.8 > reader.auroc['centre'] + 0.1
        and reader.mass['map'] > 2.5 * reader.mass['uniform']
        and reader.pointing['map'] > reader.pointing['centre'] + 0.1
    )
    assert follower.auroc['map'] < 0.7 and follower.mass['map'] < 1.4 * follower.mass['uniform']


MEMORY = '''
import ctypes, sys
import numpy as np, torch, transformers as tf
from smsbench.vlm.attribution import METHODS, rows_of
from smsbench.vlm.model import HFModel, Inputs
from smsbench.testing.tiny import TINY, sharpened
tf.logging.set_verbosity_error(); torch.set_num_threads(1)
config, processor = TINY['llava']()
config.vision_config.image_size, config.text_config.num_hidden_layers = 448, 32
config.image_seq_length = 1024
ip = processor.image_processor
ip.size, ip.crop_size = dict(shortest_edge=448), dict(height=448, width=448)
model = HFModel(sharpened(tf.AutoModelForImageTextToText.from_config(config)), processor, 'deep')
x = Inputs(np.zeros((448, 448), np.uint8), 'Is there pleural effusion?', ('yes', 'no'))
def status(k):
    return next(int(l.split()[1])*1024 for l in open('/proc/self/status') if l.startswith(k))
with torch.inference_mode(): model.model(**model.put(model.encode(x)[0]), use_cache=False)
def measured(f):
    open('/proc/self/clear_refs', 'w').write('5'); before = status('VmRSS')
    kept = f(); return status('VmHWM') - before, kept
def library():
    model.model.set_attn_implementation('eager')
    with torch.inference_mode():
        batch = model.put(model.encode(x)[0])
        found = model.model(**batch, use_cache=False, output_attentions=True)
        return sum(a.nbytes for a in found.attentions)
one = 4*4*model.encode(x)[0]['input_ids'].shape[1]**2
for n in METHODS:
    peak, kept = measured(lambda: rows_of(model, x, n).weights.nbytes); print(n, peak/one, kept)
print('library', *(v/one for v in measured(library)))
'''


@pytest.mark.skipif(
    not os.path.exists('/proc/self/clear_refs'), reason='measures memory as Linux counts it'
)
def test_memory_is_bounded_for_a_thousand_tokens_and_32_layers():
    """Memory, in units of one layer's matrix of attention, does not grow with the depth.

    The library's own way shows that the measurement would notice.
    """
    run = subprocess.run(
        [sys.executable, '-c', MEMORY],
        capture_output=True,
        text=True,
        env=os.environ
        | dict(OMP_NUM_THREADS='1', MALLOC_MMAP_THRESHOLD_='1000000', HF_HUB_OFFLINE='1'),
        timeout=1500,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    found = {l.split()[0]: tuple(map(float, l.split()[1:])) for l in run.stdout.splitlines()}
    most = dict(raw=5, rollout=5, gradient=9, relevance=10, composed=6)
    assert all(found[n][0] < most[n] for n in most) and found['library'][0] > 25, found
    assert (
        found['raw'][1] < 1e6
        and found['rollout'][1] < 1e4
        and found['gradient'][1] == found['raw'][1]
    )


def test_what_cannot_be_asked_is_an_error_in_one_line(vlms):
    m, x = vlms('llava'), asked()
    for f, words in (
        (lambda: rows_of(m, x, 'saliency'), 'choose from raw'),
        (lambda: rows_of(m, x, queries=('tuberculosis',)), 'not a word'),
        (lambda: rows_of(m, x, 'rollout', report='another report'), 'cannot be found'),
        (lambda: rows_of(m, replace(x, image=None), 'gradient'), 'without an image'),
        (lambda: rows_of(m, x, 'gradient', choice='maybe'), 'none of the choices'),
        (lambda: rows_of(m, x, 'composed', vision='best'), 'choose rollout'),
        (lambda: attention_map(rows_of(m, x, 'rollout'), layers=(0,)), 'numbers among'),
        (lambda: rows_of(m, x, 'rollout', heads='min'), 'mean or max'),
    ):
        with pytest.raises(InputError, match=words) as e:
            f()
        assert '\n' not in str(e.value)
    blank = rows_of(m, x)
    blank = replace(blank, weights=np.zeros_like(blank.weights))
    with pytest.raises(RunError, match='no weight at all'):
        shares(blank)
    with pytest.raises(RunError, match='no attention at all fell on the film'):
        attention_map(blank)
    tower = Tower(vision_modules(m))
    with on_weights(tower.modules, tower):
        rows_of(m, x)  # the tower attends in sdpa
    with pytest.raises(RunError, match='returned no attention weights'):
        tower.size(m.name)
    assert set(REFERENCE) == {
        'reference-blind-follower',
        'reference-image-reader',
        'reference-sighted-follower',
    }
