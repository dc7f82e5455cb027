"""Faults on purpose: kills at every write and at random moments, full and unwritable folders, damage of every kind. `make test-faults`.

Afterwards nothing is wrong: results are those of an undisturbed run, what cannot be used is set aside with a warning, no lock is left behind.
"""
import itertools
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
import warnings

import numpy as np
import pandas as pd
import pytest

from conftest import ROOT, contents, processes
from pcl_nb import runs, training
from pcl_nb.lab import results
from test_training import QUICK, SLOW, finished, outcome, start, weights

pytestmark = [pytest.mark.faults, pytest.mark.slow]
CLI = [sys.executable, '-m', 'pcl_nb.train', '--profile', 'smoke', '--method', 'pcl', '--set', 'fill=noise', '--train', str(SLOW.train),
    '--epochs', str(SLOW.epochs), '--quiet']
CUTS = 0, 1, 2, .25, .5, .75, -1      # bytes that are left, or their share; -1: all but one


@pytest.fixture(scope='module')
def undisturbed(tmp_path_factory):
    "Weights and metrics of the slow recipe and of the quick one, trained in one go."
    found = {}
    for recipe in (SLOW, QUICK):
        folder = tmp_path_factory.mktemp('undisturbed')
        found[recipe.key] = outcome(runs.run(recipe, folder, progress=False), folder)
    return found


def mortal(n, counted, function, *args):
    "In a child: die at the n-th time that a file is written through or gets its name; count how often that is."
    seen, real = itertools.count(), {name: getattr(os, name) for name in ('fsync', 'replace')}
    def dying(name):
        def call(*args):
            if next(seen) == n: os.kill(os.getpid(), signal.SIGKILL)
            counted.value += 1
            return real[name](*args)
        return call
    for name in real: setattr(os, name, dying(name))
    function(*args)


def killed_at_each_write(function, *args):
    "Call the function in children that are killed at their first, second ... write; yields after each death."
    for n in itertools.count():
        counted = processes.Value('i', 0)
        child = start(mortal, n, counted, function, *args)
        child.join(120)
        if child.exitcode == 0: return
        assert child.exitcode == -signal.SIGKILL and counted.value == n
        yield n


def train(recipe, folder): runs.run(recipe, folder, progress=False)


@pytest.mark.parametrize('recipe', [QUICK, SLOW], ids=['one epoch', 'five epochs'])
def test_training_killed_at_each_write(tmp_path, undisturbed, recipe, record_property):
    "Checkpoint, weights, metrics, record: whichever write is the last, the next call ends with the same numbers."
    deaths = 0
    for n in killed_at_each_write(train, recipe, tmp_path/'run'):      # goes on from where the last one died, too
        alone = tmp_path/f'alone-{n}'
        child = start(mortal, n, processes.Value('i', 0), train, recipe, alone); child.join(120)
        assert outcome(runs.run(recipe, alone, progress=False), alone) == undisturbed[recipe.key]
        assert sorted(p.name for p in alone.iterdir() if p.name not in ('.lock', 'progress')) == ['metrics.csv', 'run.json', 'weights.safetensors']
        deaths += 1
    assert deaths >= 6 and outcome(runs.run(recipe, tmp_path/'run', progress=False), tmp_path/'run') == undisturbed[recipe.key]


