"""pcl-reproduce as a user runs it, at the smallest profile."""
import os
import re
import resource
import shutil
import subprocess
import sys
import time
from dataclasses import replace

import nbformat
import pandas as pd
import psutil
import pytest

from conftest import NBS, ROOT, code_cells, contents, tagged
from pcl_nb import reproduce
from pcl_nb.base import core
from pcl_nb.lab import experiment, jobs, results


def command(folder, *args):
    "Run the command line with runs and results of its own."
    env = dict(os.environ, PCL_NB_RUNS=str(folder/'runs'), PCL_NB_RESULTS=str(folder/'results'), PCL_NB_FIGURES=str(folder/'figures'))
    return subprocess.run([sys.executable, '-m', 'pcl_nb.reproduce', *args], cwd=ROOT, env=env, capture_output=True, text=True)


def test_every_experiment_declares_its_runs():
    "What all figures need can be gathered before a notebook runs."
    assert {f['experiment'] for f in reproduce.manifest()['figures'].values()} == set(experiment.EXPERIMENTS)


@pytest.mark.parametrize('notebook', sorted(experiment.EXPERIMENTS))
def test_a_notebook_takes_the_runs_that_it_declares(notebook, capsys, store):
    "What is planned without the notebook is what its cells assign to `recipes`, in the same order; nothing is printed or trained."
    declared = experiment.parameters_of(notebook)
    given = {k: v for k, v in dict(profile='smoke', repeats='2', seed=3, pcl='tau=0.6', device='cpu').items() if k in declared}
    planned = reproduce.recipes_of(reproduce.Job(notebook, given))
    assert capsys.readouterr() == ('', '')
    cells, names = code_cells(NBS/f'{notebook}.ipynb'), {}
    if not planned: assert notebook in ('claims', 'initialisation') and not any('E.networks' in c.source for c in cells); return
    for cell in cells:
        exec(compile(cell.source, notebook, 'exec'), names)
        if tagged([cell]): names.update(given)
        if 'recipes' in names: break
    assert list(names['recipes'].items()) == list(planned.items()) and names['E'].planned == planned
    assert contents(store.runs) == {}


@pytest.mark.slow
def test_dry_run_trains_and_writes_nothing(tmp_path):
    "It names the runs and the notebooks."
    done = command(tmp_path, '--profile', 'smoke', '--dry-run')
    assert done.returncode == 0, done.stderr
    assert 'train  resnet50' in done.stdout and 'run    erf' in done.stdout and 'fig5 fig6' in done.stdout
    assert contents(tmp_path) == {}


@pytest.mark.slow
def test_plan_of_the_paper_needs_no_data_and_adds_up(tmp_path):
    "The complete matrix on Places365 and ImageNet: hours of each run, their sum, in seconds of computing, and nothing is written."
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = command(tmp_path, '--profile', 'paper', '--dry-run')
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 60       # not the clock: others may be at work
    hours = [line for line in done.stdout.splitlines() if line.startswith('  train ')]
    cost = [float(line.split()[-1].replace(',', '')) for line in hours]
    total = float(re.search(r'^  total +([\d,.]+) GPU hours', done.stdout, re.M)[1].replace(',', ''))
    networks, missing = map(int, re.search(r'(\d+) networks, (\d+) to be trained', done.stdout).groups())
    assert len(cost) == networks == missing and abs(sum(cost) - total) < .05 < total
    for name in ('places365', 'imagenet', 'densenet121', 'complex', 'acol'): assert any(name in line for line in hours)
    assert contents(tmp_path) == {}
    twice = command(tmp_path, '--profile', 'paper', '--dry-run', '--tflops', '20', '--only', 'table1', '--repeats', '1')
    once = command(tmp_path, '--profile', 'paper', '--dry-run', '--tflops', '40', '--only', 'table1', '--repeats', '1')
    two, one = (float(re.search(r'^  total +([\d,.]+) GPU hours', d.stdout, re.M)[1].replace(',', '')) for d in (twice, once))
    assert abs(two/one - 2) < .01


def test_absent_data_stops_a_run(capsys):
    "What a plan may take for granted, a run may not."
    with pytest.raises(SystemExit): reproduce.main(['--profile', 'paper', '--only', 'fig4'])
    assert 'places365' in capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.slow
