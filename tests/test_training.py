"""Training and storing runs when things go wrong: kills, simultaneous requests, damaged files, bad arguments."""
import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import fields, replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from conftest import ROOT, processes
from pcl_nb import methods, models, runs, training
from pcl_nb.base import core

SECONDS = 120  # no step of a test takes this long, unless it hangs
# Random fills draw from the global generators: resuming has to put these back, too.
SLOW = runs.recipe_for('smoke', method='pcl', options=dict(fill='noise'), train=96, epochs=5)
QUICK = runs.recipe_for('smoke')


def weights(fitted):
    "A fingerprint of all weights and buffers, bit by bit."
    return hashlib.sha256(b''.join(v.cpu().contiguous().numpy().tobytes() for v in fitted.model.state_dict().values())).hexdigest()


def outcome(fitted, folder):
    "What has to come out the same: weights, and the metrics as stored."
    return weights(fitted), (folder/'metrics.csv').read_bytes()


def progress_of(calls):
    "A progress function that keeps what it is told; it is called only where training takes place."
    return lambda done, total: calls.append((done, total))


@pytest.fixture(scope='module')
def undisturbed(tmp_path_factory):
    "Weights and metrics of the slow recipe, trained in one go."
    folder = tmp_path_factory.mktemp('undisturbed')
    return outcome(runs.run(SLOW, folder, progress=False), folder)


def wait_until(true, process):
    "Wait for a condition while a process runs."
    end = time.monotonic() + SECONDS
    while not true():
        assert process.poll() is None and time.monotonic() < end, 'the process ended, or hangs, before the condition held'
        time.sleep(.005)


@pytest.mark.parametrize('epochs', [0, 1, 2])
@pytest.mark.slow
def test_killed_run_goes_on_to_the_same_weights(tmp_path, undisturbed, epochs):
    "SIGKILL in the first, second or third epoch: the next call resumes behind the last whole epoch, bit for bit."
    checkpoint, seen = tmp_path/'checkpoint.pt', set()
    def reached():
        if checkpoint.exists(): seen.add(checkpoint.stat().st_mtime_ns)
        return len(seen) >= epochs and (tmp_path/'.lock').exists()
    process = subprocess.Popen([sys.executable, '-m', 'pcl_nb.train', '--profile', 'smoke', '--method', 'pcl', '--set', 'fill=noise',
                                '--train', str(SLOW.train), '--epochs', str(SLOW.epochs), '--out', tmp_path, '--quiet'], cwd=ROOT)
    try: wait_until(reached, process)
    finally: process.kill()
    assert process.wait() == -signal.SIGKILL and not (tmp_path/'run.json').exists()
    calls = []
    fitted = runs.run(SLOW, tmp_path, progress=progress_of(calls))
    done, total = calls[0]
    assert epochs*total <= done*SLOW.epochs < total*SLOW.epochs, 'resumed, not started anew and not complete'
    assert outcome(fitted, tmp_path) == undisturbed
    assert sorted(p.name for p in tmp_path.glob('[!.]*')) == ['metrics.csv', 'run.json', 'weights.safetensors']


def test_kill_between_weights_and_record_is_harmless(tmp_path):
    "A run without its record counts as not finished, however much of the rest is there."
    first = outcome(runs.run(QUICK, tmp_path, progress=False), tmp_path)
    (tmp_path/'run.json').unlink()
    (tmp_path/'weights.safetensors').write_bytes(b'')
    assert outcome(runs.run(QUICK, tmp_path, progress=False), tmp_path) == first


def ask(store, recipe, answers, together=None):
    "In a child: ask for a run, once all are ready; answer with whether it was trained here, and its weights."
    os.environ['PCL_NB_RUNS'] = str(store)
    calls = []
    if together: together.wait(SECONDS)
    fitted = runs.trained(recipe, progress=progress_of(calls))
    answers.put((bool(calls), weights(fitted)))


def hold(store, recipe, holding):
    "In a child: begin to train a run, then stop for good without letting go of it."
    os.environ['PCL_NB_RUNS'] = str(store)
    def stop(done, total):
        holding.set()
        time.sleep(10*SECONDS)
    runs.trained(recipe, progress=stop)