def test_training_killed_at_random_moments(tmp_path, undisturbed):
    "Again and again, until one gets through."
    begun = time.monotonic()
    subprocess.run([*CLI, '--out', tmp_path/'whole'], cwd=ROOT, check=True, capture_output=True)
    took, chance, deaths = time.monotonic() - begun, random.Random(0), 0
    for _ in range(6):
        process = subprocess.Popen([*CLI, '--out', tmp_path/'killed'], cwd=ROOT, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        try: process.wait(chance.uniform(.3, .7)*took)
        except subprocess.TimeoutExpired: process.kill(); process.wait(); deaths += 1
        if (tmp_path/'killed'/'run.json').exists(): break
    assert deaths >= 1
    assert outcome(runs.run(SLOW, tmp_path/'killed', progress=False), tmp_path/'killed') == undisturbed[SLOW.key]


def save(folder, value):
    results.save_result(folder, 'result', pd.DataFrame(dict(value=[value]*3)), None, value=value)


def test_result_killed_at_each_write(tmp_path):
    "A reader finds the old numbers or the new ones, whole; a record never stands beside numbers of another time."
    save(tmp_path, 1)
    deaths = 0
    for _ in killed_at_each_write(save, tmp_path, 2):
        table, about = pd.read_csv(tmp_path/'result.csv'), json.loads((tmp_path/'result.json').read_text())
        assert table.value.tolist() in ([1]*3, [2]*3) and about['value'] in (1, 2)
        assert about['value'] == 1 or table.value.tolist() == [2]*3, 'the record comes last'
        deaths += 1
    assert deaths >= 4 and pd.read_csv(tmp_path/'result.csv').value.tolist() == [2]*3


def measure(store): 
    os.environ['PCL_NB_RUNS'] = str(store)
    return runs.stored(QUICK, 'faults', {}, ('runs',), lambda fitted: dict(a=np.arange(1000.), w=np.array([weights(fitted)])))


def test_measurement_killed_at_each_write(store):
    "Of a run that has to be trained first."
    deaths = sum(1 for _ in killed_at_each_write(measure, store.runs))
    found = measure(store.runs)
    assert deaths >= 7 and found['a'].tolist() == list(range(1000)) and found['w'][0] == weights(training.fit(QUICK, progress=False))


def damaged(original: bytes, chance) -> list:
    "Truncated at every kind of place, and with single bits flipped."
    cut = [original[:int(c*len(original)) if isinstance(c, float) else c] for c in CUTS]
    def flipped(i): return original[:i] + bytes([original[i] ^ 1 << chance.randrange(8)]) + original[i + 1:]
    return cut + [flipped(chance.randrange(len(original))) for _ in range(12)]


@pytest.mark.parametrize('name', ['weights.safetensors', 'metrics.csv', 'run.json'])
def test_damage_to_a_stored_run(tmp_path, undisturbed, name):
    "Found out, said, set aside, trained again."
    runs.run(QUICK, tmp_path, progress=False)
    for spoilt in damaged((tmp_path/name).read_bytes(), random.Random(name)):
        (tmp_path/name).write_bytes(spoilt)
        with pytest.warns(UserWarning, match='is damaged.*set aside as'): again = runs.run(QUICK, tmp_path, progress=False)
        assert outcome(again, tmp_path) == undisturbed[QUICK.key]


def test_damage_to_a_checkpoint(tmp_path, undisturbed):
    "Training starts anew and says so; a damaged checkpoint never decides a number."
    checkpoint = tmp_path/'run'/'checkpoint.pt'
    def two_epochs(done, total):
        if done*SLOW.epochs > 2*total: raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): runs.run(SLOW, tmp_path/'run', progress=two_epochs)
    original = checkpoint.read_bytes()
    for spoilt in damaged(original, random.Random(1)):
        for f in (tmp_path/'run').glob('[!.]*'): f.unlink()
        checkpoint.write_bytes(spoilt)
        with pytest.warns(UserWarning, match='checkpoint .* cannot be read.*set aside'):
            fitted = runs.run(SLOW, tmp_path/'run', progress=False)
        assert outcome(fitted, tmp_path/'run') == undisturbed[SLOW.key]
    for f in (tmp_path/'run').glob('[!.]*'): f.unlink()
    checkpoint.write_bytes(original)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert outcome(runs.run(SLOW, tmp_path/'run', progress=False), tmp_path/'run') == undisturbed[SLOW.key]


def test_damage_to_a_measurement(store):
    "Measured again, with a warning, or unharmed: the numbers are right."
    first = measure(store.runs)
    [path] = store.runs.glob('*/faults-*.npz')
    original, told = path.read_bytes(), 0
    for spoilt in damaged(original, random.Random(2)):
        path.write_bytes(spoilt)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter('always')
            found = measure(store.runs)
        told += any('set aside' in str(w.message) for w in said)
        assert found.keys() == first.keys() and all(np.array_equal(found[k], first[k]) for k in first)
    assert told >= len(CUTS)


def limited(size):
    def limit(): resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    return limit


