"One training step: every tower in chunks, two real processes, memory, and open_clip's own losses."

import copy, os, signal, socket, subprocess, sys
from pathlib import Path

os.environ.setdefault('HF_HUB_OFFLINE', '1')
os.environ.setdefault('TRANSFORMERS_VERBOSITY', 'error')
import pytest
import torch

from smsbench.clip.losses import (
    LOSSES,
    clamped_scale,
    entropy_floor,
    fits_prompt,
    info_nce,
    same_group,
    siglip_loss,
    soft_targets,
)
from smsbench.clip.model import load_clip
from smsbench.clip.train_step import batch_positives, hold_statistics, train_step
from smsbench.testing.tiny_clip import TINY_CLIP, tiny_clip
from smsbench.core import InputError, RunError

REPORTS = [
    'No acute disease.',
    'Left pleural effusion.',
    'Cardiomegaly with edema.',
    'The lungs are clear.',
]


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
    "kind -> tiny checkpoint."
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp('tiny')
    return {kind: tiny_clip(root / kind, kind) for kind in TINY_CLIP}


def prepared(folder, n=8):
    "A model and a batch of pairs: two classes, of two reports each."
    clip = load_clip(str(folder), device='cpu')
    side = clip.info['image_size'][0]
    draw = torch.Generator().manual_seed(0)
    return clip.model, dict(
        pixels=torch.randn(n, 3, side, side, generator=draw),
        text=clip.tokenize([REPORTS[i % 4] for i in range(n)]),
        groups=torch.arange(n) % 2,
    )


def stepped(model, batch, optimizer=torch.optim.SGD, **how):
    "A copy after one step, its gradients, and what the step found; without dropout."
    m = copy.deepcopy(model).eval()
    found = train_step(m, batch, optimizer(m.parameters(), lr=0.01), **how)
    return m, {n: p.grad for n, p in m.named_parameters() if p.grad is not None}, found


def apart(a, b):
    """Largest relative difference of a weight's gradient.

    One that should vanish is measured against a thousandth of all.
    """
    assert a.keys() == b.keys()
    floor = 0.001 * torch.nn.utils.get_total_norm(b.values())
    return max(float((a[n] - b[n]).norm() / (b[n].norm() + floor)) for n in a)


@pytest.mark.parametrize('kind', TINY_CLIP)
def test_chunks_of_every_tower_give_the_gradient_of_the_batch(folders, kind):
    model, batch = prepared(folders[kind])
    loss = 'siglip' if kind == 'siglip' else 'info_nce'
    for own in (batch, {k: v for k, v in batch.items() if k != 'groups'}):
        plain = copy.deepcopy(model).eval()
        image, text = (
            plain.encode_image(own['pixels'], normalize=True),
            plain.encode_text(own['text'], normalize=True),
        )
        value = LOSSES[loss](
            image, text, plain.logit_scale.exp(), plain.logit_bias, batch_positives(own)
        )
        value.backward()
        truth = {n: p.grad for n, p in plain.named_parameters() if p.grad is not None}
        for chunks in (1, 2, 5):
            _, grads, found = stepped(model, own, chunks=chunks, loss=loss)
            assert abs(found.loss - value.item()) < 1e-4 and apart(grads, truth) < 1e-3, (
                chunks,
                found,
                apart(grads, truth),
            )


class Held:
    "Most bytes that graphs hold at once."

    def __init__(self):
        self.now = self.most = 0

    def pack(self, tensor):
        box = Box(tensor, self)
        self.now += box.bytes
        self.most = max(self.most, self.now)
        return box


class Box:
    def __init__(self, tensor, held):
        self.tensor, self.held, self.bytes = tensor, held, tensor.numel() * tensor.element_size()

    def __del__(self):
        self.held.now -= self.bytes


def test_memory_follows_the_chunk_not_the_batch(folders):
    def peak(n, chunks):
        model, batch = prepared(folders['timm-hf'], n)
        held = Held()
        with torch.autograd.graph.saved_tensors_hooks(held.pack, lambda box: box.tensor):
            stepped(model, batch, chunks=chunks)
        return held.most

    whole, cut, larger = peak(16, 1), peak(16, 8), peak(48, 24)
    weights = sum(
        p.numel() * 4 for p in prepared(folders['timm-hf'])[0].parameters()
    )  # a graph also refers to weights: they are there anyway
    assert cut - weights < (whole - weights) / 4, (whole, cut, weights)
    assert larger < 1.1 * cut, (cut, larger)  # three times the batch, the same chunk


def test_checkpointed_activations_agree(folders):
    model, batch = prepared(folders['native'])
    _, truth, _ = stepped(model, batch)
    model.set_grad_checkpointing()
    assert apart(stepped(model, batch, chunks=3)[1], truth) < 1e-4


