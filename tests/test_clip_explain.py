"""Maps of CLIP models.

Do they lie where the truth is known, on every tower, on films of any shape, and can the checks
distinguish a good map from a bad one?
"""

import json, sys, threading

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings, strategies as st

from smsbench import Bootstrap
from smsbench.clip.explain import (
    METHODS,
    Explanation,
    Target,
    bright_follower,
    explain,
    explain_many,
    target,
)
from smsbench.clip.faithfulness import (
    area_iou,
    cascade,
    cascade_metrics,
    curve_areas,
    faithfulness_metrics,
    localisation_metrics,
    localise,
    perturbation_curves,
)
from smsbench.clip.model import load_clip, to_pixels, view_of, weights_sha
from smsbench.clip.reader_agreement import (
    agreement,
    agreement_metrics,
    between_readers,
    csv_marks,
    mark_region,
    place_marks,
    read_marks,
)
from smsbench.testing.tiny_clip import TINY_CLIP, tiny_clip
from smsbench.clip.towers import attention_taken, shuffled, stages, tower_of, undisturbed
from smsbench.core import InputError, RunError

KINDS = list(TINY_CLIP)


@pytest.fixture(scope='module', autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope='module')
def random_clips(tmp_path_factory):
    "A random checkpoint of every tower."
    folder = tmp_path_factory.mktemp('random')
    return {k: load_clip(str(tiny_clip(folder / k, k)), device='cpu') for k in KINDS}


def squares(n, seed=0):
    "Films of noise with one cell of 16 pixels that is bright or dark; which, and where."
    rng = np.random.default_rng(seed)
    films, bright, at = (
        rng.integers(80, 140, (n, 64, 64), dtype=np.uint8),
        rng.integers(0, 2, n),
        rng.integers(0, 4, (n, 2)),
    )
    for x, b, (r, c) in zip(films, bright, at):
        x[16 * r : 16 * r + 16, 16 * c : 16 * c + 16] = 240 if b else 5
    return list(films), bright, at


def taught(kind, folder):
    """A tiny model that learnt to distinguish a bright square from a dark one.

    Training stops before its score saturates.
    """
    torch.manual_seed(0)
    clip = load_clip(
        str(tiny_clip(folder, kind, size=128 if kind == 'resnet' else 64)), device='cpu'
    )  # the last stage of a ResNet then has 4 x 4 cells
    films, bright, _ = squares(512)
    pixels, y, model = to_pixels(clip, films), torch.tensor(bright).float(), clip.model
    ids, optimizer = (
        clip.tokenize(['bright', 'dark']),
        torch.optim.Adam(clip.model.parameters(), lr=2e-3),
    )
    model.train()
    for i in range(150):
        at = torch.randint(0, 512, (32,))
        image, text = (
            F.normalize(e, dim=-1) for e in (model.encode_image(pixels[at]), model.encode_text(ids))
        )
        loss = F.binary_cross_entropy_with_logits(10 * (image @ (text[0] - text[1])), y[at])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if loss < 0.3 and (kind != 'resnet' or i > 40):
            break  # batch norms need some steps
    model.eval()
    return clip


@pytest.fixture(scope='module', params=KINDS)
def learnt(request, tmp_path_factory):
    return request.param, taught(request.param, tmp_path_factory.mktemp('taught') / request.param)


