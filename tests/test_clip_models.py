"CLIP checkpoints of every tower: saved, loaded, refused, and where their preprocess puts a film."

import json
import os
import shutil

os.environ.setdefault('HF_HUB_OFFLINE', '1')
os.environ.setdefault('TRANSFORMERS_VERBOSITY', 'error')

import numpy as np
import open_clip
import pytest
import torch
from hypothesis import given, settings, strategies as st
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image

from smsbench import Bootstrap
from smsbench.clip import model as module
from smsbench.clip.checkpoints import weights_sha
from smsbench.clip.model import (
    Clip,
    frame_of,
    image_embeddings,
    load_clip,
    save_clip,
    text_embeddings,
)
from smsbench.ssa.analysis import clip_predictor, ssa
from smsbench.testing.tiny_clip import TINY_CLIP, tiny_clip
from smsbench.clip.tokens import patch_tokens, text_tokens
from smsbench.core import InputError

RNG = np.random.default_rng(0)
FILMS = [RNG.integers(0, 256, s, dtype=np.uint8) for s in ((70, 90, 3), (120, 80), (64, 64))]
TEXTS = ['There is pleural effusion.', 'No pneumothorax in a 63-year-old woman.', 'ß, 5 µm? (J90)']


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
    "kind -> folder of a tiny checkpoint."
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp('clip')
    return {k: tiny_clip(root / k, k) for k in TINY_CLIP}


@pytest.mark.parametrize('kind', TINY_CLIP)
def test_a_trained_model_comes_back(folders, kind, tmp_path):
    """One step of training in memory, saved and loaded.

    The weights are the changed ones, not those of the folder it came from.
    """
    clip = load_clip(str(folders[kind]), device='cpu')
    optimizer = torch.optim.SGD(clip.model.parameters(), lr=0.1)
    x = torch.randn(4, 3, 64, 64)
    image, text = (
        clip.model.encode_image(x, normalize=True),
        clip.model.encode_text(clip.tokenize(['a', 'heart', 'lung', 'edema']), normalize=True),
    )
    torch.nn.functional.cross_entropy(
        image @ text.T * clip.model.logit_scale.exp(), torch.arange(4)
    ).backward()
    optimizer.step()
    again = load_clip(str(save_clip(clip, tmp_path / 'step', step=1)), device='cpu')
    assert again.info['weights_sha'] == weights_sha(clip.model) != clip.info['weights_sha']
    assert np.array_equal(
        image_embeddings(again, FILMS), image_embeddings(clip, FILMS)
    ) and np.array_equal(text_embeddings(again, TEXTS), text_embeddings(clip, TEXTS))


@pytest.mark.parametrize('kind', TINY_CLIP)
def test_tokens_belong_to_the_embeddings(folders, kind):
    "A changed film changes its own patches only; padding changes nothing that is text."
    clip = load_clip(str(folders[kind]), device='cpu')
    x = torch.randn(2, 3, 64, 64)
    y = x.clone()
    y[1] += 1
    with torch.inference_mode():
        a, b = patch_tokens(clip, x), patch_tokens(clip, y)
        t, m = text_tokens(clip, clip.tokenize(TEXTS))
    assert (
        torch.equal(a[0], b[0])
        and not torch.equal(a[1], b[1])
        and a.shape[-1] == t.shape[-1] == clip.info['embed_dim']
    )
    assert m.any(1).all() and not m[:, -1].any() and t.isfinite().all()


@pytest.mark.parametrize('kind', TINY_CLIP)
@pytest.mark.parametrize('precision', ['bf16', 'pure_bf16'])
def test_low_precision_says_nearly_the_same(folders, kind, precision):
    full, low = (
        load_clip(str(folders[kind]), device='cpu', precision=p) for p in ('fp32', precision)
    )
    for a, b in (
        (image_embeddings(full, FILMS), image_embeddings(low, FILMS)),
        (text_embeddings(full, TEXTS), text_embeddings(low, TEXTS)),
    ):
        assert b.dtype == np.float32 and ((a * b).sum(1) > 0.99).all() and not np.array_equal(a, b)