def start(function, *args):
    "Run a function in a child process."
    child = processes.Process(target=function, args=args, daemon=True)
    child.start()
    return child


def finished(child):
    "Wait for a child; fail if it hangs or did not end well."
    child.join(SECONDS)
    hangs = child.is_alive()
    if hangs: child.kill()
    assert not hangs and child.exitcode == 0


@pytest.mark.parametrize('n', [2, 4])
@pytest.mark.slow
def test_simultaneous_requests_train_once(store, n):
    "Of several processes that ask for one run at once, one trains; all get its weights, and so does a later one."
    together, answers = processes.Barrier(n), processes.SimpleQueue()
    for child in [start(ask, store.runs, QUICK, answers, together) for _ in range(n)]: finished(child)
    found = [answers.get() for _ in range(n)]
    assert sum(trained for trained, _ in found) == 1
    finished(start(ask, store.runs, QUICK, answers))
    assert {*found, answers.get()} == {(True, found[0][1]), (False, found[0][1])}


def test_killed_holder_lets_others_train(store):
    "Who waits for a run takes over when the process that trains it is killed."
    holding, answers = processes.Event(), processes.SimpleQueue()
    holder = start(hold, store.runs, QUICK, holding)
    try:
        assert holding.wait(SECONDS)
        together = processes.Barrier(2)
        waiting = start(ask, store.runs, QUICK, answers, together)
        together.wait(SECONDS)
        waiting.join(1)
        assert waiting.is_alive() and not runs.is_trained(QUICK), 'it waits as long as the other one trains'
    finally: holder.kill()
    finished(waiting)
    assert answers.get() == (True, weights(training.fit(QUICK, progress=False)))


@pytest.mark.parametrize('name, damage', [
    ('weights.safetensors', lambda p: p.write_bytes(p.read_bytes()[:-1000])),
    ('weights.safetensors', lambda p: p.write_bytes(p.read_bytes().replace(b'\0\1', b'\1\0'))),
    ('weights.safetensors', lambda p: p.unlink()),
    ('run.json', lambda p: p.write_bytes(b'')),
    ('run.json', lambda p: p.write_text('[]')),
    ('metrics.csv', lambda p: p.unlink()),
    ('metrics.csv', lambda p: p.write_bytes(p.read_bytes()[:8])),
], ids=['weights truncated', 'weights altered', 'weights deleted', 'record emptied', 'record without content', 'metrics deleted',
    'metrics truncated'])
def test_damaged_run_is_set_aside_and_trained_again(tmp_path, name, damage):
    "A warning says so; what was there stays under another name; the weights come out the same."
    first = outcome(runs.run(QUICK, tmp_path, progress=False), tmp_path)
    damage(tmp_path/name)
    left = {p.name: p.read_bytes() for p in tmp_path.glob('[!.]*')}
    with pytest.warns(UserWarning, match='is damaged.*set aside as'): again = runs.run(QUICK, tmp_path, progress=False)
    assert outcome(again, tmp_path) == first
    assert {n: (tmp_path/f'{n}.broken-1').read_bytes() for n in left} == left


def as_before(folder):
    "Rewrite a stored run in the form of runs from before: a torch file, a digest of each file, a seal on the record."
    about = json.loads((folder/'run.json').read_text())
    torch.save(load_file(folder/'weights.safetensors'), folder/'weights.pt')
    (folder/'weights.safetensors').unlink()
    about['sha256'], about['metrics_sha256'] = (hashlib.sha256((folder/n).read_bytes()).hexdigest() for n in ('weights.pt', 'metrics.csv'))
    (folder/'run.json').write_text(json.dumps(dict(about, seal=core.digest(about, 64))))


