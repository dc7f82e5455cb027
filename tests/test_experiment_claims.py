"""claims.ipynb as a user runs it: on made-up measurements, and on none."""
import numpy as np
import pandas as pd
import pytest

from conftest import NBS, papermill, printed
from pcl_nb import claims
from pcl_nb.lab import results

SIZES = {'focus': .2, 'erf stage3': 100., 'erf stage4': 150., 'top1': .9, 'shrunk': .1, 'misled': .02, 'coupling': 1., 'positive stage4': .3}


def made_up(archs, runs):
    "Measurements of every network that a claim compares: PCL is 40 % above the others, and nothing else differs."
    g, rows = np.random.default_rng(0), []
    networks = {(p.quantity, n) for c in claims.CLAIMS.values() for p in c.parts for n, _ in p.weights}
    for arch in archs:
        for quantity, network in sorted(networks):
            for seed in range(runs):
                points = quantity in claims.POINTS
                mean = SIZES[quantity]*(1.4 if network == 'pcl' and not points else 1)
                value = mean + g.normal(0, .005) if points else mean*np.exp(g.normal(0, .02))
                rows.append(dict(arch=arch, network=network, scheme='simple', data='concept_scenes', seed=seed, settings='', quantity=quantity,
                    value=value, low=np.nan, high=np.nan, images=1000, learned=True, run=''))
    return pd.DataFrame(rows)


def judged(folder, table=None):
    "What the notebook leaves behind and prints."
    if table is not None: results.record(folder/'out', table)
    done = papermill(NBS/'claims.ipynb', folder, profile='smoke', out=folder/'out')
    assert done.returncode == 0, done.stderr[-3000:]
    return {p.name for p in (folder/'out').glob('*')}, printed(folder/'executed.ipynb')


@pytest.fixture(scope='module')
def several(tmp_path_factory):
    "The folder after a run on three runs of two architectures."
    folder = tmp_path_factory.mktemp('claims')
    return folder, *judged(folder, made_up(['resnet18', 'resnet34'], 3))


@pytest.mark.slow
def test_files_and_words(several):
    "Verdicts and comparisons, each once with its picture; the number of decisions that chance alone would make."
    folder, files, text = several
    assert {f'{n}.{e}' for n in ('claims', 'effects') for e in ('csv', 'json', 'png')} <= files and not any('comparisons' in f for f in files)
    verdicts = pd.read_csv(folder/'out'/'claims.csv')
    n = verdicts.verdict.notna().sum()
    assert f'{n} cells are judged' in text and f'{.05*n:.1f} of them' in text


def test_tables_are_those_of_the_chapter(several):
    "The notebook computes nothing of its own, and a known effect is found."
    table = results.measurements(several[0]/'out')
    verdicts, compared = (pd.read_csv(several[0]/'out'/f'{n}.csv') for n in ('claims', 'effects'))
    want = claims.judge(table)
    assert verdicts.claim.tolist() == want.claim.tolist() and verdicts.verdict.fillna('').tolist() == want.verdict.tolist()
    assert verdicts.set_index(['arch', 'claim']).verdict['resnet18', 'C3'] == 'supported'
    estimate = compared.set_index(['arch', 'claim']).loc[('resnet18', 'C3')]
    assert abs(estimate.estimate - .4) < .05 and estimate.low < .4 < estimate.high
    assert 'all' in set(compared.arch)


@pytest.mark.slow
def test_one_run_gives_directions(tmp_path):
    "One run of each network: pictures with arrows, no verdict."
    files, text = judged(tmp_path, made_up(['resnet18'], 1))
    verdicts = pd.read_csv(tmp_path/'out'/'claims.csv').query("claim != 'C22'")                # over networks, not runs
    assert verdicts.verdict.isna().all() and verdicts.arrow.dropna().str.fullmatch('[↑↓]+').all()
    assert {'claims.png', 'effects.png'} <= files


@pytest.mark.slow
def test_nothing_measured(tmp_path):
    "An empty folder is no error."
    files, text = judged(tmp_path)
    assert 'no measurements' in text and not files


@pytest.mark.slow
def test_runs_on_different_data_are_refused(tmp_path):
    "Two scene folders in one results folder are not runs of one network: one line that names both, and no verdict."
    table = made_up(['resnet18'], 2)
    table.data = np.where(table.seed == 0, 'folder:mine', 'folder:yours')
    results.record(tmp_path/'out', table)
    done = papermill(NBS/'claims.ipynb', tmp_path, profile='smoke', out=tmp_path/'out')
    said = done.stderr.strip().splitlines()[-1]
    assert done.returncode and 'InputError' in said and '-p out FOLDER' in said
    assert 'folder:mine and folder:yours' in said and not (tmp_path/'out'/'claims.csv').exists()
