"""Several processes share a batch: the same gradient, metrics and weights as one; a process that dies ends the run, which goes on later."""
import io
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest
import torch
import torch.distributed as dist
from torch import nn

from conftest import ROOT, processes
from pcl_nb import methods, models, runs, training
from pcl_nb.base import core, distributed

SECONDS = 300  # nothing takes this long, unless it hangs
# Every method, with both sides trained and the other forms of CPC; the batch also in two micro-batches.
STEPS = ([(name, {}, 1) for name in methods.METHODS] + [('pcl', dict(detach=False, cpc_distance='js'), 1),
    ('pcl', dict(cpc_distance='correlation'), 1), ('pcl', {}, 2), ('has', {}, 2)])


class Net(nn.Module):
    "A CNN without batch normalisation: each image by itself."
    def __init__(self):
        super().__init__()
        self.stem, self.stage3, self.stage4 = (nn.Sequential(nn.Conv2d(a, b, 3, 2, 1), nn.ReLU()) for a, b in ((3, 8), (8, 12), (12, 16)))
        self.fc = nn.Linear(16, 16)

    def forward(self, x): return self.fc(self.stage4(self.stage3(self.stem(x))).mean((2, 3)))


def network(side):
    "Its staged form, the same in each process."
    with core.seeded('net'): return models.wrap(Net(), dict(stage3='stage3', stage4='stage4'), 'fc', side)


def gradient(name, options, accumulate):
    "All gradients of one training step, and the loss items, of this process' share of a batch of 12."
    method = methods.get_method(name, **options)
    model = method.prepare(network(method.side)).double()
    g = torch.Generator().manual_seed(1)
    x, y = torch.randn(12, 3, 32, 32, generator=g, dtype=torch.float64), torch.randint(16, (12,), generator=g)
    rank, ranks = distributed.shard()
    with core.seeded('step'):
        _, items = training.train_step(model, method, torch.optim.SGD(model.parameters(), .1), x[rank::ranks], y[rank::ranks],
            accumulate=accumulate)
    return torch.cat([p.grad.flatten() for p in model.parameters()]), torch.stack([*items.values()])


def normed_gradient():
    "The same for PCL on a ResNet, with the batch norms' running statistics."
    method = methods.get_method('pcl')
    with core.seeded('resnet'): model = models.create_model('resnet18', 5, width=.25, small_input=True, side=True, init='torchvision').double().eval()
    x, y = torch.randn(4, 3, 28, 28, generator=torch.Generator().manual_seed(1), dtype=torch.float64), torch.arange(4)
    rank, ranks = distributed.shard()
    _, items = training.train_step(model, method, torch.optim.SGD(model.parameters(), .1), x[rank::ranks], y[rank::ranks])
    return torch.cat([p.grad.flatten() for p in model.parameters()]), torch.stack([*items.values()])


def statistics(name):
    "Running statistics after a step with this process' share of a batch, in one row."
    method = methods.get_method(name)
    with core.seeded('resnet'): model = models.create_model('resnet18', 5, width=.25, small_input=True, side=True, init='torchvision')
    x, y = torch.randn(8, 3, 28, 28, generator=torch.Generator().manual_seed(1)), torch.arange(8) % 5
    rank, ranks = distributed.shard()
    training.train_step(model, method, torch.optim.SGD(model.parameters(), .1), x[rank::ranks], y[rank::ranks])
    return torch.cat([b.flatten().double() for b in model.buffers()])


SMOKE = runs.recipe_for('smoke', method='pcl', train=32, val=32, epochs=2, validate_every=1)
OWN = runs.recipe_for('smoke', arch='custom', method='pcl', train=32, val=21, epochs=2, validate_every=1)


def trained(recipe, model=None):
    "Metrics of a training, and all weights and buffers in one row."
    fitted = training.fit(recipe, model, device='cpu', progress=False)
    return fitted.metrics, torch.cat([v.flatten().double() for v in fitted.model.state_dict().values()])


def refused(recipe):
    "What a recipe is refused with, in this process."
    try: training.fit(recipe, device='cpu', progress=False)
    except (core.InputError, FloatingPointError) as e: return str(e)