def test_every_method_points_at_what_decides_the_score_on_every_tower(learnt):
    kind, clip = learnt
    films, bright, at = squares(60, seed=1)
    films, at = [f for f, b in zip(films, bright) if b], at[bright == 1]
    for method in METHODS.index:
        if kind == 'resnet' and method != 'gradcam':
            continue
        maps = explain_many(clip, films, 'bright', method=method, against='dark', empty='keep')
        peaks = [np.unravel_index(m.weights.argmax(), (64, 64)) for m in maps]
        hit = np.mean([tuple(int(i) // 16 for i in p) == tuple(a) for p, a in zip(peaks, at)])
        assert hit > 0.85, (kind, method, hit)  # chance is 1/16


def test_the_text_decides_what_a_map_shows(learnt):
    kind, clip = learnt
    rng = np.random.default_rng(3)
    film = rng.integers(80, 140, (64, 64), dtype=np.uint8)
    film[:16, :16], film[48:, 48:] = 240, 5
    for method in METHODS.index[METHODS.text] if kind != 'resnet' else ['gradcam']:
        a, b = (
            explain(clip, film, t, method=method, against=o, empty='keep')
            for t, o in (('bright', 'dark'), ('dark', 'bright'))
        )
        assert np.isclose(a.about['score'], -b.about['score'], atol=1e-3) and not np.allclose(
            a.grid, b.grid
        ), method
    if kind != 'resnet':
        assert np.allclose(
            *(explain(clip, film, t, method='rollout').grid for t in ('bright', 'dark'))
        )  # which does not read it


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('method', list(METHODS.index))
def test_finite_maps_or_a_plain_refusal(random_clips, kind, method):
    clip, rng = random_clips[kind], np.random.default_rng(0)
    films = [
        rng.integers(0, 256, s, dtype=np.uint8)
        for s in ((64, 64), (200, 90), (65, 300, 3), (31, 40))
    ]
    if kind == 'resnet' and method != 'gradcam':
        with pytest.raises(InputError, match='use gradcam'):
            explain_many(clip, films, 'effusion', method=method)
        return
    maps = explain_many(
        clip, films, 'effusion', method=method, against='normal', empty='keep', batch_size=3
    )
    for m, f in zip(maps, films):
        shown = ~np.isnan(m.weights)
        assert (
            m.weights.shape == f.shape[:2]
            and np.isfinite(m.grid).all()
            and (m.grid >= 0).all()
            and shown.sum() >= 0.9 * min(f.shape[:2]) ** 2
        )
        assert np.isnan(m.on_image(smooth=True)).sum() == (~shown).sum() and json.dumps(m.about)


@pytest.mark.parametrize(
    'tower, pool',
    [('test_resnet', 'avg'), ('test_convnext', ''), ('test_vit2', 'avg'), ('test_vit3', 'map')],
)
def test_other_networks_of_timm(tower, pool):
    import open_clip
    from open_clip.transform import image_transform
    from smsbench.clip.model import Clip

    vision, text = (
        dict(
            timm_model_name=tower,
            timm_model_pretrained=False,
            timm_pool=pool,
            timm_proj='linear',
            image_size=160,
        ),
        dict(context_length=16, width=16, heads=2, layers=1),
    )
    torch.manual_seed(0)
    clip = Clip(
        open_clip.model.CustomTextCLIP(32, vision, text).eval(),
        image_transform(160, is_train=False),
        open_clip.SimpleTokenizer(context_length=16),
        tower,
        dict(image_size=[160, 160], precision='fp32', embed_dim=32, context=16),
    )
    film = np.random.default_rng(0).integers(0, 256, (200, 300), dtype=np.uint8)
    for method in METHODS.index if tower_of(clip).blocks else ['gradcam']:
        found = explain(clip, film, 'effusion', method=method, empty='keep')
        assert (
            found.grid.shape in ((5, 5), (10, 10))
            and np.isfinite(found.grid).all()
            and (found.grid >= 0).all()
            and found.grid.max() > 0
            and np.isnan(found.weights).mean() == pytest.approx(1 / 3, abs=0.01)
        )


def test_feature_maps_with_channels_last_are_turned():
    from types import SimpleNamespace
    from smsbench.clip.explain import _as_map
    from smsbench.clip.towers import Tower

    t, kind = (
        torch.randn(2, 7, 5, 96),
        lambda fmt: Tower(
            SimpleNamespace(trunk=SimpleNamespace(output_fmt=fmt)), (), 'layer', None, 0, 'average'
        ),
    )
    assert (
        _as_map(t, kind('NHWC'), 'x').shape == (2, 96, 7, 5)
        and _as_map(t, kind('NCHW'), 'x').shape == t.shape
    )


def _marks(model):
    return (
        weights_sha(model),
        [(p.requires_grad, None if p.grad is None else p.grad.clone()) for p in model.parameters()],
        [
            (
                m.training,
                len(m._forward_hooks),
                len(m._forward_pre_hooks),
                len(m._backward_hooks),
                'forward' in vars(m),
                getattr(m, 'fused_attn', None),
                getattr(m, 'grad_checkpointing', None),
            )
            for m in model.modules()
        ],
    )


@pytest.mark.parametrize('kind', KINDS)
def test_the_model_is_left_as_it_was_also_after_a_failure(random_clips, kind):
    clip, film, fused = (
        random_clips[kind],
        np.zeros((64, 64), np.uint8),
        F.scaled_dot_product_attention,
    )
    for i, p in enumerate(clip.model.parameters()):
        p.requires_grad_(i % 3 > 0)
        p.grad = torch.ones_like(p) if i % 5 == 0 else None
    clip.model.train()
    next(clip.model.visual.children()).eval()
    try:
        before = _marks(clip.model)
        for method in METHODS.index:
            for how in (
                dict(),
                dict(layer='conv1' if kind in ('native', 'resnet') else 'trunk.norm'),
            ):
                try:
                    explain(clip, film, 'effusion', method=method, empty='keep', **how)
                except InputError:
                    pass

            def broken(*a, **k):
                raise KeyError

            clip.model.encode_image = broken
            try:
                with pytest.raises((KeyError, InputError)):
                    explain(
                        clip,
                        film,
                        Target(np.ones(clip.info['embed_dim'], np.float32), ('x',)),
                        method=method,
                    )
            finally:
                del clip.model.encode_image
        after = _marks(clip.model)
        assert (
            before[0] == after[0]
            and before[2] == after[2]
            and F.scaled_dot_product_attention is fused
        )
        for (r, g), (s, h) in zip(before[1], after[1]):
            assert r == s and (g is None) == (h is None) and (g is None or torch.equal(g, h))
    finally:
        clip.model.eval()
        for p in clip.model.parameters():
            p.requires_grad_(True)
            p.grad = None


def test_half_precision_on_a_cpu(tmp_path):
    tiny_clip(tmp_path / 'm', 'timm-hf')
    film = np.random.default_rng(0).integers(0, 256, (80, 64), dtype=np.uint8)
    full, half = (
        load_clip(str(tmp_path / 'm'), device='cpu', precision=p) for p in ('fp32', 'bf16')
    )
    for method in METHODS.index:
        a, b = (
            explain(c, film, 'effusion', method=method, empty='keep').grid.ravel()
            for c in (full, half)
        )
        assert np.isfinite(b).all() and (method == 'gradcam' or np.corrcoef(a, b)[0, 1] > 0.8), (
            method
        )


@pytest.mark.parametrize('kind', ['timm-hf', 'timm-native', 'native'])
def test_attention_and_its_gradient_agree_with_another_way_to_take_them(random_clips, kind):
    "timm: not fused, a hook behind the softmax. open_clip: softmax of q and k by hand."
    clip = random_clips[kind]
    tower = tower_of(clip)
    x = torch.randn(2, 3, 64, 64)
    t = torch.from_numpy(target(clip, 'effusion').vector)
    with undisturbed(clip.model), attention_taken(tower.visual) as ours:
        score = (F.normalize(clip.model.encode_image(x.requires_grad_()), dim=-1) * t).sum()
        grads = torch.autograd.grad(score, ours)
    theirs = []
    if kind == 'native':
        hooks = [
            b.attn.register_forward_pre_hook(
                lambda m, a, k: theirs.append((m, a[0].detach())), with_kwargs=True
            )
            for b in tower.blocks
        ]
        with torch.no_grad():
            clip.model.encode_image(x)
        for h in hooks:
            h.remove()
        for (m, q), a in zip(theirs, ours):
            n, w = q.shape[1], m.embed_dim
            q, k, _ = (
                z.view(len(q), n, m.num_heads, -1).transpose(1, 2)
                for z in F.linear(q, m.in_proj_weight, m.in_proj_bias).split(w, -1)
            )
            assert torch.allclose(
                (q @ k.transpose(-2, -1) / m.head_dim**0.5).softmax(-1), a, atol=1e-5
            )
        return
    old = [b.attn.fused_attn for b in tower.blocks]
    hooks = [
        b.attn.attn_drop.register_forward_hook(lambda m, i, o: theirs.append(o))
        for b in tower.blocks
    ]
    try:
        for b in tower.blocks:
            b.attn.fused_attn = False
        score = (F.normalize(clip.model.encode_image(x), dim=-1) * t).sum()
        expected = torch.autograd.grad(score, theirs)
    finally:
        for h in hooks:
            h.remove()
        for b, o in zip(tower.blocks, old):
            b.attn.fused_attn = o
    for a, b, g, h in zip(ours, theirs, grads, expected):
        assert torch.allclose(a, b, atol=1e-5) and torch.allclose(g, h, atol=1e-5)


def test_chefer_and_rollout_by_their_formulas(random_clips):
    clip = random_clips['timm-hf']
    tower = tower_of(clip)
    film = np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8)
    t = target(clip, 'effusion')
    with undisturbed(clip.model), attention_taken(tower.visual) as taken:
        score = (
            F.normalize(clip.model.encode_image(to_pixels(clip, [film]).requires_grad_()), dim=-1)
            * torch.from_numpy(t.vector)
        ).sum()
        grads = torch.autograd.grad(score, taken)
    relevance = flow = np.eye(17)
    for a, g in zip(taken, grads):
        a, g = a[0].detach().numpy(), g[0].numpy()
        relevance, flow = (
            relevance + np.maximum(a * g, 0).mean(0) @ relevance,
            (a.mean(0) + np.eye(17)) / 2 @ flow,
        )
    assert np.allclose(
        explain(clip, film, t, method='chefer').grid.ravel(), relevance[0, 1:], atol=1e-6
    ) and np.allclose(explain(clip, film, t, method='rollout').grid.ravel(), flow[0, 1:], atol=1e-6)
    assert np.isclose(flow[0].sum(), 1)


def test_attention_is_taken_from_the_own_thread_only(random_clips):
    seen, q = [], torch.randn(1, 1, 4, 8)
    with attention_taken(random_clips['native'].model.visual) as taken:
        thread = threading.Thread(
            target=lambda: seen.append(F.scaled_dot_product_attention(q, q, q))
        )
        thread.start()
        thread.join()
        assert not taken and seen[0].shape == q.shape
        mine = F.scaled_dot_product_attention(q, q, q)
    assert len(taken) == 1 and torch.allclose(mine, seen[0], atol=1e-6)


@pytest.fixture(scope='module')
def follower(random_clips):
    return bright_follower(random_clips['native'])


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    height=st.integers(64, 300),
    width=st.integers(64, 300),
    row=st.integers(0, 7),
    column=st.integers(0, 7),
    method=st.sampled_from(list(METHODS.index)),
)
def test_the_geometry_is_exact_on_films_of_any_shape(follower, height, width, row, column, method):
    clip, bright = follower
    x0, y0, x1, y1 = np.ceil(view_of(clip, height, width).cell(row, column) - 0.5).astype(int)
    film = np.full((height, width), 20, np.uint8)
    film[max(y0, 0) : y1, max(x0, 0) : x1] = 250
    found = explain(clip, film, bright, method=method)
    assert np.unravel_index(found.grid.argmax(), (8, 8)) == (row, column)
    mask = np.zeros((height, width), bool)
    mask[max(y0, 0) : y1, max(x0, 0) : x1] = True
    assert np.array_equal(found.weights == found.grid.max(), mask)
    assert np.isnan(found.weights).sum() == height * width - (
        ~np.isnan(found.weights)
    ).sum() and abs((~np.isnan(found.weights)).sum() - min(height, width) ** 2) <= 5 * min(
        height, width
    )  # the resized side is rounded to whole pixels


@pytest.mark.parametrize('mode', ['squash', 'longest', 'shortest'])
def test_the_geometry_follows_the_models_own_preprocess(tmp_path, mode):
    folder = tiny_clip(tmp_path / 'm', 'native')
    config = json.loads((folder / 'open_clip_config.json').read_text())
    config['preprocess_cfg']['resize_mode'] = mode
    (folder / 'open_clip_config.json').write_text(json.dumps(config))
    clip, bright = bright_follower(load_clip(str(folder), device='cpu'))
    x0, y0, x1, y1 = np.ceil(view_of(clip, 96, 192).cell(4, 3) - 0.5).astype(int)
    mask = np.zeros((96, 192), bool)
    mask[y0:y1, x0:x1] = True
    for method in METHODS.index:
        found = explain(clip, np.where(mask, 250, 20).astype(np.uint8), bright, method=method)
        assert np.array_equal(found.weights == found.grid.max(), mask), method
    seen = (~np.isnan(found.weights)).mean()
    assert seen == (0.5 if mode == 'shortest' else 1)  # a crop hides, the others do not


def test_layers_without_gradient_and_films_without_evidence(random_clips, follower):
    film = np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8)
    for layer in (
        'transformer.resblocks.2',
        'transformer.resblocks.2.mlp',
        'transformer.resblocks.2.ln_2',
    ):
        with pytest.raises(InputError, match=r'all zero; choose transformer\.resblocks\.2\.ln_1'):
            explain(random_clips['native'], film, 'effusion', layer=layer)
    with pytest.raises(RunError, match='all zero.*opposite'):
        explain(follower[0], np.full((64, 64), 5, np.uint8), follower[1], method='chefer')
    for bad in (
        dict(text=''),
        dict(text='x', method='lime'),
        dict(text='x', layer='nowhere'),
        dict(text='x', method='chefer', blocks=0),
    ):
        with pytest.raises(InputError):
            explain(random_clips['native'], film, **bad)
    with pytest.raises(InputError, match='uint8'):
        explain(random_clips['native'], film / 255.0, 'x')