def published(folder, source, **text):
    "A folder with the keys of the published BiomedCLIP: its text tower is named by a hub id."
    shutil.copytree(source, folder)
    config = json.loads((folder / 'open_clip_config.json').read_text())
    config['model_cfg']['text_cfg'] |= (
        dict(
            hf_model_name='microsoft/BiomedNLP-BiomedBERT-base-uncased-abstract',
            hf_tokenizer_name='microsoft/BiomedNLP-BiomedBERT-base-uncased-abstract',
        )
        | text
    )
    config['preprocess_cfg'] = dict(mean=[0.5, 0.4, 0.3], std=[0.2, 0.3, 0.25])
    (folder / 'open_clip_config.json').write_text(json.dumps(config))
    return folder


def test_what_the_folder_holds_goes_before_the_hub(folders, tmp_path, monkeypatch):
    monkeypatch.setattr(
        'huggingface_hub.constants.HF_HUB_OFFLINE', True
    )  # no waiting for a network
    clip = load_clip(str(published(tmp_path / 'biomed', folders['timm-hf'])), device='cpu')
    assert clip.config['preprocess_cfg']['mean'] == (0.5, 0.4, 0.3) and np.array_equal(
        text_embeddings(clip, TEXTS),
        text_embeddings(load_clip(str(folders['timm-hf']), device='cpu'), TEXTS),
    )
    kept = json.loads((save_clip(clip, tmp_path / 'kept') / 'open_clip_config.json').read_text())
    assert (
        kept['model_cfg']['text_cfg']['hf_model_name'].startswith('microsoft/')
        and str(tmp_path)
        not in (tmp_path / 'kept' / 'open_clip_config.json').read_text()
        + (tmp_path / 'kept' / 'smsbench.json').read_text()
    )
    assert load_clip(str(tmp_path / 'kept'), device='cpu').config['preprocess_cfg']['std'] == (
        0.2,
        0.3,
        0.25,
    )
    (tmp_path / 'biomed' / 'config.json').unlink()
    with pytest.raises(InputError, match='without network|cannot be loaded'):
        load_clip(str(tmp_path / 'biomed'), device='cpu')


def test_a_failed_save_leaves_the_old_checkpoint(folders, tmp_path, monkeypatch):
    clip = load_clip(str(folders['native']), device='cpu')
    save_clip(clip, tmp_path / 'best', epoch=1)

    def full(*a, **k):
        raise OSError('no space left on device')

    monkeypatch.setattr(module, 'write_json', full)
    with pytest.raises(OSError, match='no space'):
        save_clip(clip, tmp_path / 'best', epoch=2)
    assert load_clip(str(tmp_path / 'best'), device='cpu').info['about']['epoch'] == 1 and [
        p.name for p in tmp_path.iterdir()
    ] == ['best']


class Code:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize('inside', ['beside the weights', 'in place of the weights'])
def test_code_in_a_pickle_does_not_run(folders, tmp_path, inside):
    weights = load_clip(str(folders['native']), device='cpu').model.state_dict()
    torch.save(
        (
            dict(state_dict=weights, extra=Code(tmp_path / 'ran'))
            if inside.startswith('beside')
            else Code(tmp_path / 'ran')
        ),
        tmp_path / 'weights.pt',
    )
    with pytest.raises(InputError, match='could run code') as e:
        load_clip(str(folders['native']), str(tmp_path / 'weights.pt'), device='cpu')
    assert '\n' not in str(e.value) and not (tmp_path / 'ran').exists()


def test_a_whole_model_in_a_pickle_is_refused(folders, tmp_path):
    torch.save(open_clip.create_model(f"local-dir:{folders['native']}"), tmp_path / 'model.pt')
    with pytest.raises(InputError, match='state_dict'):
        load_clip(str(folders['native']), str(tmp_path / 'model.pt'), device='cpu')