def member(folder, rank, ranks):
    "In a child: one process of the group does all that the tests look at, and leaves it in a file."
    torch.set_num_threads(1)
    dist.init_process_group('gloo', init_method=f'file://{folder}/meet', rank=rank, world_size=ranks)
    found = dict(steps=[gradient(*s) for s in STEPS], normed=normed_gradient(),
        statistics=[statistics(n) for n in ('baseline', 'pcl', 'amloss')], own=trained(OWN, network(True)), smoke=trained(SMOKE),
        refused=[refused(runs.recipe_for('smoke', **c))
            for c in (dict(batch=15), dict(accumulate=16), dict(sync_bn=True), dict(lr=1e6))],
        sizes=[tuple(distributed.joint(torch.full((2, 3), float(rank)))[:, 0].tolist())])
    torch.save(found, folder/f'{rank}.pt')
    dist.destroy_process_group()


@pytest.fixture(scope='module')
def group(tmp_path_factory):
    "What each of two processes found."
    folder = tmp_path_factory.mktemp('group')
    children = [processes.Process(target=member, args=(folder, rank, 2), daemon=True) for rank in range(2)]
    for c in children: c.start()
    for c in children: c.join(SECONDS)
    hangs = [c for c in children if c.is_alive()]
    for c in hangs: c.kill()
    assert not hangs and [c.exitcode for c in children] == [0, 0]
    return [torch.load(folder/f'{rank}.pt', weights_only=False) for rank in range(2)]


@pytest.mark.parametrize('step', range(len(STEPS)), ids=['-'.join(map(str, [n, *o.values(), a])) for n, o, a in STEPS])
@pytest.mark.slow
def test_gradient_is_that_of_one_process(group, step):
    "Averaged over two processes: gradient and loss items of the joint batch, whatever is drawn or compared over it."
    for want, *found in zip(gradient(*STEPS[step]), *(g['steps'][step] for g in group)):
        assert want.abs().max() > 1e-3
        for f in found: torch.testing.assert_close(f, want, rtol=1e-9, atol=1e-12)


def test_gradient_with_fixed_batch_statistics_is_that_of_one_process(group):
    "The same through a ResNet whose batch norms are in evaluation mode."
    for want, *found in zip(normed_gradient(), *(g['normed'] for g in group)):
        for f in found: torch.testing.assert_close(f, want, rtol=1e-8, atol=1e-11)


def test_erased_pass_leaves_the_running_statistics_alone(group):
    "In each process they equal those of the baseline, bit for bit; the processes' own differ."
    for g in group:
        for found in g['statistics'][1:]: assert torch.equal(found, g['statistics'][0])
    assert not torch.equal(group[0]['statistics'][0], group[1]['statistics'][0])