def _study(clip, bright, n=16, seed=0):
    rng = np.random.default_rng(seed)
    films, masks = [], []
    for _ in range(n):
        film, (x, y) = rng.integers(0, 40, (64, 64), dtype=np.uint8), rng.choice([2, 6, 44, 46], 2)
        side = int(rng.integers(10, 17))
        film[y : y + side, x : x + side] = 245
        mask = np.zeros((64, 64), bool)
        mask[y : y + side, x : x + side] = True
        films.append(film)
        masks.append(mask)
    return (
        films,
        masks,
        pd.DataFrame(
            dict(
                film_id=[f'f{i}' for i in range(n)],
                patient_id=[f'p{i // 2}' for i in range(n)],
                finding='square',
            )
        ),
    )


@pytest.mark.parametrize('method', list(METHODS.index))
def test_true_maps_beat_their_baselines_and_false_ones_do_not(random_clips, method):
    clip, bright = bright_follower(random_clips['native'], noise=0.1)
    films, masks, about = _study(clip, bright)
    maps = explain_many(clip, films, bright, method=method)
    blind = explain_many(shuffled(clip), films, bright, method=method, empty='keep')
    at = localisation_metrics(
        localise(maps, masks, about, others=dict(shuffled=blind)), by=(), boot=Bootstrap(300)
    ).set_index(['metric', 'arm'])
    for rival in ('uniform', 'centre', 'shuffled'):
        assert at.loc[(f'mass_over_{rival}', 'map'), 'ci_low'] > 0, (rival, method)
    wrong = localisation_metrics(
        localise([m.weights for m in maps], masks[1:] + masks[:1], about),
        by=(),
        boot=Bootstrap(300),
    ).set_index(['metric', 'arm'])  # the next film's region
    assert wrong.loc[('auroc', 'map'), 'value'] < at.loc[('auroc', 'map'), 'value'] - 0.1
    pair = Target(20 * bright.vector, ('bright',), ('dark',))
    curves = perturbation_curves(
        clip, films[:8], maps[:8], text=pair, about=about[:8], steps=6, n_random=2
    )
    gain = faithfulness_metrics(curve_areas(curves), boot=Bootstrap(300)).set_index('metric')
    assert (
        gain.loc['deletion_gain_over_random', 'ci_low'] > 0
        and gain.loc['insertion_gain_over_random', 'ci_low'] > 0
    )