def test_run_from_before_is_opened(store):
    "It counts as trained and is not trained again; damaged, it is set aside and trained again."
    first = outcome(runs.trained(QUICK, progress=False), store.runs/QUICK.key)
    as_before(store.runs/QUICK.key)
    calls = []
    assert runs.is_trained(QUICK) and runs.train_all([QUICK], progress=False) == 0
    assert outcome(runs.trained(QUICK, progress=progress_of(calls)), store.runs/QUICK.key) == first and not calls
    (store.runs/QUICK.key/'weights.pt').write_bytes((store.runs/QUICK.key/'weights.pt').read_bytes()[:-1000])
    with pytest.warns(UserWarning, match='is damaged.*weights.pt.broken-1'): again = runs.trained(QUICK, progress=False)
    assert outcome(again, store.runs/QUICK.key) == first and (store.runs/QUICK.key/'weights.safetensors').exists()


def cli(capsys, *args):
    "Call the command line at the smoke profile: exit code, standard output, standard error."
    try: code = runs.main(['--profile', 'smoke', '--quiet', *map(str, args)])
    except SystemExit as e: code = e.code
    said = capsys.readouterr()
    return SimpleNamespace(code=code, out=said.out, err=said.err)


def test_help_names_every_setting(capsys):
    "`--help` lists each field of the recipe, the methods and the architectures."
    done = cli(capsys, '--help')
    assert done.code == 0
    for f in fields(training.Recipe): assert (f'--{f.name.replace("_", "-")} ' if f.name != 'options' else '--set NAME=VALUE') in done.out
    for name in (*methods.METHODS, *models.ARCHS, *runs.PROFILES): assert name in done.out


@pytest.mark.parametrize('args, named', [
    ('--arch resnet19', "did you mean 'resnet18'?"),
    ('--method plc', 'valid: baseline, side, ipc, cpc, pcl'),
    ('--scheme hard', 'valid: simple, complex'),
    ('--profile tiny', 'valid: smoke, embedded, hard, photos'),
    ('--data folder:nowhere', 'give folder:PATH with PATH/train/CLASS/*'),
    ('--data imagenot', 'valid: concept_scenes, concept_scenes_hard, concept_objects, folder:PATH'),
    ('--batch 0', 'a whole number of 1 or more'),
    ('--batch many', '--batch'),
    ('--lr nan', 'a finite number of 0 or more'),
    ('--amp fp8', 'bf16, fp16'),
    ('--accumulate 0', 'a whole number of 1 or more'),
    ('--accumulate 3', '16 images a step do not divide into 1 processes x 3 micro-batches'),
    ('--compile maybe', 'true'),
    ('--small-input maybe', 'true'),
    ('--device tpu9', "device 'tpu9' cannot be used"),
    ('--method pcl --set tau', "'tau' is not name=value"),
    ('--method pcl --set tau=2', 'a number from 0 to 1'),
    ('--method pcl --set tau=high', 'a number from 0 to 1'),
    ('--method pcl --set nope=1', 'valid: stage, target'),
    ('--method baseline --set tau=.5', 'it has no setting'),
    ('--method has --set patches=16/300', 'a patch of 300 pixels is larger than the image'),
    ('--method has --set drop_rate=1.5', 'a rate from 0 to 1'),
    ('--method acol --set threshold=1', 'a threshold between 0 and 1'),
    ('--method adl --set stage=stage5', 'valid: stage4, stage3, stage3+stage4'),
])
def test_bad_argument_is_refused_in_one_line(capsys, store, args, named):
    "Exit code 2; below the usage one line that names what is valid; nothing is trained."
    done = cli(capsys, *args.split())
    usage, _, error = done.err.partition(': error: ')
    assert done.code == 2 and usage.startswith('usage:') and named in error and error.count('\n') == 1
    assert not list(store.runs.glob('*/[!.]*'))


@pytest.fixture
def photos(tmp_path):
    "An image folder of two classes, one more blue than the other, of several sizes."
    rng = np.random.default_rng(0)
    for split, n in dict(train=6, val=3).items():
        for name, shade in dict(coast=200, forest=40).items():
            folder = tmp_path/'photos'/split/name
            folder.mkdir(parents=True)
            for i in range(n):
                pixels = rng.integers(0, 256, (30 + i, 40, 3), dtype=np.uint8)
                pixels[..., 2] = shade
                Image.fromarray(pixels).save(folder/f'{i}.png')
    return tmp_path/'photos'