@settings(max_examples=40, deadline=None)
@given(
    h=st.integers(40, 300),
    w=st.integers(40, 300),
    size=st.sampled_from([32, 48, 63, 64, (48, 64)]),
    mode=st.sampled_from(['shortest', 'squash', 'longest']),
)
def test_where_the_film_went(h, w, size, mode):
    """Red is the column of a pixel of the film and green its row.

    So each pixel of the picture shows where it came from.
    """
    cfg = dict(size=size, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0), resize_mode=mode)
    clip = Clip(None, image_transform_v2(PreprocessCfg(**cfg), is_train=False), None, mode, {})
    yy, xx = np.mgrid[:h, :w] + 0.5
    ramp = (
        np.stack([xx / w * 255, yy / h * 255, np.full((h, w), 255.0)], -1).round().astype(np.uint8)
    )
    p, f = clip.preprocess(Image.fromarray(ramp)).permute(1, 2, 0).numpy(), frame_of(clip, h, w)
    assert p.shape[:2] == (f.height, f.width)
    x = f.box[0] + (np.arange(p.shape[1]) + 0.5) * (f.box[2] - f.box[0]) / p.shape[1]
    y = f.box[1] + (np.arange(p.shape[0]) + 0.5) * (f.box[3] - f.box[1]) / p.shape[0]
    reach = [
        3 * max(1.0, (b - a) / n)
        for a, b, n in ((f.box[0], f.box[2], p.shape[1]), (f.box[1], f.box[3], p.shape[0]))
    ]  # bicubic bends at the border
    ix, iy = (
        np.flatnonzero((c > e) & (c < n - e)) for c, n, e in ((x, w, reach[0]), (y, h, reach[1]))
    )
    if not len(ix) or not len(iy):
        return
    inside = p[np.ix_(iy, ix)]
    assert (
        (inside[..., 2] > 0.98).all()
        and np.abs(inside[..., 0] - x[ix] / w).max() * 255 < 1.2
        and np.abs(inside[..., 1] - y[iy][:, None] / h).max() * 255 < 1.2
    )


def test_a_real_tokenizer_that_pads_with_its_end(real_data, folders, tmp_path):
    """OpenAI's vocabulary, as Hugging Face keeps it, pads with the end token.

    The text equals that of open_clip's own tokenizer.
    """
    if not (real_data / 'tokenizers' / 'clip').is_dir():
        pytest.skip('the CLIP tokenizer is not among the real data')
    shutil.copytree(folders['native'], tmp_path / 'hf')
    for f in ('tokenizer.json', 'tokenizer_config.json'):
        shutil.copy(real_data / 'tokenizers' / 'clip' / f, tmp_path / 'hf')
    config = json.loads((tmp_path / 'hf' / 'open_clip_config.json').read_text())
    config['model_cfg']['text_cfg']['hf_tokenizer_name'] = 'openai/clip-vit-base-patch32'
    (tmp_path / 'hf' / 'open_clip_config.json').write_text(json.dumps(config))
    own, real = (
        load_clip(str(folders['native']), device='cpu'),
        load_clip(str(tmp_path / 'hf'), device='cpu'),
    )
    texts = [*TEXTS[:2], 'a chest film ' * 30]
    for t in texts:
        (_, a), (_, b) = (text_tokens(c, c.tokenize([t])) for c in (own, real))
        assert torch.equal(own.tokenize([t])[a], real.tokenize([t])[b]) and a.sum() <= 48
    assert np.allclose(text_embeddings(own, texts), text_embeddings(real, texts), atol=1e-6)
    assert (
        module.cut_texts(own, texts).tolist()
        == module.cut_texts(real, texts).tolist()
        == [False, False, True]
    )


def test_ssa_of_a_saved_cohort(folders, tmp_path):
    """From class folders with facts to the table.

    Five inputs are too many for all orders, and every order gives the same total.
    """
    from smsbench.clip.dataset import images_of
    from smsbench.data.phantom import phantom_cohort

    films = images_of(phantom_cohort(60, splits=dict(val=0.5, test=0.5)))
    test = films.select('test')
    table = ssa(
        clip_predictor(
            load_clip(str(folders['timm-hf']), device='cpu'), test, val=films.select('val')
        ),
        test,
        ['age', 'sex', 'view', 'marker', 'age_band'],
        boot=Bootstrap(20),
    )
    assert table.attrs['n_orders'] == 25 and table.attrs['of_orders'] == 120
    one = table[(table.metric == 'sensitivity') & (table.subgroup == 'class=effusion')]
    assert one[one.step == 5].value.nunique() == 1 and one[one.step == 0].value.nunique() == 1
    total = one[one.step == 5].value.iloc[0] - one[one.step == 0].value.iloc[0]
    assert np.isclose(
        table[
            (table.metric == 'sensitivity_effect') & (table.subgroup == 'class=effusion')
        ].value.sum(),
        total,
    )
