"""Training on cohorts: killed and resumed, and a model that learns.

Also: broken films, credentialed photographs, two processes.
"""

import json, multiprocessing, os, signal, subprocess, sys, time
from multiprocessing import forkserver

import numpy as np, pandas as pd, pytest, torch

from smsbench.clip.dataset import images_of
from smsbench.clip.model import load_clip
from smsbench.clip.zero_shot import zero_shot
from smsbench.testing.tiny_clip import tiny_clip
from smsbench.clip.trainer import TrainSettings, phantom_recipe, train
from smsbench.clip.validation import macro_auroc
from smsbench.cli.commands import main
from smsbench.core import InputError
from smsbench.testing.layouts import make_layout
from smsbench.data.cohort import build_cohort
from smsbench.data.phantom import phantom_cohort, save_phantom
from smsbench.data.splits import apply_splits, make_splits
from smsbench.privacy import read_table, write_table

SETTINGS = dict(
    texts='both',
    epochs=3,
    batch_size=8,
    lr=1e-3,
    layer_decay=0.8,
    ema=0.9,
    balance='rare',
    speak='sensitivity',
    augment=1.0,
    chunk=4,
    stop_on='auroc',
    save_every=1,
)  # all that draws or remembers
WORK = '''
import sys, json, torch
torch.set_num_threads(1)
from smsbench.clip.dataset import images_of
from smsbench.clip.model import load_clip
from smsbench.clip.processes import processes
from smsbench.clip.trainer import TrainSettings, train
from smsbench.data.phantom import phantom_cohort
model, out, settings = sys.argv[1:]
films = images_of(phantom_cohort(50, size=64, seed=5, findings=('opacity', 'effusion')))
with processes('cpu'):
    settings = TrainSettings.from_values(**json.loads(settings))
    train(films, load_clip(model, device='cpu'), settings, out=out)
'''


def work(model, out, settings):
    "What a process of its own does."
    torch.set_num_threads(1)
    films = images_of(phantom_cohort(50, size=64, seed=5, findings=('opacity', 'effusion')))
    train(
        films, load_clip(str(model), device='cpu'), TrainSettings.from_values(**settings), out=out
    )


@pytest.fixture(scope='module')
def start():
    """Starts `work` in a new process.

    It is forked from one that has imported slow libraries and has computed nothing.
    """
    server = multiprocessing.get_context('forkserver')
    server.set_forkserver_preload(
        [
            'torch',
            'torchvision.transforms',
            'open_clip',
            'transformers',
            'sklearn.metrics',
            'smsbench.clip.trainer',
        ]
    )
    with pytest.MonkeyPatch.context() as env:
        for k in ('OMP_NUM_THREADS', 'HF_HUB_OFFLINE'):
            env.setenv(k, '1')
        forkserver.ensure_running()

    def begin(*task):
        p = server.Process(target=work, args=task)
        p.start()
        return p

    return begin


def finish(p):
    p.join(300)
    assert p.exitcode == 0  # what it said is in the captured output


@pytest.fixture(scope='module')
def model(tmp_path_factory):
    return tiny_clip(
        tmp_path_factory.mktemp('clip') / 'timm-hf', 'timm-hf'
    )  # its text tower has dropout


def state(out):
    try:
        return torch.load(out / 'checkpoints' / 'last.pt', weights_only=True)
    except FileNotFoundError:
        return None


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(
            same(a[k], b[k]) for k in a if k not in ('films_per_second', 'seconds')
        )
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b or (a != a and b != b)


def test_killed_in_the_middle_of_an_epoch(tmp_path, model, start):
    whole, often = tmp_path / 'whole', tmp_path / 'often'
    finish(start(model, whole, SETTINGS))
    per_epoch = state(whole)['history'][1]['steps']
    assert per_epoch >= 3
    for target in (1, per_epoch + 2):  # so many steps are to be done, then the process dies
        p = start(model, often, SETTINGS)
        while (s := state(often)) is None or s['epoch'] * per_epoch + s['step'] < target:
            assert p.is_alive()
            time.sleep(0.002)
        os.kill(p.pid, signal.SIGKILL)
        p.join()
        assert p.exitcode == -signal.SIGKILL  # it had not come to its end
    s = state(often)
    assert not s['stopped'] and s['epoch'] * per_epoch + s['step'] < 3 * per_epoch
    finish(start(model, often, SETTINGS))
    assert same(state(whole), state(often))  # weights, optimizer, average, random numbers, history
    a, b = (
        load_clip(str(whole / 'best'), device='cpu'),
        load_clip(str(often / 'best'), device='cpu'),
    )
    assert (
        a.info['weights_sha'] == b.info['weights_sha']
        and a.info['weights_sha'] != load_clip(str(model), device='cpu').info['weights_sha']
    )
    assert (often / 'log.txt').read_text().count('goes on after') == 2
    assert (
        pd.read_csv(often / 'history.csv')
        .drop(columns='films_per_second')
        .equals(pd.read_csv(whole / 'history.csv').drop(columns='films_per_second'))
    )


