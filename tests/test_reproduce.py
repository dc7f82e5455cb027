"""pcl-reproduce as a user runs it, at the smallest profile."""
import os
import re
import resource
import subprocess
import sys
from dataclasses import replace

import pytest

from conftest import NBS, ROOT, code_cells, contents
from pcl_nb import core, reproduce


def command(folder, *args):
    "Run the command line with runs and figures of its own."
    env = dict(os.environ, PCL_NB_RUNS=str(folder/'runs'), PCL_NB_FIGURES=str(folder/'figures'))
    return subprocess.run([sys.executable, '-m', 'pcl_nb.reproduce', *args], cwd=ROOT, env=env, capture_output=True, text=True)


def test_every_experiment_says_what_it_trains_before_it_trains():
    "One cell assigns `recipes`, and it trains nothing: what all figures need can be gathered first."
    for notebook in {f['experiment'] for f in reproduce.manifest()['figures'].values()}:
        cells = [c for c in code_cells(NBS/f'{notebook}.ipynb') if reproduce._assigns(c.source, 'recipes')]
        assert cells and 'accuracies' not in cells[0].source and 'trained(' not in cells[0].source.replace('is_trained(', '')


def test_dry_run_trains_and_writes_nothing(tmp_path):
    "It names the runs and the notebooks."
    done = command(tmp_path, '--profile', 'smoke', '--dry-run')
    assert done.returncode == 0, done.stderr
    assert 'train  resnet50' in done.stdout and 'run    erf' in done.stdout and 'fig5 fig6' in done.stdout
    assert contents(tmp_path) == {}


def test_plan_of_the_paper_needs_no_data_and_adds_up(tmp_path):
    "The complete matrix on Places365 and ImageNet: hours of each run, their sum, in seconds of computing, and nothing is written."
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = command(tmp_path, '--profile', 'paper', '--dry-run')
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 20       # not the clock: others may be at work
    hours = [line for line in done.stdout.splitlines() if line.startswith('  train ')]
    cost = [float(line.split()[-1].replace(',', '')) for line in hours]
    total = float(re.search(r'^  total +([\d,.]+) GPU hours', done.stdout, re.M)[1].replace(',', ''))
    networks, missing = map(int, re.search(r'(\d+) networks, (\d+) to be trained', done.stdout).groups())
    assert len(cost) == networks == missing and abs(sum(cost) - total) < .05 < total
    for name in ('places365', 'imagenet', 'densenet121', 'complex', 'acol'): assert any(name in line for line in hours)
    assert contents(tmp_path) == {}
    twice = command(tmp_path, '--profile', 'paper', '--dry-run', '--tflops', '20', '--only', 'table1', '--seeds', '1')
    once = command(tmp_path, '--profile', 'paper', '--dry-run', '--tflops', '40', '--only', 'table1', '--seeds', '1')
    two, one = (float(re.search(r'^  total +([\d,.]+) GPU hours', d.stdout, re.M)[1].replace(',', '')) for d in (twice, once))
    assert abs(two/one - 2) < .01


def test_absent_data_stops_a_run(capsys):
    "What a plan may take for granted, a run may not."
    with pytest.raises(SystemExit): reproduce.main(['--profile', 'paper', '--only', 'fig4'])
    assert 'places365' in capsys.readouterr().err.strip().splitlines()[-1]


def test_a_network_that_cannot_be_trained_leaves_the_others(tmp_path, monkeypatch):
    "Its notebook is left out and says why; the other one runs; the exit code says that one failed."
    real = reproduce.recipes_of
    def one_diverges(job):
        return {k: replace(r, lr=1e6) if job.notebook == 'qualitative' and r.method == 'pcl' else r for k, r in real(job).items()}
    monkeypatch.setattr(reproduce, 'recipes_of', one_diverges)
    jobs = reproduce.plan(['fig4', 'fig6'], 'smoke', ['resnet18'])
    table = reproduce.reproduce(jobs, core.figures_dir('smoke'), progress=False).set_index('notebook').state
    assert table['erf'] == 'done' and table['qualitative'].startswith('failed: resnet18') and 'Try a lower learning rate' in table['qualitative']