@pytest.mark.parametrize('size', [0, 1000, 100_000])
def test_no_room_on_the_disk(tmp_path, undisturbed, size):
    "A limit on the size of files stands in for a full disk: one line, nothing half-written; with room again it goes on."
    done = subprocess.run([*CLI, '--out', tmp_path/'run'], cwd=ROOT, preexec_fn=limited(size), capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.strip().splitlines()[-1].startswith('error: '), done.stderr[-500:]
    assert 'Traceback' not in done.stderr and not (tmp_path/'run'/'run.json').exists()
    assert outcome(runs.run(SLOW, tmp_path/'run', progress=False), tmp_path/'run') == undisturbed[SLOW.key]


def test_folder_that_cannot_be_written(tmp_path):
    "One line that names it, for whoever trains and whoever reproduces."
    for args in ([*CLI, '--out', '/proc/nowhere'],
        [sys.executable, '-m', 'pcl_nb.reproduce', '--profile', 'smoke', '--only', 'fig4', '--quiet']):
        done = subprocess.run(args, cwd=ROOT, env=dict(os.environ, PCL_NB_RUNS='/proc/nowhere'), capture_output=True, text=True)
        assert done.returncode and 'Traceback' not in done.stderr and '/proc/nowhere' in done.stderr + done.stdout, done.stderr[-500:]


def asks(store, recipe, answers):
    os.environ['PCL_NB_RUNS'] = str(store)
    calls = []
    fitted = runs.trained(recipe, progress=lambda *c: calls.append(c))
    answers.put((recipe.key, bool(calls), weights(fitted)))


def test_eight_processes_ask_for_the_same_and_for_different_runs(store):
    "Each run is trained once, and all that ask for it get it."
    from dataclasses import replace
    recipes = [replace(QUICK, seed=s) for s in range(3)]
    answers = processes.SimpleQueue()
    for child in [start(asks, store.runs, recipes[i % 3], answers) for i in range(8)]: finished(child)
    found = [answers.get() for _ in range(8)]
    for r in recipes:
        mine = [(trained, w) for key, trained, w in found if key == r.key]
        assert sum(t for t, _ in mine) == 1 and {w for _, w in mine} == {weights(training.fit(r, progress=False))}


def test_clock_that_goes_backwards(tmp_path, undisturbed, monkeypatch):
    "Nothing is decided by the time of day."
    now = itertools.count()
    monkeypatch.setattr(time, 'time', lambda: 2e9 - 3600*next(now))
    assert outcome(runs.run(QUICK, tmp_path, progress=False), tmp_path) == undisturbed[QUICK.key]
    for f in tmp_path.iterdir(): os.utime(f, (2e9, 2e9))
    assert outcome(runs.run(QUICK, tmp_path, progress=False), tmp_path) == undisturbed[QUICK.key]


def reproduce(folder, **how):
    env = dict(os.environ, PCL_NB_RUNS=str(folder/'runs'), PCL_NB_RESULTS=str(folder/'results'), PCL_NB_FIGURES=str(folder/'figures'))
    return subprocess.Popen([sys.executable, '-m', 'pcl_nb.reproduce', '--profile', 'smoke', '--only', 'fig4,fig6,table1,claims', '--archs',
        'resnet18', '--quiet'],
        cwd=ROOT, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True, **how)


def csvs(folder): return {n: b for n, b in contents(folder/'results').items() if n.endswith('.csv')}


@pytest.mark.parametrize('whole', [True, False], ids=['with its workers', 'alone'])
def test_reproduction_killed_at_random_moments(tmp_path, whole):
    "Three times, with all its processes or without: repeated, it ends with the same numbers."
    begun = time.monotonic()
    assert reproduce(tmp_path/'undisturbed').wait() == 0
    took, chance = time.monotonic() - begun, random.Random(int(whole))
    for _ in range(3):
        process = reproduce(tmp_path/'killed')
        try: process.wait(chance.uniform(.1, .8)*took)
        except subprocess.TimeoutExpired: pass
        os.killpg(process.pid, signal.SIGKILL) if whole else process.kill()
        process.wait()
    assert reproduce(tmp_path/'killed').wait() == 0
    assert csvs(tmp_path/'killed') == csvs(tmp_path/'undisturbed')