def test_two_processes_train_as_one(tmp_path, start):
    settings = dict(texts='prompts', epochs=2, batch_size=8, lr=1e-4, augment=0.0)
    model = tiny_clip(tmp_path / 'native', 'native')
    (tmp_path / 'work.py').write_text(WORK)  # without dropout, which every process draws for itself
    finish(start(model, tmp_path / 'one', settings))
    launch = [
        sys.executable,
        '-m',
        'torch.distributed.run',
        '--standalone',
        '--nproc-per-node',
        '2',
        tmp_path / 'work.py',
        model,
        tmp_path / 'two',
        json.dumps(settings),
    ]
    two = subprocess.run(
        list(map(str, launch)),
        capture_output=True,
        text=True,
        timeout=1500,
        env={**os.environ, 'OMP_NUM_THREADS': '1', 'HF_HUB_OFFLINE': '1'},
    )
    assert two.returncode == 0, two.stderr[-2000:]
    a, b = state(tmp_path / 'one')['history'], state(tmp_path / 'two')['history']
    assert [r['steps'] for r in a] == [r['steps'] for r in b]
    for x, y in zip(a, b):
        assert abs(x['val_loss'] - y['val_loss']) < 1e-4 and (
            x['epoch'] == 0 or abs(x['train_loss'] - y['train_loss']) < 1e-4
        )
    assert (tmp_path / 'two' / 'log.txt').read_text().count('epoch 1:') == 1  # one process speaks


def test_broken_films_are_left_out_before_the_first_epoch(tmp_path, model):
    save_phantom(phantom_cohort(60, size=64, findings=('effusion', 'opacity')), tmp_path / 'data')
    cohort, _ = build_cohort('phantom', tmp_path / 'data', check_expected=False)
    films = images_of(cohort)
    bad = films.table[films.table.split == 'train'].iloc[[2, 5]]
    (tmp_path / 'data' / bad.image.iloc[0]).write_bytes(
        (tmp_path / 'data' / bad.image.iloc[0]).read_bytes()[:200]
    )
    (tmp_path / 'data' / bad.image.iloc[1]).unlink()
    settings = TrainSettings(texts='prompts', epochs=1, batch_size=8, lr=1e-3, max_broken=0.1)
    done = train(films, load_clip(str(model), device='cpu'), settings, out=tmp_path / 'run')
    left = read_table(tmp_path / 'run' / 'excluded.parquet')
    assert (
        set(left.film_id) == set(bad.film_id)
        and set(left.reason) == {'truncated image', 'missing image'}
        and done.excluded.equals(left)
    )
    assert '2 images cannot be read' in (tmp_path / 'run' / 'log.txt').read_text()
    with pytest.raises(InputError, match='films cannot be read'):
        train(
            films,
            load_clip(str(model), device='cpu'),
            TrainSettings(texts='prompts', epochs=1, batch_size=8, lr=1e-3, max_broken=0.01),
            out=tmp_path / 'strict',
        )


def test_a_broken_film_does_not_end_an_analysis_by_steps(tmp_path, model, capsys):
    save_phantom(phantom_cohort(120, size=64, findings=('effusion', 'opacity')), tmp_path / 'data')
    cohort, _ = build_cohort('phantom', tmp_path / 'data', check_expected=False)
    bad = cohort[cohort.split == 'test'].image.iloc[0]
    (tmp_path / 'data' / bad).unlink()
    write_table(cohort, tmp_path / 'films.parquet', 'cohort')
    words = [
        'clip',
        'ssa',
        '--cohort',
        str(tmp_path / 'films.parquet'),
        '--steps',
        'sex',
        '--n-boot',
        '20',
        '--findings',
        'opacity,effusion',
        '--out',
    ]
    assert (
        main([*words, str(tmp_path / 'clip'), '--model', str(model), '--wording', 'added']) == 0
        and main([*words, str(tmp_path / 'vlm'), '--vlm', 'planted:image-only']) == 0
    )
    assert '1 picture(s) cannot be read' in capsys.readouterr().out
    for kind in ('clip', 'vlm'):
        assert pd.read_csv(tmp_path / kind / 'tables' / 'excluded.csv').reason.tolist() == [
            'missing image'
        ]
        assert pd.read_csv(tmp_path / kind / 'tables' / 'effects.csv').group.tolist() == [
            'opacity',
            'effusion',
            'mean of 2 classes',
        ]  # the order asked for