def test_training_is_that_of_one_process(group):
    "Order of images, learning rates, accuracies over sets that do not divide: all as in one process, but for rounding."
    metrics, weights = trained(OWN, network(True))
    for g in group:
        pd.testing.assert_frame_equal(g['own'][0], metrics, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(g['own'][1], weights, rtol=1e-3, atol=1e-5)


def test_processes_hold_the_same_network(group):
    "With batch norms, too: weights, running statistics and metrics agree to the last bit, and are finite."
    (a, weights), (b, others) = (g['smoke'] for g in group)
    assert torch.equal(weights, others) and torch.isfinite(weights).all()
    assert a.equals(b) and np.isfinite(a.to_numpy()).all() and len(a) == 2


def test_joint_table_is_in_the_order_of_the_batch(group):
    "Process r holds every second row from r on."
    assert [g['sizes'] for g in group] == [[(0, 1, 0, 1)]]*2


def test_what_does_not_divide_is_refused_everywhere(group):
    "One line, the same in each process; so does a loss that is not a number."
    assert group[0]['refused'] == group[1]['refused']
    for said, want in zip(group[0]['refused'],
        ['do not divide into 2 processes', '16 images a step do not divide into 2 processes x 16 micro-batches',
            'sync_bn over several processes needs CUDA', 'not finite in epoch 1, step']):
        assert want in said and '\n' not in said


def launch(folder, *args, ranks=2, device='cpu'):
    "torchrun on this machine, in a session of its own."
    return subprocess.Popen([sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', str(ranks), '-m',
        'pcl_nb.train', '--profile', 'smoke',
                             '--device', device, '--quiet', '--out', folder, *args], cwd=ROOT, stdout=subprocess.PIPE,
                             stderr=subprocess.PIPE, text=True, start_new_session=True)


def finish(process):
    "Its output, once it has ended; all of it is killed where it hangs."
    try: return process.communicate(timeout=SECONDS)
    finally:
        if process.poll() is None: os.killpg(process.pid, signal.SIGKILL)


def child_of_rank(process, rank):
    "The process id of a rank."
    for child in open(f'/proc/{process.pid}/task/{process.pid}/children').read().split():
        with open(f'/proc/{child}/environ') as f:
            if f'RANK={rank}' in f.read().split('\0'): return int(child)


@pytest.mark.skipif(not os.path.exists('/proc/self/task'), reason='finds the processes in /proc')
@pytest.mark.slow
def test_killed_process_ends_the_run_and_another_number_goes_on(tmp_path):
    "SIGKILL of one of two: the other one and torchrun end with an error, nothing counts as stored; one process completes the run."
    args = '--method', 'pcl', '--epochs', '40', '--validate-every', '0'
    process, checkpoint = launch(tmp_path, *args), tmp_path/'checkpoint.pt'
    try:
        end = time.monotonic() + SECONDS
        while not checkpoint.exists():
            assert process.poll() is None and time.monotonic() < end, process.stderr.read()
            time.sleep(.01)
        os.kill(child_of_rank(process, 1), signal.SIGKILL)
        start = time.monotonic()
    finally: _, said = finish(process)
    assert process.returncode != 0 and time.monotonic() - start < 60, said
    assert not (tmp_path/'run.json').exists() and not (tmp_path/'weights.safetensors').exists()
    state = torch.load(io.BytesIO(core.unsealed(checkpoint.read_bytes())), weights_only=True)
    assert 1 <= state['epoch'] < 40 and all(torch.isfinite(v).all() for v in state['model'].values())
    # the rest of it would take long: the same checkpoint as one of a run that is nearly done
    calls = []
    recipe = runs.recipe_for('smoke', method='pcl', epochs=state['epoch'] + 1)
    torch.save(dict(state, key=recipe.key), checkpoint)
    fitted = runs.run(recipe, tmp_path, device='cpu', progress=lambda done, total: calls.append((done, total)))
    assert calls[0][0]*recipe.epochs == calls[0][1]*state['epoch'], 'resumed, not started anew'
    assert fitted.metrics.epoch.tolist() == [*range(1, recipe.epochs + 1)] and np.isfinite(fitted.metrics.iloc[-1]).all()
    assert not checkpoint.exists() and json.loads((tmp_path/'run.json').read_text())['processes'] == 1


@pytest.mark.slow
def test_torchrun_stores_one_run(tmp_path):
    "Two processes, one record and one line of output; asked again, one process finds it."
    process = launch(tmp_path)
    out, said = finish(process)
    assert process.returncode == 0, said
    assert out.count('top-1') == 1 and json.loads((tmp_path/'run.json').read_text())['processes'] == 2
    def never(*args): raise AssertionError('trained again')
    assert np.isfinite(runs.run(runs.recipe_for('smoke'), tmp_path, device='cpu', progress=never).metrics.iloc[-1]).all()


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason='needs two GPUs')
@pytest.mark.parametrize('args', ['', '--sync-bn true', '--amp fp16'])
def test_two_gpus_train(tmp_path, args):
    "A GPU for each process, and batch norms over the whole batch where they are asked for."
    process = launch(tmp_path, '--method', 'pcl', '--epochs', '2', *args.split(), device='cuda')
    _, said = finish(process)
    assert process.returncode == 0, said
    assert np.isfinite(pd.read_csv(tmp_path/'metrics.csv').iloc[-1]).all() and json.loads((
        tmp_path/'run.json').read_text())['processes'] == 2