def test_a_network_that_cannot_be_trained_leaves_the_others(tmp_path, monkeypatch):
    "Its notebook is left out and says why; the other one runs; the exit code says that one failed."
    real = reproduce.recipes_of
    def one_diverges(job):
        return {k: replace(r, lr=1e6) if job.notebook == 'qualitative' and r.method == 'pcl' else r for k, r in real(job).items()}
    monkeypatch.setattr(jobs, 'recipes_of', one_diverges)
    planned = reproduce.plan(['fig4', 'fig6'], 'smoke', ['resnet18'])
    table = reproduce.reproduce(planned, core.results_dir('smoke'), progress=False).set_index('notebook').state
    assert table['erf'] == 'done' and table['qualitative'].startswith('failed: resnet18') and 'Try a lower learning rate' in table['qualitative']


@pytest.mark.slow
def test_figures_are_made_once_and_a_report_is_written(tmp_path):
    "The same command again trains nothing and ends with the same numbers; one deleted run is trained again, alone."
    asked = ['--profile', 'smoke', '--only', 'fig6,fig4,claims', '--archs', 'resnet18', '--quiet', '--html']
    done = command(tmp_path, *asked)
    assert done.returncode == 0, done.stderr[-2000:]
    first = {n: b for n, b in contents(tmp_path/'results').items() if n.endswith('.csv')}
    assert {'smoke/fig6_resnet18.csv', 'smoke/fig4_resnet18.csv', 'smoke/claims.csv'} <= set(first)
    page = (tmp_path/'results'/'smoke'/'report.html').read_text()
    assert page.count('data:image/png') >= 3 and 'src="http' not in page and 'href="http' not in page
    stored = {p: p.stat().st_mtime_ns for p in (tmp_path/'runs').glob('*/run.json')}
    gone = sorted(stored)[0]
    gone.unlink()
    again = command(tmp_path, *asked)
    assert again.returncode == 0 and ' 1 to be trained' in again.stdout
    assert [p for p in stored if p.stat().st_mtime_ns != stored[p]] == [gone]
    assert {n: b for n, b in contents(tmp_path/'results').items() if n.endswith('.csv')} == first
    states = dict(re.findall(r'^ *(qualitative|erf|claims)\S* .* (done|up to date)$', again.stdout, re.M))       # the same weights again: nothing else to do
    assert states == dict(qualitative='up to date', erf='up to date', claims='done')
    (tmp_path/'results'/'smoke'/'fig6_resnet18.csv').write_text('meddled with\n')
    mended = command(tmp_path, *asked)
    assert re.search(r'^ *erf .* done$', mended.stdout, re.M) and re.search(r'^ *qualitative\S* .* up to date$', mended.stdout, re.M)
    assert {n: b for n, b in contents(tmp_path/'results').items() if n.endswith('.csv')} == first


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != 'linux', reason='kernels are forked on Linux alone')
def test_a_kernel_ends_with_the_process_that_started_it(tmp_path):
    "Killed, a reproduction leaves no kernel behind, even where it was started from a kernel's terminal."
    cell = nbformat.v4.new_code_cell(f"import os, time; open({str(tmp_path/'pid')!r}, 'w').write(str(os.getpid())); time.sleep(600)")
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), tmp_path/'sleeps.ipynb')
    run = ('import papermill; from pcl_nb.lab.jobs import KERNEL\n'
           "if __name__ == '__main__': papermill.execute_notebook('sleeps.ipynb', 'out.ipynb', kernel_name='python3', progress_bar=False, **KERNEL)")
    (tmp_path/'run.py').write_text(run)
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get('PYTHONPATH')]))
    parent = subprocess.Popen([sys.executable, 'run.py'], cwd=tmp_path, env=dict(os.environ, JPY_PARENT_PID='1234567', PYTHONPATH=path))
    def wait_for(what):
        end = time.monotonic() + 120
        while not what(): assert time.monotonic() < end and time.sleep(.1) is None
    wait_for(lambda: (tmp_path/'pid').exists() and (tmp_path/'pid').read_text() and parent.poll() is None)
    kernel = int((tmp_path/'pid').read_text())
    assert psutil.pid_exists(kernel)
    parent.kill(); parent.wait()
    wait_for(lambda: not psutil.pid_exists(kernel))


