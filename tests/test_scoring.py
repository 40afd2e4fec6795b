"""Every family at every level of reuse.

Answers and delivery are those of plain batch-1 forward passes.
"""

import copy
import os

os.environ.setdefault('HF_HUB_OFFLINE', '1')
os.environ.setdefault('TRANSFORMERS_VERBOSITY', 'error')
from dataclasses import replace

import numpy as np
import pytest
import torch

from smsbench.core import InputError, RunError
from smsbench.vlm import engine as engine_module
from smsbench.vlm import scoring
from smsbench.vlm.families import PLAIN
from smsbench.vlm.model import Inputs, load_model
from smsbench.vlm.scoring import check, fast
from smsbench.testing.tiny import TINY, tiny_checkpoint

pytestmark = pytest.mark.filterwarnings('ignore:__array__ implementation:DeprecationWarning')

RNG = np.random.default_rng(0)
FILMS = [
    RNG.integers(0, 256, s, dtype=np.uint8) for s in ((70, 90, 3), (120, 80), (64, 64, 3))
]  # three shapes: tiled families make another number of tokens of each
REPORTS = [
    'The lungs are clear.',
    'Small left pleural effusion with some consolidation of the lower lobe. ' * 2,
]
QUESTIONS = ['Is there pleural effusion?', 'Does this patient have an effusion? Answer yes or no.']
LONG = ('definitely present', 'absent or so', 'maybe')  # no single token spells these
TRIALS = [
    Inputs(i, f'{r} {q}', ('yes', 'no')) for i in (*FILMS, None) for r in REPORTS for q in QUESTIONS
]
TRIALS += [Inputs(i, f'No pneumothorax. {QUESTIONS[0]}', LONG) for i in (FILMS[0], None)] + TRIALS[
    :3
]
PREFIX = {f for f in TINY if not f.startswith('paligemma')}


@pytest.fixture(scope='module')
def models(tmp_path_factory):
    "family -> (model, its answers at level 0); each made once."
    made, folder = {}, tmp_path_factory.mktemp('tiny')

    def get(family):
        if family not in made:
            torch.set_num_threads(1)
            model = load_model(tiny_checkpoint(family, folder / family), device='cpu')
            made[family] = model, model.score(TRIALS)
        return made[family]

    return get


def difference(a, b):
    return max(
        float(np.abs(np.subtract(x.logprobs, y.logprobs)).max()) for x, y in zip(a, b, strict=True)
    )


def delivery(answers):
    return [(a.pixel_sha, a.token_sha, a.delivered_sha) for a in answers]


@pytest.mark.parametrize('family', TINY)
def test_every_level_is_level_0(models, family):
    model, truth = models(family)
    for level in (0, 1, 2) if family in PREFIX else (0, 1):
        quick = fast(model, level=level, least=8)
        answers = quick.score(TRIALS)
        assert difference(answers, truth) < 1e-4, level
        assert delivery(answers) == delivery(truth), level
        if level:
            assert (
                quick.engine.go.features.encoded
                == sum(r.processor.image_processor.calls for r in quick.readers)
                == len(FILMS)
            )  # each image preprocessed and encoded once
        if level == 2:
            assert quick.engine.stats['forked'] > 0 and quick.engine.stats['lm_tokens'] < sum(
                len(model.encode(x)[0]['input_ids'][0]) for x in TRIALS
            )


@pytest.mark.parametrize('family', TINY)
def test_calibration_finds_the_highest_exact_level(models, family):
    model, truth = models(family)
    quick = fast(model, least=8)
    answers = quick.score(TRIALS)
    assert quick.info['reuse'] == ('prefix' if family in PREFIX else 'features') and quick.info[
        'level'
    ] == (2 if family in PREFIX else 1), quick.info['why']
    assert (
        quick.info['largest_difference'] <= quick.info['tolerance'] == 1e-4
        and difference(answers, truth) < 1e-4
    )
    if family not in PREFIX:
        assert quick.tried['prefix'] > 1e-4  # measured, not looked up


@pytest.mark.parametrize('family', ['llava', 'qwen2_vl', 'gemma3', 'mllama'])
def test_prefixes_of_one_length_share_passes(models, family):
    model, truth = models(family)
    ragged, evened = (
        fast(model, level=2, least=8, wave=9),
        fast(model, level=2, least=8, wave=9, even=2.0),
    )
    ragged.score(TRIALS)
    answers = evened.score(TRIALS)
    assert difference(answers, truth) < 1e-4 and delivery(answers) == delivery(truth)
    assert (
        evened.engine.stats['forwards'] < ragged.engine.stats['forwards']
        and evened.engine.stats['lm_tokens'] > ragged.engine.stats['lm_tokens']
    )