def test_image_folder_trains_and_is_stored(capsys, photos, tmp_path):
    "One's own photographs: trained, stored under their class names, and not trained again."
    args = '--data', f'folder:{photos}', '--batch', 4, '--epochs', 2, '--out', tmp_path/'run'
    assert cli(capsys, *args).code == 0
    record = tmp_path/'run'/'run.json'
    metrics, written = pd.read_csv(tmp_path/'run'/'metrics.csv'), record.stat().st_mtime_ns
    assert metrics.epoch.tolist() == [1, 2] and np.isfinite(metrics.iloc[-1]).all()
    assert json.loads(record.read_text())['classes'] == ['coast', 'forest']
    again = cli(capsys, *args)
    assert again.code == 0 and 'top-1' in again.out and record.stat().st_mtime_ns == written


def test_class_of_one_split_only_is_refused(capsys, photos):
    "Training and validation need the same classes; the message names the odd one."
    (photos/'train'/'coast').rename(photos/'train'/'beach')
    done = cli(capsys, '--data', f'folder:{photos}')
    assert done.code == 2 and "class 'beach' is not in both train/ and val/" in done.err.splitlines()[-1]


def test_unreadable_image_is_named(capsys, photos):
    "A file that is no image ends the run with its name."
    bad = photos/'val'/'forest'/'1.png'
    bad.write_text('not a picture')
    done = cli(capsys, '--data', f'folder:{photos}')
    assert done.code == 2 and f"{str(bad)!r} is not an image that can be read" in done.err.splitlines()[-1]