def test_residual_networks_refuse_chunks_until_their_statistics_are_held(folders):
    model, batch = prepared(folders['resnet'])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    model.train()
    with pytest.raises(InputError, match='batch_norm=hold'):
        train_step(model, batch, optimizer, chunks=2)
    assert hold_statistics(model) > 0
    before = {n: b.clone() for n, b in model.named_buffers()}
    train_step(model, batch, optimizer, chunks=2)
    assert all(torch.equal(b, before[n]) for n, b in model.named_buffers())


def test_training_learns_the_classes(folders):
    model, batch = prepared(folders['timm-hf'])
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=3e-3)
    torch.manual_seed(0)
    losses = [train_step(model, batch, optimizer, chunks=2, clip_norm=1.0).loss for _ in range(40)]
    floor = float(entropy_floor(soft_targets(batch['groups'])))
    assert losses[-1] - floor < 0.3 * (losses[0] - floor), (losses[0], losses[-1], floor)


def test_losses_on_random_batches_are_those_of_open_clip():
    from open_clip.loss import ClipLoss, SigLipLoss

    for seed in range(5):
        torch.manual_seed(seed)
        image, text = torch.nn.functional.normalize(torch.randn(2, 17 + seed, 32), dim=-1)
        scale, bias = clamped_scale(torch.randn(()) + 3), torch.randn(()) - 8
        assert torch.allclose(
            info_nce(image, text, scale), ClipLoss()(image, text, scale), rtol=1e-5
        )
        assert torch.allclose(
            siglip_loss(image, text, scale, bias=bias),
            SigLipLoss()(image, text, scale, bias),
            rtol=1e-5,
        )
        labels, asked, answer = (
            (torch.rand(17 + seed, 3) < 0.5).float(),
            torch.randint(3, (17 + seed,)),
            torch.randint(2, (17 + seed,)),
        )
        fits = fits_prompt(labels, asked, answer)
        by_hand = torch.tensor(
            [
                [i == j or bool(labels[i, asked[j]] == answer[j]) for j in range(17 + seed)]
                for i in range(17 + seed)
            ]
        )
        assert torch.equal(fits, by_hand)


TWO = '''
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import torch
from test_clip_steps import prepared, stepped
from smsbench.clip.losses import same_group
from smsbench.clip.processes import processes, share_weights
from smsbench.clip.train_step import train_step
from smsbench.core import InputError, RunError
torch.set_num_threads(1)

def share(batch, here, n=4):
    return {k: v[here.rank * n:here.rank * n + n] for k, v in batch.items()}
def refused(kind, call):
    try: call()
    except kind as e: return str(e)
    raise AssertionError('accepted')

with processes('cpu', patience=60) as here:
    out = {}
    for kind in ('timm-hf', 'siglip'):
        model, batch = prepared(Path(sys.argv[2])/kind)
        with torch.no_grad():
            for p in model.parameters(): p.add_(.01 * here.rank)  # other weights in process 1 ...
        share_weights(model)  # ... no longer
        answer = torch.tensor([1., 1, 0, 1, 1, 0, 1, 1])
        asked = torch.arange(2).repeat(4)
        batch |= dict(labels=torch.eye(2).repeat(4, 1), asked=asked, answer=answer)
        prompts = ('labels', 'asked', 'answer')
        for name, keys in dict(diagonal=(), groups=('groups',), prompts=prompts).items():
            mine = share({k: batch[k] for k in ('pixels', 'text', *keys)}, here)
            for chunks in (1, 2):
                loss = 'siglip' if kind == 'siglip' else 'info_nce'
                m, grads, found = stepped(model, mine, chunks=chunks, loss=loss, clip_norm=1e9)
                told = found.loss, found.pairs, found.grad_norm, grads, m.state_dict()
                out[kind, name, chunks] = told
    model.visual.requires_grad_(False)  # a locked tower: nothing to send back
    _, out['locked'], _ = stepped(model, mine, loss='siglip')
    model.requires_grad_(True)
    wrapped = torch.nn.parallel.DistributedDataParallel(model)
    train_step(wrapped, mine, torch.optim.SGD(model.parameters(), lr=0.), loss='siglip')
    out['wrapped'] = {n: p.grad for n, p in model.named_parameters()}
    # in one process only: both stop
    bad = mine | dict(pixels=mine['pixels'] * (float('nan') if here.rank else 1.))
    out['nan'] = refused(RunError, lambda: stepped(model, bad, loss='siglip'))
    few = {k: v[:4 - here.rank] for k, v in mine.items()}
    out['unequal'] = refused(InputError, lambda: stepped(model, few, loss='siglip'))
    torch.save(out, Path(sys.argv[3])/f'{here.rank}.pt')
'''