def test_prefix_lm_forced_to_level_2_fails_its_check(models):
    model, _ = models('paligemma2')
    said = check(fast(model, level=2, least=8), TRIALS)
    assert not said.ok and said.undelivered == 0  # delivered as it should be, computed otherwise
    with pytest.raises(RunError, match='level 0'):
        said.require()


def test_check_line(models):
    model, truth = models('llava')
    said = check(fast(model, least=8), TRIALS, n=4, answers=truth)
    assert said.n == 4 and said.ok and '0 flips' in str(said) and 'delivery equal' in str(said)


def test_any_order_any_company(models):
    model, truth = models(
        'qwen2_vl'
    )  # positions on three axes, carried from call to call inside the model
    quick, order = fast(model, level=2, least=8), RNG.permutation(len(TRIALS))
    assert delivery(quick.score([TRIALS[i] for i in order])) == [delivery(truth)[i] for i in order]
    for i in order[:4]:
        assert difference(quick.score([TRIALS[i]]), [truth[i]]) < 1e-4  # alone
    assert quick.score([]) == []


def test_identical_trials_are_scored_once(models):
    model, _ = models('llava')
    quick = fast(model, level=2, least=8)
    copies = [replace(TRIALS[0], image=TRIALS[0].image.copy()) for _ in range(5)] + [
        TRIALS[12]
    ] * 4  # equal pixels in other arrays; the same text without an image
    answers = quick.score(copies)
    assert (
        quick.engine.stats['answer_rows'] == 2
        and quick.engine.go.features.encoded == 1
        and len(set(answers)) == 2
    )
    other = replace(TRIALS[0], choices=('effusion', 'none'))
    quick.score([TRIALS[0], other])
    assert quick.engine.stats['answer_rows'] > 4  # other choices are another trial


@pytest.mark.parametrize('family', ['llava', 'qwen3_vl', 'mllama', 'gemma3'])
def test_a_wrong_feature_is_caught(models, family, monkeypatch):
    model, _ = models(family)
    quick, same = (
        fast(model, level=1),
        [x for x in TRIALS if x.image is not None and x.image.shape[:2] == (70, 90)],
    )
    twin = [
        replace(x, image=255 - x.image) for x in same[:2]
    ]  # another film of the same size: nothing else would notice
    real = quick.engine.go.features.__class__.__call__

    def crossed(self, sha, vision):
        mine = real(self, sha, vision)
        return next((f for s, f in self.store.items() if s != sha), mine)

    monkeypatch.setattr(quick.engine.go.features.__class__, '__call__', crossed)
    with pytest.raises(RunError, match='own image'):
        quick.score(same[:2] + twin)


@pytest.mark.parametrize('family', ['llava', 'qwen3_vl', 'mllama', 'gemma3'])
def test_a_wrong_prefix_is_caught(models, family, monkeypatch):
    model, _ = models(family)
    quick, same = (
        fast(model, level=2, least=8, forks=None),
        [x for x in TRIALS if x.image is not None and x.image.shape[:2] == (70, 90)],
    )
    twin, real = [replace(x, image=255 - x.image) for x in same[:2]], engine_module.fork
    monkeypatch.setattr(
        engine_module, 'fork', lambda cells: real([cells[0]] * len(cells))
    )  # every row continues the first row's prefix
    with pytest.raises(RunError, match='own image'):
        quick.score(same[:2] + twin)


def test_a_wrong_text_prefix_is_caught_and_so_is_an_unknown_one(models, monkeypatch):
    model, _ = models('llava')
    prompts = [
        Inputs(None, f'{r} {q}', ('yes', 'no'))
        for r in ('The left and right lungs are clear.', 'The right and left lungs are clear.')
        for q in QUESTIONS
    ]  # reports of equal length
    quick, real = (
        fast(model, level=2, least=4, forks=None),
        engine_module.fork,
    )  # rows of several prefixes in one pass
    monkeypatch.setattr(engine_module, 'fork', lambda cells: real([cells[0]] * len(cells)))
    with pytest.raises(RunError, match='own text'):
        quick.score(prompts)

    def tampered(cells):
        new = real(cells)
        for layer in new.layers:
            layer.keys = layer.keys * 1.01
        return new

    monkeypatch.setattr(engine_module, 'fork', tampered)
    with pytest.raises(RunError, match='none of those computed'):
        fast(model, level=2, least=4).score(prompts)


