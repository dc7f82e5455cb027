"""What the tests share: the project's folders, its notebooks as data, and a store of their own for runs and results."""
import multiprocessing
import os
import subprocess
import sys
import traceback
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

os.environ.setdefault('OMP_NUM_THREADS', '1')  # several processes at a time: one thread each, also in subprocesses

import nbformat
import pytest
from papermill import execute_notebook
from papermill.cli import _resolve_type

from pcl_nb.lab import jobs

ROOT = Path(__file__).resolve().parents[1]
NBS = ROOT/'nbs'

# Children that have imported the package already, but have computed nothing: cheap to start, safe to kill.
processes = multiprocessing.get_context('forkserver')
processes.set_forkserver_preload(jobs.PRELOAD + ['pcl_nb.runs', 'pcl_nb.lab.measure'])


def code_cells(notebook):
    "The code cells of a notebook file."
    return [c for c in nbformat.read(notebook, as_version=4).cells if c.cell_type == 'code']


def tagged(cells, tag='parameters'):
    "The cells that carry a tag."
    return [c for c in cells if tag in c.metadata.get('tags', [])]


def printed(notebook):
    "All that an executed notebook printed."
    return ''.join(o.text for c in code_cells(notebook) for o in c.outputs if o.output_type == 'stream')


def places(folder):
    "The environment that puts runs, results and committed figures below a folder."
    return dict(PCL_NB_RUNS=str(folder/'runs'), PCL_NB_RESULTS=str(folder/'results'), PCL_NB_FIGURES=str(folder/'figures'))


def papermill_command(notebook, folder, cwd=ROOT, **parameters):
    "Run a notebook by papermill's command line; its runs, results and executed copy go to `folder`."
    given = [a for name, value in parameters.items() for a in ('-p', name, str(value))]
    return subprocess.run([sys.executable, '-m', 'papermill', notebook, folder/'executed.ipynb', '--no-progress-bar', *given],
                          cwd=cwd, env=dict(os.environ, **places(folder)), capture_output=True, text=True)


def papermill(notebook, folder, cwd=ROOT, **parameters):
    "The same without a new process: parameters as the command line reads them, a kernel as `pcl-reproduce` starts it."
    given = {name: _resolve_type(str(value)) for name, value in parameters.items()}
    with mock.patch.dict(os.environ, places(folder)):
        try: execute_notebook(str(notebook), str(folder/'executed.ipynb'), given, cwd=str(cwd), progress_bar=False, **jobs.KERNEL)
        except Exception: return SimpleNamespace(returncode=1, stderr=traceback.format_exc())
    return SimpleNamespace(returncode=0, stderr='')


def check(notebook, **given):
    "Execute an experiment up to its checks, with parameters as papermill would inject them; the checked values."
    names = {}
    for cell in code_cells(notebook):
        exec(compile(cell.source, notebook.name, 'exec'), names)
        if tagged([cell]): names.update({'profile': 'smoke'} if 'profile' in names else {}, **given)
        if 'E' in names: return names['E'].params


def contents(folder):
    "Relative path -> bytes of every file below a folder."
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob('*')) if p.is_file()}


@pytest.fixture(autouse=True)
def store(tmp_path, monkeypatch):
    "Empty folders for runs, results and committed figures: no test reads or writes the project's."
    folders = SimpleNamespace(runs=tmp_path/'runs', results=tmp_path/'results', figures=tmp_path/'figures')
    monkeypatch.setenv('PCL_NB_RUNS', str(folders.runs))
    monkeypatch.setenv('PCL_NB_RESULTS', str(folders.results))
    monkeypatch.setenv('PCL_NB_FIGURES', str(folders.figures))
    return folders


def pytest_collection_modifyitems(items):
    "What needs an experiment run to its end is slow."
    for item in items:
        if 'smoke' in item.fixturenames: item.add_marker(pytest.mark.slow)