def torchrun(script, *args, processes=2, timeout=1500):
    "Start it as a person would; nothing stays behind."
    with socket.create_server(('127.0.0.1', 0)) as s:
        port = s.getsockname()[1]
    command = [
        Path(sys.executable).parent / 'torchrun',
        '--nproc_per_node',
        str(processes),
        '--master_addr',
        '127.0.0.1',
        '--master_port',
        str(port),
        str(script),
        *map(str, args),
    ]
    p = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env={**os.environ, 'OMP_NUM_THREADS': '1'},
    )
    try:
        said, _ = p.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(p.pid, signal.SIGTERM)  # torchrun ends its own processes
        said, _ = p.communicate(timeout=600)
        pytest.fail(f'torchrun took longer than {timeout} s: {said[-2000:]}')
    assert p.returncode == 0, said[-4000:]


@pytest.fixture(scope='module')
def two(folders, tmp_path_factory):
    "What each of two gloo processes found, with half of the batch each."
    out = tmp_path_factory.mktemp('two')
    (out / 'two.py').write_text(TWO)
    torchrun(out / 'two.py', Path(__file__).parent, folders['timm-hf'].parent, out)
    return [torch.load(out / f'{rank}.pt', weights_only=True) for rank in (0, 1)]


@pytest.mark.parametrize('targets', ('diagonal', 'groups', 'prompts'))
@pytest.mark.parametrize('kind', ('timm-hf', 'siglip'))
def test_two_processes_are_one(two, folders, kind, targets):
    "Loss, gradients and weights after the step equal those of one process with the joint batch."
    model, batch = prepared(folders[kind])
    answer = torch.tensor([1.0, 1, 0, 1, 1, 0, 1, 1])
    positives = dict(
        diagonal=None,
        groups=same_group(batch['groups']),
        prompts=fits_prompt(torch.eye(2).repeat(4, 1), torch.arange(2).repeat(4), answer),
    )[targets]
    one, truth, alone = stepped(
        model,
        batch,
        loss='siglip' if kind == 'siglip' else 'info_nce',
        match=lambda joint: positives,
    )
    for found in two:
        for chunks in (1, 2):
            loss, pairs, norm, grads, state = found[kind, targets, chunks]
            assert (
                pairs == 8
                and abs(loss - alone.loss) < 1e-4
                and abs(norm / alone.grad_norm - 1) < 1e-3
            )  # no factor of the number of processes
            assert apart(grads, truth) < 1e-3, apart(grads, truth)
            assert all(
                torch.allclose(state[n], v, atol=1e-3 * float(v.abs().max()) + 1e-7)
                for n, v in one.state_dict().items()
            )
    assert all(
        torch.equal(two[0][kind, targets, c][4][n], two[1][kind, targets, c][4][n])
        for c in (1, 2)
        for n in one.state_dict()
    )  # both hold the same weights
    if targets != 'diagonal':
        assert (
            abs(two[0][kind, targets, 1][0] - two[0][kind, 'diagonal', 1][0]) > 1e-3
        )  # positives across processes count


def test_a_wrapped_model_is_averaged_once_and_a_locked_tower_not_at_all(two):
    for found in two:
        truth = found['siglip', 'prompts', 1][3]
        assert apart(found['wrapped'], truth) < 1e-5
        assert (
            apart(found['locked'], {n: g for n, g in truth.items() if not n.startswith('visual.')})
            < 1e-5
        )


def test_what_one_process_cannot_train_stops_both(two):
    for found in two:
        assert 'weights are as before' in found['nan'] and '[4, 3]' in found['unequal']


def test_half_precision_with_a_scaler(folders):
    model, batch = prepared(folders['timm-hf'])
    _, truth, exact = stepped(model, batch)
    for precision in ('bf16', 'fp16'):
        scaler = torch.amp.GradScaler('cpu', init_scale=256.0) if precision == 'fp16' else None
        _, grads, found = stepped(model, batch, chunks=2, precision=precision, scaler=scaler)
        near = torch.nn.functional.cosine_similarity(
            *(torch.cat([g[n].flatten() for n in truth]) for g in (grads, truth)), dim=0
        )
        assert (
            abs(found.loss - exact.loss) < 0.05
            and near > 0.98
            and abs(found.grad_norm / exact.grad_norm - 1) < 0.1
        )  # unscaled again
    with pytest.raises(InputError, match='GradScaler'):
        stepped(model, batch, precision='fp16')
    with pytest.raises(RunError, match='clip_norm'):
        stepped(model, batch | dict(pixels=batch['pixels'] * float('inf')))
