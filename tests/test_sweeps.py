"""Many runs: on a Dask cluster and on this machine, when workers are killed and runs fail."""
import contextlib
import importlib.util
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace

import psutil
import pytest

from conftest import ROOT
from pcl_nb import runs
from pcl_nb.lab import sweep
from pcl_nb.base.core import InputError
from test_training import SECONDS, outcome

LONG = runs.recipe_for('smoke', train=32, val=16, epochs=10)
SWEEP = [replace(LONG, seed=s) for s in range(4)]
DIVERGES = runs.recipe_for('smoke', lr=1e6)
needs_dask = pytest.mark.skipif(not importlib.util.find_spec('distributed'), reason='Dask is not installed (extra cluster)')

# In a worker, before anything else (Dask does it twice): write down each training's beginning and end.
COUNT = '''
import os
from pcl_nb.lab import store
fit = getattr(store, 'uncounted', store.fit)
store.uncounted = fit
def counted(recipe, model=None, checkpoint=None, *args):
    def note(what):
        with open(os.environ['TRAININGS'], 'a') as f: f.write(f'{what} {recipe.key} {os.getpid()} {int(checkpoint.path.exists())}\\n')
    note('begin')
    fitted = fit(recipe, model, checkpoint, *args)
    note('end')
    return fitted
store.fit = counted
'''