def test_published_learning_rate_is_refused(tmp_path, model):
    films = images_of(phantom_cohort(60, size=64, findings=('effusion',)))
    with pytest.raises(InputError, match='1e-08 cannot move these weights'):
        train(
            films,
            load_clip(str(model), device='cpu'),
            TrainSettings(texts='prompts', epochs=100, batch_size=8, lr=1e-8),
            out=tmp_path / 'run',
        )


def test_class_folders_of_credentialed_photographs(tmp_path, model):
    make_layout('class_folders', tmp_path / 'data')
    cohort, _ = build_cohort('class_folders', tmp_path / 'data', check_expected=False)
    films = images_of(cohort)
    assert (
        films.kind == 'multiclass'
        and len(films.classes) == 3
        and (films.targets.sum(axis=1) == 1).all()
        and films.attrs['access'] == 'credentialed'
    )
    n = int((films.table.split == 'train').sum())
    train(
        films,
        load_clip(str(model), device='cpu'),
        TrainSettings(
            texts='prompts',
            epochs=2,
            batch_size=max(2, n // 2),
            lr=1e-3,
            balance='balanced',
            speak='sensitivity',
        ),
        out=tmp_path / 'run',
    )
    names = (
        {p.stem for p in (tmp_path / 'data').rglob('*.*')}
        | set(films.table.image)
        | {p for p in films.table.patient_id if len(p) > 3}
    )
    written = ' '.join(
        p.read_text(errors='replace')
        for p in (tmp_path / 'run').rglob('*')
        if p.is_file()
        and p.suffix in ('.json', '.csv', '.txt', '.parquet')
        and 'token' not in p.name
    )
    assert not [
        n for n in names if len(n) > 3 and n in written
    ]  # neither files nor people are named


def test_a_tiny_model_learns_three_findings(tmp_path):
    torch.set_num_threads(1)
    films, clip, settings = phantom_recipe(tmp_path)
    begin = time.process_time()
    done = train(films, clip, settings, out=tmp_path / 'run')
    test = films.select('test')
    before = macro_auroc(
        zero_shot(load_clip(str(tmp_path / 'resnet'), device='cpu'), test), test.targets
    )
    after = macro_auroc(zero_shot(done.clip('cpu'), test), test.targets)
    print(
        f'\nAUROC on {len(test)} test films: random weights {before[0]:.3f}, trained {after[0]:.3f}'
        f' ({dict(zip(films.classes, np.round([*after[1].values()], 3)))}),'
        f' {time.process_time() - begin:.0f} s CPU'
    )
    assert after[0] > 0.9 and min(after[1].values()) > 0.8 and after[0] > before[0] + 0.1


def test_real_films(real_data, tmp_path, model):
    nih, _ = build_cohort('nih_cxr', real_data / 'nih_cxr', check_images=False, limit=120)
    films = images_of(
        nih,
        also=[
            'Infiltration',
            'Mass',
            'Nodule',
            'Pneumothorax',
            'Emphysema',
            'Fibrosis',
            'Pleural_Thickening',
            'Hernia',
        ],
    )
    assert len(films.classes) == 14 and films.kind == 'multilabel' and len(films) == 120
    done = train(
        films,
        load_clip(str(model), device='cpu'),
        TrainSettings(texts='prompts', epochs=1, batch_size=16, lr=1e-3),
        out=tmp_path / 'nih',
    )
    assert np.isfinite(done.history.val_loss).all()
    organs, _ = build_cohort('vqa_rad', real_data / 'vqa_rad', check_images=True)
    with pytest.raises(InputError, match='more than one split'):
        images_of(organs, by='organ')
    with pytest.raises(InputError, match='contradict'):
        images_of(organs)
    films = images_of(apply_splits(organs, make_splits(organs, by=('organ',))), by='organ')
    assert films.classes == ['ABD', 'CHEST', 'HEAD'] and len(films) == 294