def test_an_order_that_ignores_the_film_gains_nothing(follower):
    clip, bright = follower
    films, masks, about = _study(clip, bright, 24, 1)
    rng = np.random.default_rng(5)
    view = view_of(clip, 64, 64)
    noise = [Explanation(rng.random((8, 8)), view, (64, 64), 'noise', '', {}) for _ in films]
    gain = faithfulness_metrics(
        curve_areas(
            perturbation_curves(
                clip,
                films,
                noise,
                text=Target(20 * bright.vector, ('b',), ('d',)),
                about=about,
                steps=5,
            )
        ),
        boot=Bootstrap(500),
    ).set_index('metric')
    for kind in ('deletion', 'insertion'):
        assert (
            gain.loc[f'{kind}_gain_over_random', 'ci_low']
            < 0
            < gain.loc[f'{kind}_gain_over_random', 'ci_high']
        )
    at = localisation_metrics(localise(noise, masks, about), by=(), boot=Bootstrap(500)).set_index(
        ['metric', 'arm']
    )
    assert at.loc[('auroc', 'map'), 'ci_low'] < 0.5 < at.loc[('auroc', 'map'), 'ci_high']


@pytest.mark.parametrize('kind', KINDS)
def test_shuffling_goes_from_the_top_down(random_clips, kind):
    clip = random_clips[kind]
    order = stages(clip)
    assert (
        list(order)[0] == 'head'
        and list(order)[-1] == 'embedding'
        and sum(map(len, order.values())) == len(list(clip.model.visual.parameters()))
    )
    for i, stage in enumerate(order):
        new = dict(shuffled(clip, stage).model.visual.named_parameters())
        changed = {n for n, p in clip.model.visual.named_parameters() if not torch.equal(p, new[n])}
        allowed = {n for s in list(order)[: i + 1] for n in order[s]}
        assert changed <= allowed and any(n in changed for n in order[stage])