def until(true, what):
    "Wait for a condition."
    end = time.monotonic() + SECONDS
    while not (found := true()):
        assert time.monotonic() < end, f'no {what}'
        time.sleep(.01)
    return found


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    "Starts Dask workers in processes of their own: gives its engine, how to start one, and the trainings noted so far."
    monkeypatch.setattr(sweep, 'WAIT', SECONDS)
    file, notes, preload = tmp_path/'dask.json', tmp_path/'trainings', tmp_path/'count.py'
    preload.write_text(COUNT)
    notes.touch()
    # as in another shell: without this process's folder of runs
    env = {k: v for k, v in os.environ.items() if k != 'PCL_NB_RUNS'} | dict(TRAININGS=str(notes), PYTHONPATH=str(ROOT))
    started = []
    def start(*args):
        started.append(subprocess.Popen([sys.executable, '-m', 'dask', *args, '--scheduler-file', file, '--no-dashboard'], cwd=tmp_path,
            env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
        return started[-1]
    def worker(*args): return start('worker', '--nthreads', '1', '--no-nanny', '--preload', preload, *args)
    def noted(): return [line.split() for line in notes.read_text().splitlines()]
    start('scheduler', '--port', '0', '--host', '127.0.0.1')
    until(file.exists, 'scheduler')
    yield f'dask:{file}', worker, noted
    for process in started: process.kill()
    for process in started: process.wait()


@contextlib.contextmanager
def meanwhile(function):
    "Run a function beside the block; what it raises is raised behind it."
    raised = []
    def guarded():
        try: function()
        except BaseException as e: raised.append(e)
    thread = threading.Thread(target=guarded)
    thread.start()
    yield
    thread.join()
    if raised: raise raised[0]


def same_as_here(store, folder, recipes):
    "Stored, complete, and bit for bit what this process trains."
    for r in recipes:
        here = folder/r.key
        assert outcome(runs.run(r, here, progress=False), here) == outcome(runs.trained(r, progress=False), store.runs/r.key)
        assert not (store.runs/r.key/'checkpoint.pt').exists() and not (store.runs/r.key/'progress').exists()


@needs_dask
@pytest.mark.slow
def test_killed_worker_of_a_cluster_loses_nothing(tmp_path, store, cluster):
    "Of two workers one is killed in the middle: the other one goes on from its checkpoint; each run is completed once, and one that fails stops none."
    engine, worker, noted = cluster
    workers = {w.pid: w for w in (worker(), worker())}
    killed = []
    def kill():
        def both(): return len({pid for _, _, pid, _ in noted()}) == 2
        until(both, 'two workers at work')
        _, key, pid, _ = next(n for n in reversed(noted()) if n[0] == 'begin' and n[1] != DIVERGES.key)
        until((store.runs/key/'checkpoint.pt').exists, 'checkpoint')
        os.kill(int(pid), signal.SIGKILL)
        killed.extend((key, pid))
    with meanwhile(kill), pytest.raises(runs.RunsFailed) as failed: runs.train_all([*SWEEP, DIVERGES], progress=False, engine=engine)
    assert list(failed.value.errors) == [DIVERGES.key] and 'Try a lower learning rate' in str(failed.value) and '\n' not in str(failed.value)
    key, pid = killed
    assert workers[int(pid)].wait() == -signal.SIGKILL
    ends = [k for what, k, _, _ in noted() if what == 'end']
    assert sorted(ends) == sorted(r.key for r in SWEEP)
    begins = [(p, resumed) for what, k, p, resumed in noted() if what == 'begin' and k == key]
    assert [p == pid for p, _ in begins] == [True, False] and begins[1][1] == '1', 'taken up by the other worker, from the checkpoint'
    same_as_here(store, tmp_path/'here', SWEEP)
    # one worker is left: it trains, not the caller
    before = noted()
    assert runs.train_all([LONG, replace(LONG, seed=5, epochs=1)], progress=False, engine=engine) == 1
    assert [(what, p == pid, p == str(os.getpid())) for what, _, p, _ in noted()[len(before):]] == [('begin', False, False),
        ('end', False, False)]


@needs_dask
@pytest.mark.slow
def test_worker_of_several_threads_is_refused(cluster):
    "Seeds are the process's: two networks in one process would disturb each other."
    engine, worker, noted = cluster
    worker('--nthreads', '2')
    with pytest.raises(InputError, match='has 2 threads.*--nthreads 1') as refused: runs.train_all([LONG], progress=False, engine=engine)
    assert '\n' not in str(refused.value) and noted() == []


@needs_dask
def test_no_scheduler_is_one_line(monkeypatch):
    "An address where nothing answers."
    monkeypatch.setattr(sweep, 'WAIT', 1)
    with pytest.raises(InputError, match='no Dask scheduler answers') as refused:
        runs.train_all([LONG], progress=False, engine='dask:tcp://127.0.0.1:9')
    assert '\n' not in str(refused.value)


def test_without_dask_the_message_says_how_to_install_it(monkeypatch):
    "The engine is an extra."
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
    with pytest.raises(InputError, match='pip install'): runs.check_engine('dask:tcp://127.0.0.1:8786')


def test_worker_that_cannot_see_the_runs_says_so(tmp_path):
    "It names the folder and what to do; it makes no folder of its own."
    key, error = sweep._train_one(LONG, tmp_path/'elsewhere'/LONG.key, None)
    assert key == LONG.key and 'cannot see' in error and 'PCL_NB_RUNS' in error and '\n' not in error
    assert not (tmp_path/'elsewhere').exists()


@pytest.mark.slow
def test_killed_worker_of_this_machine_loses_nothing(tmp_path, store):
    "The pool breaks; a new one goes on from the checkpoints."
    def kill():
        until(lambda: list(store.runs.glob('*/checkpoint.pt')), 'checkpoint')
        next(p for p in psutil.Process().children() if 'loky' in ' '.join(p.cmdline()) and 'tracker' not in ' '.join(p.cmdline())).kill()
    with meanwhile(kill): assert runs.train_all(SWEEP[:3], 2, progress=False) == 3
    same_as_here(store, tmp_path/'here', SWEEP[:3])


@pytest.mark.slow
@pytest.mark.parametrize('how', [signal.SIGTERM, signal.SIGKILL])
def test_workers_end_with_the_process_that_started_them(store, how):
    "Whoever kills a sweep has the cores back, and the next one goes on from the checkpoint."
    endless = [replace(LONG, epochs=1000, seed=s) for s in range(2)]
    sweep = subprocess.Popen([sys.executable, '-c', f'from pcl_nb.runs import Recipe, train_all; train_all({endless!r}, 2, progress=False)'],
        env=os.environ | dict(PYTHONPATH=str(ROOT)))
    until(lambda: len([*store.runs.glob('*/checkpoint.pt')]) == 2, 'checkpoints')
    children = psutil.Process(sweep.pid).children()
    assert sum('LokyProcess' in ' '.join(p.cmdline()) for p in children) == 2
    sweep.send_signal(how)
    sweep.wait()
    assert not psutil.wait_procs(children, SECONDS)[1]
    assert not any(map(runs.is_trained, endless))


@pytest.mark.slow
def test_run_that_kills_every_worker_is_given_up(store, monkeypatch):
    "Its worker dies each time: an error in one line, not an endless loop."
    def deadly(*args): os.kill(os.getpid(), signal.SIGKILL)
    monkeypatch.setattr(sweep, '_train_one', deadly)
    with pytest.raises(runs.RunsFailed, match='3 times in a row'): runs.train_all([LONG, SWEEP[1]], 2, progress=False)