def test_figures_are_made_once_and_a_report_is_written(tmp_path):
    "The same command again trains nothing and ends with the same numbers; one deleted run is trained again, alone."
    asked = ['--profile', 'smoke', '--only', 'fig6,fig4,claims', '--archs', 'resnet18', '--quiet', '--html']
    done = command(tmp_path, *asked)
    assert done.returncode == 0, done.stderr[-2000:]
    first = {n: b for n, b in contents(tmp_path/'figures').items() if n.endswith('.csv')}
    assert {'smoke/fig6_resnet18.csv', 'smoke/fig4_resnet18.csv', 'smoke/claims.csv'} <= set(first)
    page = (tmp_path/'figures'/'smoke'/'report.html').read_text()
    assert page.count('data:image/png') >= 3 and 'src="http' not in page and 'href="http' not in page
    stored = {p: p.stat().st_mtime_ns for p in (tmp_path/'runs').glob('*/run.json')}
    gone = sorted(stored)[0]
    gone.unlink()
    again = command(tmp_path, *asked)
    assert again.returncode == 0 and ' 1 to be trained' in again.stdout
    assert [p for p in stored if p.stat().st_mtime_ns != stored[p]] == [gone]
    assert {n: b for n, b in contents(tmp_path/'figures').items() if n.endswith('.csv')} == first
    states = dict(re.findall(r'^ *(qualitative|erf|claims)\S* .* (done|up to date)$', again.stdout, re.M))       # the same weights again: nothing else to do
    assert states == dict(qualitative='up to date', erf='up to date', claims='done')
    (tmp_path/'figures'/'smoke'/'fig6_resnet18.csv').write_text('meddled with\n')
    mended = command(tmp_path, *asked)
    assert re.search(r'^ *erf .* done$', mended.stdout, re.M) and re.search(r'^ *qualitative\S* .* up to date$', mended.stdout, re.M)
    assert {n: b for n, b in contents(tmp_path/'figures').items() if n.endswith('.csv')} == first


def test_a_failing_notebook_does_not_stop_the_others(tmp_path):
    "The table says which one failed and why, and the exit code says that one did."
    results = tmp_path/'figures'/'smoke'
    results.mkdir(parents=True)
    (results/'fig4_resnet18.png').mkdir()          # a folder where the picture should go
    done = command(tmp_path, '--profile', 'smoke', '--only', 'fig4,fig5', '--archs', 'resnet18', '--quiet')
    assert done.returncode == 1
    lines = {line.split()[0]: line for line in done.stdout.splitlines() if line.split()}
    assert 'failed: ' in lines['qualitative_resnet18'] and lines['erf'].rstrip().endswith('done')


@pytest.mark.parametrize('args, named', [
    (['--only', 'fig12'], 'valid: fig1'),
    (['--profile', 'tiny'], 'valid: smoke'),
    (['--archs', 'resnet19'], "did you mean 'resnet18'?"),
    (['--scenes', 'folder:nowhere', '--only', 'fig5'], 'give folder:PATH'),
    (['--seeds', '0', '--only', 'table1'], 'is not a whole number from 1 to 100'),
    (['--seeds', 'many'], 'invalid int value'),
    (['--figures', '5'], 'unrecognized arguments'),
    (['--engine', 'slurm'], 'valid: local, dask:ADDRESS, dask:FILE.json'),
    (['--engine', 'dask:nowhere.json'], 'nowhere.json'),
    (['--dry-run', '--tflops', '0'], 'give a number above 0'),
])
def test_bad_value_is_refused_in_one_line(capsys, args, named):
    "The message says what is valid; the exit code is 2."
    with pytest.raises(SystemExit) as ended: reproduce.main(args)
    assert ended.value.code == 2 and named in capsys.readouterr().err.strip().splitlines()[-1]