def measured(seeds=2, pcl=.3, learned=True):
    "Measurements of the focus area of a baseline and PCL."
    return [dict(arch='resnet18', network=n, scheme='simple', data='concept_scenes', seed=s, settings='', quantity='focus',
        value=v + .001*s, low=v - .01, high=v + .01, images=100, learned=learned, run=f'{n}{s}') for s in range(seeds) for n, v in (('scenes', .2), ('pcl', pcl))]


def saved(folder, rows=None, bins=20, share=.5, **columns):
    "Results as an experiment writes them: a curve, an untrained map, measurements."
    curve = pd.DataFrame([dict(arch='resnet18', network=n, bin=b, share=share/(b + 1), **columns) for n in ('scenes', 'pcl') for b in range(bins)])
    impact = pd.DataFrame([dict(arch='resnet18', network='init', y=y, x=x, impact=y*x + .5) for y in range(4) for x in range(4)])
    results.save_result(folder, 'fig2', curve, parameters=dict(scenes='concept_scenes', repeats={'': 2}))
    results.save_result(folder, 'fig5_resnet18', impact)
    results.record(folder, measured() if rows is None else rows, 'focus_area')
    return folder


def compared(here, there):
    "What a comparison says, by the first words of its lines."
    text, same = reproduce.comparison(here, there)
    return {line.strip().split('  ')[0]: line for line in text.splitlines()}, text.splitlines()[-1], same


@pytest.mark.parametrize('here, there, why', [(1, 3, '1 to 2 runs here, 3 runs there'), (3, 1, '3 runs here, 1 to 2 runs there')])
def test_a_verdict_of_more_runs_says_so(tmp_path, here, there, why):
    "More runs on either side are the reason, not other numbers."
    folders = tmp_path/'here', tmp_path/'there'
    for folder, seeds in zip(folders, (here, there)):
        rows = measured(3)
        results.record(folder, [r for r in rows if r['seed'] < (max(2, seeds) if r['network'] == 'scenes' else seeds)], 'focus_area')
    found = reproduce.compare_verdicts(*map(results.measurements, folders))
    assert list(found.why) == [why]*len(found) and 'C3' in set(found.claim)


def test_differences_in_two_tables_of_a_figure(tmp_path):
    "The largest of all tables is named, with its table and row."
    for folder, by in ((tmp_path/'here', .01), (tmp_path/'there', 0.)):
        for name, far in (('fig1', 2*by), ('fig1_distances', by)):
            table = pd.DataFrame([dict(arch='resnet18', bin=b, share=.1*b + far) for b in range(1, 4)])
            results.save_result(folder, name, table, parameters={})
    text, same = reproduce.comparison(tmp_path/'here', tmp_path/'there')
    assert re.search(r'6 of 6 numbers within tolerance; largest difference: share .*\(fig1: ', text) and same


def test_equal_folders_are_identical(tmp_path):
    "Each figure says so, and the last line counts every number."
    lines, last, same = compared(saved(tmp_path/'a'), saved(tmp_path/'b'))
    assert same and last == 'reproduced 68 of 68 numbers'
    assert [lines[f].endswith(f'identical, {n} numbers') for f, n in (('measurements', 12), ('Figure 2', 40), ('Figure 5', 16))] == [True]*3
    assert any('differ' in line and ', 0 differ' in line for line in lines) and 'made otherwise:' not in lines