@pytest.mark.slow
def test_diverging_run_ends_with_one_line(tmp_path):
    "A loss that is not a number: exit code 1, the epoch and a way out on one line, no run stored."
    done = subprocess.run([sys.executable, '-m', 'pcl_nb.train', '--profile', 'smoke', '--lr', '1e6', '--out', tmp_path, '--quiet'],
                          cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.count('\n') == 1
    assert 'not finite in epoch 1, step ' in done.stderr and 'Try a lower learning rate' in done.stderr
    assert not (tmp_path/'run.json').exists()


@pytest.mark.parametrize('looks', [1, 50])
@pytest.mark.parametrize('spoilt, said',
    [('loss', 'loss_ce is not finite in epoch 2, step 3 of 4'), ('weights', 'weights are not finite in epoch 2, step 4 of 4')])
def test_first_bad_step_is_named_and_the_checkpoint_before_it_kept(tmp_path, monkeypatch, looks, spoilt, said):
    "Whether each step is looked at, as on a CPU, or only some are, as on a GPU."
    step, calls = training.train_step, []
    def spoil(model, *args):
        logits, items = step(model, *args)
        calls.append(1)
        if spoilt == 'loss' and len(calls) == 4 + 3: items['ce'] += float('nan')
        if spoilt == 'weights' and len(calls) == 4 + 4: next(model.parameters()).data[0] = float('inf')
        return logits, items
    monkeypatch.setattr(training, 'train_step', spoil)
    monkeypatch.setattr(training, 'LOOK_EVERY', dict(cpu=looks))
    checkpoint = tmp_path/'checkpoint.pt'
    with pytest.raises(FloatingPointError, match=said):
        training.fit(replace(QUICK, epochs=3), checkpoint=runs.Checkpoint(checkpoint), device='cpu', progress=False)
    assert len(calls) == (7 if spoilt == 'loss' and looks == 1 else 8)
    state = torch.load(io.BytesIO(core.unsealed(checkpoint.read_bytes())), weights_only=True)
    assert state['epoch'] == 1 and all(torch.isfinite(v).all() for v in state['model'].values())


@pytest.mark.parametrize('name, options', [('pcl', {}), ('acol', {}), ('adl', dict(stage='stage3+stage4', drop_rate=.5))])
def test_compiled_blocks_see_what_hooks_do(monkeypatch, name, options):
    "Maps that hooks read or change are outside of what is compiled: the gradient is the same to the last bit, and nothing stays behind."
    torch._dynamo.reset()
    monkeypatch.setattr(torch, 'compile', partial(torch.compile, backend='eager'))
    method, calls = methods.get_method(name, **options), []
    def gradient(compiled):
        torch.manual_seed(0)
        model = method.prepare(models.create_model('resnet18', 5, width=.25, small_input=True, side=method.side, init='torchvision')).double()
        x, y = torch.randn(4, 3, 32, 32, dtype=torch.float64), torch.arange(4)
        with training._compiled(model, compiled):
            for _ in range(2): training.train_step(model, method, torch.optim.SGD(model.parameters(), .1), x, y)
            calls.append(sum('forward' in vars(m) for m in model.modules()))
        assert not any('forward' in vars(m) for m in model.modules())
        return torch.cat([p.grad.flatten() for p in model.parameters()])
    assert torch.equal(gradient(False), gradient(True)) and calls[0] == 0 and calls[1] >= 3


def test_network_that_cannot_be_compiled_is_refused_in_one_line(monkeypatch):
    "What the compiler says, and the way out."
    torch._dynamo.reset()
    def broken(graph, inputs): raise OSError('no compiler on this machine')
    monkeypatch.setattr(torch, 'compile', partial(torch.compile, backend=broken))
    with pytest.raises(core.InputError, match='cannot be compiled here.*no compiler on this machine.*train without compile') as e:
        training.fit(replace(QUICK, compile=True), device='cpu', progress=False)
    assert '\n' not in str(e.value)


@pytest.mark.parametrize('accumulate', [2, 4])
def test_micro_batches_add_up_to_the_batch(accumulate):
    "With fixed batch statistics the gradient and the items are those of the whole batch; CPC is one of each micro-batch."
    x, y = torch.randn(8, 3, 32, 32, dtype=torch.float64), torch.arange(8) % 5
    def step(name, parts):
        method = methods.get_method(name)
        torch.manual_seed(0)
        model = models.create_model('resnet18', 5, width=.25, small_input=True, side=method.side, init='torchvision').double().eval()
        logits, items = training.train_step(model, method, torch.optim.SGD(model.parameters(), .1), x, y, accumulate=parts)
        return logits, torch.cat([p.grad.flatten() for p in model.parameters()]), items
    for whole, parts in zip(step('ipc', 1), step('ipc', accumulate)): torch.testing.assert_close(parts, whole)
    whole, parts = step('pcl', 1)[2], step('pcl', accumulate)[2]
    torch.testing.assert_close(parts['ipc'], whole['ipc']); assert abs(parts['cpc'] - whole['cpc']) > 1e-3*whole['cpc']


@pytest.mark.parametrize('name', ['pcl', 'pcl_s4', 'amloss'])
@pytest.mark.parametrize('options', [{}, dict(accumulate=4), dict(dtype=torch.bfloat16)], ids=['whole', 'micro-batches', 'bf16'])
def test_erased_pass_leaves_the_running_statistics_alone(name, options):
    "After a step they equal those of a step of the baseline on the same batch, bit for bit; with `mixed` they do not."
    x, y = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 5
    def statistics(name, **settings):
        method = methods.get_method(name, **settings)
        torch.manual_seed(0)
        model = models.create_model('resnet18', 5, width=.25, small_input=True, side=True, init='torchvision')
        training.train_step(model, method, torch.optim.SGD(model.parameters(), .1), x, y, **options)
        return torch.cat([b.flatten().double() for b in model.buffers()])
    assert torch.equal(statistics(name), statistics('baseline'))
    assert not torch.equal(statistics(name, erased_norm='mixed'), statistics('baseline'))


def test_another_recipe_gets_another_run(store):
    "Whatever changes the network changes the run's name; where a folder lies does not."
    keys = [replace(QUICK, **changes).key
        for changes in ({}, dict(seed=1), dict(lr=.01), dict(method='pcl'), dict(train=80), dict(epochs=2))]
    assert len(set(keys)) == len(keys)