def test_the_check_catches_what_calibration_never_saw(models, monkeypatch):
    model, truth = models('llava')
    quick = fast(model, least=8)
    quick.score(TRIALS)
    wrong = [
        replace(a, delivered_sha=b.delivered_sha) for a, b in zip(truth, truth[1:] + truth[:1])
    ]
    assert check(quick, TRIALS, answers=wrong).undelivered > 0


def test_out_of_memory_halves_the_batch_and_goes_on(models, monkeypatch):
    model, truth = models('llava')
    real, refused, fits = model.model.forward, [], [2]

    def narrow(*args, input_ids=None, **kwargs):
        if len(input_ids) > fits[0]:
            refused.append(len(input_ids))
            raise torch.OutOfMemoryError('injected')
        return real(*args, input_ids=input_ids, **kwargs)

    narrow.__signature__ = __import__('inspect').signature(real)
    monkeypatch.setattr(model.model, 'forward', narrow)
    for level in (1, 2):
        refused.clear()
        fits[0] = 3 - level
        quick = fast(model, level=level, least=8)
        answers = quick.score(TRIALS)
        assert (
            refused
            and quick.engine.stats['halved'] == len(refused)
            and quick.engine.max_rows <= fits[0]
        )
        assert difference(answers, truth) < 1e-4 and delivery(answers) == delivery(truth)
        refused.clear()
        quick.score(TRIALS)
        assert not refused  # it has learnt

    def none(*args, **kwargs):
        raise torch.OutOfMemoryError('injected')

    none.__signature__ = narrow.__signature__
    monkeypatch.setattr(model.model, 'forward', none)
    with pytest.raises(RunError, match='does not fit'):
        fast(model, level=2).score(TRIALS)


@pytest.mark.parametrize('family', ['llava', 'gemma3'])
def test_memory_follows_the_budget_not_the_cohort(models, family):
    model, _ = models(family)
    films = [RNG.integers(0, 256, (60, 60), dtype=np.uint8) for _ in range(20)]
    trials = [
        Inputs(f, f'{r} {q}', ('yes', 'no')) for f in films for r in REPORTS for q in QUESTIONS
    ]

    def peak(some, gib):
        quick = fast(model, level=2, least=8, budget_gib=gib, wave=20)
        answers = quick.score(some)
        return quick.engine.stats['peak_bytes'], quick.engine.go.features.cached_bytes, answers

    small = 2e-4  # 210 kB
    few, many, wide = peak(trials[:8], small), peak(trials, small), peak(trials, 1.0)
    assert (
        many[0] <= small * 2**30 < wide[0] and many[0] <= few[0] * 1.5
    )  # ten times the films, the same memory
    assert many[1] <= small * 2**30 / 8 < wide[1]
    assert difference(many[2], wide[2]) < 1e-4 and delivery(many[2]) == delivery(wide[2])


def test_one_bad_input_costs_only_itself(models):
    model, truth = models('llava')
    bad = replace(TRIALS[0], image=TRIALS[0].image.astype(float))
    got = fast(model, level=2, least=8).score_each([TRIALS[0], bad, TRIALS[1]])
    assert isinstance(got[1], InputError) and delivery([got[0], got[2]]) == delivery(truth[:2])


def test_sixteen_bits_do_not_go_above_the_record(models, tmp_path):
    model = load_model(tiny_checkpoint('paligemma', tmp_path / 'p'), dtype='bfloat16', device='cpu')
    quick = fast(model, least=8)
    quick.score(TRIALS)
    assert (
        quick.info['reuse'] == 'features'
        and 'prefix' not in quick.tried
        and quick.info['tolerance'] == scoring.TOLERANCE['bfloat16']
    )


def test_nothing_forked_is_not_a_proof(models):
    model, _ = models('llava')
    quick = fast(model)
    quick.score(TRIALS[:1])
    assert quick.info['reuse'] == 'features' and 'nothing was forked' in quick.tried['prefix']
    quick.score(TRIALS)
    assert quick.info['reuse'] == 'prefix'


def test_a_family_in_no_table_stays_plain(models):
    model, truth = models('llava')
    unknown = copy.copy(model)
    unknown.caps = PLAIN
    quick = fast(unknown)
    assert (
        delivery(quick.score(TRIALS[:3])) == delivery(truth[:3])
        and quick.info['level'] == 0
        and quick.info['why'] == PLAIN.why
    )