def test_what_differs_is_named(tmp_path):
    "A number, a row, a verdict, a column, a parameter, a processor."
    there = saved(tmp_path/'there', std=.1)
    here = saved(tmp_path/'here', [r for r in measured(pcl=.1) if (r['network'], r['seed']) != ('scenes', 1)])
    table = pd.read_csv(here/'fig5_resnet18.csv')
    table.assign(impact=table.impact*1.01)[1:].to_csv(here/'fig5_resnet18.csv', index=False)
    (here/'fig2.json').write_text((here/'fig2.json').read_text().replace('"": 2', '"": 1').replace('"cores": ', '"cores": 9'))
    lines, last, same = compared(here, there)
    assert 'low 0.09 here, 0.29 there: 0.69 of it, tolerance 0.3 (measurements: resnet18 pcl simple concept_scenes 0 focus)' in lines['measurements']
    assert lines['measurements'].endswith('3 not run here') and '3 of 9 numbers' in lines['measurements']
    assert "identical, 40 numbers; 40 not run here; column std is missing here; repeats '1' here, '2' there" in lines['Figure 2']
    assert 'of the largest, tolerance 0.001 (fig5_resnet18: resnet18 init 3 3)' in lines['Figure 5'] and lines['Figure 5'].endswith('1 not run here')
    assert any(re.match('C3 +ResNet18: ↓ here, supported there', line.strip()) for line in lines.values()) and 'cores' in ' '.join(lines)
    assert not same and re.fullmatch(r'reproduced \d+ of 64 numbers, 44 not run here', last)


def test_a_reduced_run_is_compared_with_its_part(tmp_path):
    "One run of several, one figure of two: all that is there is identical, and the verdict's reason is the number of runs."
    there, here = saved(tmp_path/'there', measured(5)), saved(tmp_path/'here', measured(1))
    for path in here.glob('fig5*'): path.unlink()
    lines, last, same = compared(here, there)
    assert same and last == 'reproduced 46 of 46 numbers, 40 not run here' and 'not run here (16 numbers)' in lines['Figure 5']
    assert any('↑ here, supported there (1 run here, 5 runs there)' in line for line in lines.values())


@pytest.mark.parametrize('name, text', [('fig2.csv', ''), ('fig2.csv', 'a,b\n1,2\n'), ('fig2.json', '{'), ('measurements.csv', 'a,b\n1,2\n'),
    ('measurements.csv', ''), ('fig2.csv', 'arch,network,bin,share\nresnet18,pcl,x,y\n')])
@pytest.mark.parametrize('side', ['here', 'there'])
def test_damaged_results_are_compared_as_far_as_they_go(tmp_path, side, name, text):
    "On whichever side; the other figures count."
    folders = {s: saved(tmp_path/s) for s in ('here', 'there')}
    (folders[side]/name).write_text(text)
    lines, last, same = compared(folders['here'], folders['there'])
    assert last.startswith('reproduced ') and 'identical, 16 numbers' in lines['Figure 5']


def test_publishing_needs_small_files(tmp_path, capsys, store):
    "The gallery is written after it; a large file is refused in one line, and nothing is copied."
    folder, to = saved(store.results/'embedded'), store.figures/'embedded'
    (folder/'fig2.png').write_bytes(b'0'*(reproduce.FILE_MOST + 1))
    with pytest.raises(SystemExit): reproduce.main(['--publish'])
    assert 'fig2.png (1.0 MB): larger than 1 MB; nothing is published' in capsys.readouterr().err.splitlines()[-1] and not to.exists()
    (folder/'fig2.png').unlink()
    assert reproduce.main(['--publish']) == 0 and contents(to) == {n: b for n, b in contents(folder).items() if n[0] != '.'}
    assert '| C3 | ' in (store.figures/'README.md').read_text()
    assert reproduce.main(['--compare']) == 0 and capsys.readouterr().out.endswith('reproduced 68 of 68 numbers\n')


def test_measurements_that_are_gone_are_made_again(tmp_path, store):
    "A notebook is up to date while its own rows are there as they were, whatever others add."
    recipe = reproduce.recipes_of(reproduce.plan(['fig4'], 'smoke', ['resnet18'])[0])['resnet18', 'pcl', 0]
    job, needs = reproduce.Job('qualitative', {}, outputs=['fig2']), {'pcl': recipe}
    (store.runs/recipe.key).mkdir(parents=True)
    for name in ('run.json', 'weights.safetensors'): (store.runs/recipe.key/name).write_text('{}')
    folder = saved(store.results/'smoke', [dict(r, run=recipe.key) for r in measured(1)])
    with pytest.MonkeyPatch.context() as m:
        m.setattr(jobs, 'is_trained', lambda r: True)
        jobs._note(job, needs, folder)
        assert reproduce.up_to_date(job, needs, folder)
        results.record(folder, [dict(r, run=recipe.key) for r in measured(3)[2:]], 'erf')
        assert reproduce.up_to_date(job, needs, folder)
        results.record(folder, [dict(measured(1)[0], value=.7, run=recipe.key)], 'erf')
        assert not reproduce.up_to_date(job, needs, folder)
        results.record(folder, [dict(measured(1)[0], run=recipe.key)], 'erf')
        assert reproduce.up_to_date(job, needs, folder)
        (folder/'measurements.csv').unlink()
        assert not reproduce.up_to_date(job, needs, folder)