def test_maps_forget_with_the_weights(learnt):
    kind, clip = learnt
    if kind not in ('native', 'timm-hf'):
        pytest.skip('two towers are enough')
    films, bright, _ = squares(20, seed=2)
    films = [f for f, b in zip(films, bright) if b]
    about = pd.DataFrame(
        dict(film_id=range(len(films)), patient_id=range(len(films)), finding='square')
    ).astype(str)
    maps = explain_many(clip, films, 'bright', method='chefer', against='dark', empty='keep')
    like = cascade_metrics(
        cascade(clip, films, maps, text='bright', about=about, against='dark'), boot=Bootstrap(100)
    )
    rho = like[like.metric == 'spearman'].set_index('arm').value
    assert (
        rho['trained'] > 0.999
        and np.nanmin(rho) < 0.7
        and list(rho.index) == ['trained', *stages(clip)]
    )


def test_area_iou_of_chance_is_its_expectation():
    rng = np.random.default_rng(0)
    mask = np.zeros((12, 12), bool)
    mask[3:7, 2:8] = True
    drawn = np.mean([area_iou(rng.random((12, 12)), mask) for _ in range(4000)])
    assert abs(drawn - area_iou(np.ones((12, 12)), mask)) < 0.01


# readers


def _write(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    return tmp_path / name


def test_three_layouts_of_one_mark_give_one_region(tmp_path):
    about = pd.DataFrame(dict(film_id=['s1'], patient_id=['p'], image=['img/a.png']))
    files = [
        (
            _write(
                tmp_path, 'a.csv', 'film,finding,reader,x0,y0,x1,y1\ns1,effusion,R1,10,20,30,50\n'
            ),
            'auto',
        ),
        (
            _write(
                tmp_path,
                'b.csv',
                'film,finding,points,width,height\na.png,effusion,"20,40 60,40 60,100'
                ' 20,100",200,160\n',
            ),
            'csv',
        ),
        (
            _write(
                tmp_path,
                'm.csv',
                'category_name,label_text,path,x,y,w,h,dicom_id,image_width,image_height\n'
                'effusion,fluid,p/a.jpg,20,40,40,60,a,200,160\n',
            ),
            'auto',
        ),
        (
            _write(
                tmp_path,
                'c.json',
                json.dumps(
                    dict(
                        images=[dict(id=7, file_name='a.png', width=100, height=80)],
                        categories=[dict(id=1, name='effusion')],
                        annotations=[dict(image_id=7, category_id=1, bbox=[10, 20, 20, 30])],
                    )
                ),
            ),
            'auto',
        ),
    ]
    expected = np.zeros((80, 100), bool)
    expected[20:50, 10:30] = True
    for path, layout in files:
        got = place_marks(read_marks(path, layout), about, [(80, 100)])
        assert (
            np.array_equal(got.masks[0], expected)
            and got.excluded.empty
            and got.table.film_id[0] == 's1'
        ), path.name


@pytest.mark.parametrize(
    'text, words',
    [
        ('film,x0,y0,x1,y1\n', "'finding'"),
        ('film,finding\na,b\n', 'where a mark is'),
        ('', 'not a table'),
        ('film,finding,x0,y0,x1,y1\nz,effusion,1,1,5,5\n', 'no film of that name'),
        ('film,finding,x0,y0,x1,y1\ns1,effusion,1,1,500,5\n', 'leaves the film'),
        ('film,finding,points\ns1,effusion,"1,1 5,5"\n', 'three corners'),
        ('film,finding,points\ns1,effusion,[[1\n', 'no JSON'),
        ('film,finding,x0,y0,x1,y1\ns1,effusion,a,b,c,d\n', 'no numbers'),
        ('film,finding,mask\ns1,effusion,../../etc/passwd\n', ''),
        ('film,finding,x0,y0,x1,y1\n', 'none of 0 marks'),
    ],
)
def test_bad_marks_are_one_clear_error(tmp_path, text, words):
    with pytest.raises(InputError) as e:
        place_marks(
            read_marks(_write(tmp_path, 'm.csv', text)),
            pd.DataFrame(dict(film_id=['s1'], patient_id=['p'])),
            [(80, 100)],
        )
    assert words in str(e.value) and '\n' not in str(e.value)


def test_bad_marks_among_good_ones_are_listed(tmp_path):
    path = _write(
        tmp_path,
        'm.csv',
        'film,finding,reader,x0,y0,x1,y1,points\ns1,effusion,R1,1,1,9,9,\n'
        's1,effusion,R1,1,1,900,9,\nzz,effusion,R1,1,1,9,9,\ns1,effusion,R1,,,,,"1,1'
        ' 2,2"\ns1,effusion,R2,,,,,\n',
    )
    got = place_marks(
        read_marks(path), pd.DataFrame(dict(film_id=['s1'], patient_id=['p'])), [(80, 100)]
    )
    assert (
        got.excluded.row.tolist() == [2, 3, 4, 5]
        and len(got.table) == 1
        and got.masks[0].sum() == 64
    )
    assert (
        got.excluded.reason.iloc[-1] == 'the row marks nothing'
    )  # who left the row empty is listed too


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 20), st.floats(0, 15)), min_size=3, max_size=8))
def test_polygons_are_filled_as_by_their_definition(points):
    from matplotlib.path import Path as Outline

    mark = pd.Series(
        dict(shape='polygon', points=json.dumps([list(p) for p in points]), width=0.0, height=0.0)
    )
    try:
        mask = mark_region(mark, (15, 20))
    except InputError as e:
        assert 'no pixel' in str(e)
        return
    y, x = np.nonzero(mask)
    assert (x + 0.5).min() >= min(p[0] for p in points) - 1e-6 and (y + 0.5).max() <= max(
        p[1] for p in points
    ) + 1e-6
    clear = (
        Outline(points)
        .contains_points(
            np.stack(np.meshgrid(np.arange(20) + 0.5, np.arange(15) + 0.5), -1).reshape(-1, 2),
            radius=0,
        )
        .reshape(15, 20)
    )
    assert (
        len(points) > 3 or (mask != clear).sum() <= 3
    )  # triangles have one inside; only pixels on the edge may differ


