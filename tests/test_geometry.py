"""Position of the film in a prompt: every cell of every view, for every family.

Compared with what the processors themselves show.
"""

import json, logging

import numpy as np, pytest, transformers as tf
from PIL import Image

from smsbench.core import InputError
from smsbench.vlm.families import FAMILIES
from smsbench.vlm.image_tokens import patch_check, token_layout
from smsbench.vlm.model import Inputs, load_model
from smsbench.vlm.kv_cache import reader
from smsbench.testing.tiny import tiny_checkpoint

tf.logging.set_verbosity_error()
tf.logging.disable_progress_bar()
logging.getLogger('transformers').setLevel(logging.ERROR)
SHAPES = (96, 96), (90, 130), (160, 70), (64, 333)
every_family = pytest.mark.parametrize('family', list(FAMILIES))


@pytest.fixture(scope='module')
def vlms(tmp_path_factory):
    root, loaded = tmp_path_factory.mktemp('geometry'), {}

    def vlm(family):
        if family not in loaded:
            loaded[family] = load_model(
                tiny_checkpoint(family, root / family, seed=1), device='cpu'
            )
        return loaded[family]

    return vlm


def asked(film):
    return Inputs(film, 'Is there pleural effusion? Answer yes or no.', ('yes', 'no'))


@every_family
@pytest.mark.parametrize('shape', SHAPES, ids=str)
def test_a_bright_patch_is_found_where_the_layout_says(vlms, family, shape):
    found = patch_check(vlms(family), *shape, n=10)
    assert len(found) and (found.off == 0).mean() >= 0.9 and (found.off <= 1).all(), found[
        found.off > 0
    ]


def _gradient(h, w):
    "A film whose red says x, whose green says y and whose blue tells it from padding."
    yy, xx = np.mgrid[:h, :w] + 0.5
    return (
        np.stack([xx / w * 200 + 20, yy / h * 200 + 20, np.full((h, w), 250)], -1)
        .round()
        .astype(np.uint8)
    )


def _boxes(ip, shape):
    """The part of a film that each picture from an image processor shows.

    In pixels of the film; None where the picture is padding only.
    """
    h, w = shape
    values = np.asarray(
        ip(images=[Image.fromarray(_gradient(h, w))], return_tensors='np')['pixel_values'], float
    )
    for p in values.reshape(-1, 3, *values.shape[-2:]):
        p = (p * np.reshape(ip.image_std, (3, 1, 1)) + np.reshape(ip.image_mean, (3, 1, 1))) * 255
        (H, W), inside = p.shape[1:], p[2] > 245
        inside[:3], inside[-3:], inside[:, :3], inside[:, -3:] = 0, 0, 0, 0
        for _ in range(3):
            inside = (
                inside
                & np.roll(inside, 1, 0)
                & np.roll(inside, -1, 0)
                & np.roll(inside, 1, 1)
                & np.roll(inside, -1, 1)
            )
        r, c = np.nonzero(inside)
        if len(set(r)) < 4 or len(set(c)) < 4:
            yield None
            continue
        kx, ky = (
            np.polyfit(c + 0.5, (p[0][inside] - 20) / 200 * w, 1),
            np.polyfit(r + 0.5, (p[1][inside] - 20) / 200 * h, 1),
        )
        yield np.array([np.polyval(kx, 0), np.polyval(ky, 0), np.polyval(kx, W), np.polyval(ky, H)])


def _images(view, parts):
    "The boxes of a view's `parts` = (rows, columns) pictures, in reading order."
    (x0, y0, x1, y1), (rows, columns) = view.box, parts
    xs, ys = np.linspace(x0, x1, columns + 1), np.linspace(y0, y1, rows + 1)
    return [
        np.array([xs[c], ys[r], xs[c + 1], ys[r + 1]]) for r in range(rows) for c in range(columns)
    ]


# cells along one edge of a tile, and where the whole film stands among the pictures
ORDER = dict(
    llava=(4, 0),
    paligemma=(4, 0),
    paligemma2=(4, 0),
    gemma3=(4, 0),
    janus=(4, 0),
    mllama=(4, None),
    idefics3=(4, -1),
    smolvlm=(4, -1),
    internvl=(2, -1),
)


@pytest.mark.parametrize('family', list(ORDER))
@pytest.mark.parametrize('shape', SHAPES[:3], ids=str)
def test_the_processor_itself_shows_the_boxes_of_the_layout(vlms, family, shape):
    m, (edge, _) = vlms(family), ORDER[family]
    lay = token_layout(m, asked(_gradient(*shape)))
    told = [b for v in lay.views for b in _images(v, (v.grid[0] // edge, v.grid[1] // edge))]
    shown = list(_boxes(m.processor.image_processor, shape))
    assert len(shown) >= len(told) and sum(b is not None for b in shown) >= max(1, len(told) - 3)
    for b, t in zip(shown, told):
        assert b is None or np.allclose(b, t, atol=0.015 * max(shape)), (family, b, t)


@every_family
def test_a_reader_of_the_same_model_sees_the_same_layout(vlms, family):
    again = reader(vlms(family))
    again.processor.image_processor.turn('a film')
    a, b = (token_layout(m, asked(_gradient(90, 130))) for m in (vlms(family), again))
    assert np.array_equal(a.image, b.image) and all(
        v.box == u.box and np.array_equal(v.positions, u.positions)
        for v, u in zip(a.views, b.views)
    )


def test_a_processor_of_another_resolution_is_an_error(tmp_path):
    folder = tiny_checkpoint('idefics3', tmp_path / 'one')
    name = next(
        p
        for p in (folder / 'preprocessor_config.json', folder / 'processor_config.json')
        if p.is_file()
    )
    told = json.loads(name.read_text())
    inner = told.get('image_processor', told)
    inner['max_image_size'] = dict(longest_edge=56)
    name.write_text(json.dumps(told))
    m = load_model(folder, device='cpu')
    m.model.config.scale_factor = 4
    with pytest.raises(InputError, match='belong'):
        token_layout(m, asked(_gradient(90, 130)))