STUB = """import pandas as pd
from pcl_nb.base import core
from pcl_nb.lab import results
#
results.save_result(core.resolve(out) if out else core.results_dir(profile), 'initialisation', pd.DataFrame(dict(arch=archs.split(','), share=.5)))"""


@pytest.mark.slow
def test_a_run_leaves_what_is_committed_as_it_is(tmp_path):
    "In a clone: results go where git does not look, and are compared with the committed ones; the same again writes nothing."
    shutil.copytree(ROOT/'pcl_nb', tmp_path/'pcl_nb', ignore=shutil.ignore_patterns('__pycache__'))
    for name in 'settings.ini', '.gitignore': shutil.copy(ROOT/name, tmp_path)
    (tmp_path/'nbs').mkdir()
    shutil.copy(NBS/'figures.yaml', tmp_path/'nbs')
    first, last = map(nbformat.v4.new_code_cell, STUB.split('\n#\n'))
    cells = [first, *tagged(code_cells(NBS/'initialisation.ipynb')), last]
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=dict(language_info=dict(name='python'))), tmp_path/'nbs'/'initialisation.ipynb')
    results.save_result(tmp_path/'figures'/'embedded', 'initialisation', pd.DataFrame(dict(arch=['resnet18', 'resnet34'], share=.5)))
    env = {k: v for k, v in os.environ.items() if not k.startswith('PCL_NB_')} | dict(PYTHONPATH=str(tmp_path))
    def git(*args): return subprocess.run(['git', '-C', tmp_path, '-c', 'user.name=a', '-c', 'user.email=a@b', *args], capture_output=True, text=True, check=True).stdout
    git('init', '-q'); git('add', '-A'); git('commit', '-qm', 'all')
    def run(): return subprocess.run([sys.executable, '-m', 'pcl_nb.reproduce', '--only', 'initialisation', '--archs', 'resnet18', '--quiet', '--html'],
        cwd=tmp_path, env=env, capture_output=True, text=True)
    done = run()
    assert done.returncode == 0 and done.stdout.endswith('reproduced 1 of 1 numbers, 1 not run here\n'), done.stdout + done.stderr
    assert git('status', '--porcelain') == '' and (tmp_path/'results'/'embedded'/'initialisation.csv').exists()
    made = {p: p.stat().st_mtime_ns for d in ('results', 'runs') for p in (tmp_path/d).rglob('*') if p.is_file() and p.name != 'report.html'}
    assert 'up to date' in run().stdout and all(p.stat().st_mtime_ns == t for p, t in made.items())


@pytest.mark.slow
def test_a_failing_notebook_does_not_stop_the_others(tmp_path):
    "The table says which one failed and why, and the exit code says that one did."
    results = tmp_path/'results'/'smoke'
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
    (['--repeats', '0', '--only', 'table1'], "give a number of 1 to 100, and others by architecture: 3,resnet18:5"),
    (['--repeats', 'many', '--only', 'table1'], "give a number of 1 to 100, and others by architecture: 3,resnet18:5"),
    (['--compare', '--against', 'nowhere'], 'nowhere holds no results to compare with'),
    (['--publish'], 'holds no results; run pcl-reproduce first'),
    (['--figures', '5'], 'unrecognized arguments'),
    (['--engine', 'slurm'], 'valid: local, dask:ADDRESS, dask:FILE.json'),
    (['--engine', 'dask:nowhere.json'], 'nowhere.json'),
    (['--dry-run', '--tflops', '0'], 'give a number above 0'),
])
def test_bad_value_is_refused_in_one_line(capsys, args, named):
    "The message says what is valid; the exit code is 2."
    with pytest.raises(SystemExit) as ended: reproduce.main(args)
    assert ended.value.code == 2 and named in capsys.readouterr().err.strip().splitlines()[-1]