def test_coco_run_lengths_as_pycocotools_reads_them():
    oracle = pytest.importorskip('pycocotools.mask')
    rng = np.random.default_rng(0)
    for _ in range(30):
        h, w = rng.integers(1, 40, 2)
        mask = (rng.random((h, w)) < rng.random()).astype(np.uint8)
        if not mask.any():
            continue
        held = oracle.encode(np.asfortranarray(mask))
        got = mark_region(
            pd.Series(
                dict(
                    shape='rle',
                    points=json.dumps(dict(size=[int(h), int(w)], counts=held['counts'].decode())),
                    width=0.0,
                    height=0.0,
                )
            ),
            (h, w),
        )
        assert np.array_equal(got, mask == 1)


def test_a_map_that_is_a_readers_mark_agrees_with_that_reader():
    rng, rows = np.random.default_rng(0), []
    for i in range(12):
        x, y = rng.integers(5, 40, 2)
        rows += [
            dict(
                film=f'f{i}', finding='effusion', reader=r, x0=x + d, y0=y, x1=x + d + 15, y1=y + 15
            )
            for r, d in (('R1', 0), ('R2', 4))
        ]
    about = pd.DataFrame(
        dict(film_id=[f'f{i}' for i in range(12)], patient_id=[f'p{i // 2}' for i in range(12)])
    )
    got = place_marks(csv_marks(pd.DataFrame(rows)), about, [(64, 64)] * 12)
    maps = {
        (r.film_id, r.finding): got.masks[i].astype(float)
        for i, r in enumerate(got.table.itertuples())
        if r.reader == 'R1'
    }
    table = agreement_metrics(agreement(got, maps), between_readers(got), boot=Bootstrap(200))
    at = table.set_index(['subgroup', 'metric', 'arm']).value
    assert at['reader=R1', 'iou_area', 'map'] == 1 and at['reader=R1', 'pointing', 'map'] == 1
    assert np.isclose(
        at['reader=R2', 'iou_area', 'map'], at['all', 'reader_iou', 'all pairs']
    ) and np.isclose(at['all', 'reader_iou', 'all pairs'], 11 / 19)
    assert np.isclose(at['all', 'iou_under_readers', 'map'], 11 / 19 - (1 + 11 / 19) / 2)


def test_gradcam_of_a_model_trained_on_phantom_films_beats_the_centre(tmp_path):
    from smsbench.clip.dataset import read_images
    from smsbench.clip.prompts import prompts_for
    from smsbench.clip.trainer import phantom_recipe, train
    from smsbench.data.phantom_image import phantom_masks

    films, clip, how = phantom_recipe(tmp_path / 'start', n=300, epochs=8)
    clip = train(films, clip, how, out=tmp_path / 'run').clip('cpu')
    test = films.select('test', 'val')
    test = test.take(test.targets.effusion.to_numpy() == 1)
    prompts = prompts_for(test)['effusion']
    maps = explain_many(
        clip,
        read_images(test, range(len(test))),
        tuple(prompts['positive']),
        against=tuple(prompts['negative']),
        empty='keep',
    )
    rows = localise(
        maps,
        [phantom_masks(r)['effusion'] for r in test.table.image],
        test.table[['film_id', 'patient_id']].assign(finding='effusion'),
    )
    at = localisation_metrics(rows, by=(), boot=Bootstrap(500)).set_index(['metric', 'arm'])
    for k in ('mass', 'iou_area', 'auroc'):
        assert at.loc[(f'{k}_over_centre', 'map'), 'ci_low'] > 0, k


def test_importing_needs_no_torch():
    import subprocess

    code = (
        'import sys, smsbench.clip.explain, smsbench.clip.reader_agreement;'
        'import smsbench.report.saliency_figures;'
        ' assert not {"torch", "open_clip", "pytorch_grad_cam", "matplotlib"} & set(sys.modules)'
    )
    subprocess.run([sys.executable, '-c', code], check=True)
