"""The ERF experiment as a user runs it: papermill's command line at the smallest profile."""
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from conftest import NBS, check, contents, papermill, printed
from pcl_nb import core, erf, plots

NOTEBOOK = NBS/'erf.ipynb'
FIGURES = {'fig6': plots.FIG6, 'fig7': plots.FIG7, 'fig8': plots.FIG8, 'fig9': plots.FIG9}  # histogram figures and their networks
TABLES = 'erf_sizes', 'erf_comparisons', 'erf_claims'


@pytest.fixture(scope='module')
def smoke(tmp_path_factory):
    "All figures of one architecture: the folder, and what was in it when the run had ended."
    folder = tmp_path_factory.mktemp('erf')
    done = papermill(NOTEBOOK, folder, profile='smoke', arch='resnet18')
    assert done.returncode == 0, done.stderr[-3000:]
    return SimpleNamespace(folder=folder, results=folder/'results'/'smoke', files=contents(folder/'results'), runs=contents(folder/'runs'))


def read(smoke, name):
    "The numbers and the provenance of a result."
    return pd.read_csv(smoke.results/f'{name}.csv'), json.loads((smoke.results/f'{name}.json').read_text())


@pytest.mark.parametrize('name', ['fig5', *FIGURES, *TABLES])
def test_result_has_finite_numbers_and_provenance(smoke, name):
    "Numbers are finite, and the JSON says by which settings, runs, versions and revision they came about."
    table, about = read(smoke, f'{name}_resnet18')
    if name == 'erf_claims':
        assert table.pop('takes').notna().eq(table.verdict == 'inconclusive').all()      # what would decide it, where it is not decided
    assert len(table) and np.isfinite(table.select_dtypes('number')).all(axis=None) and table.notna().all(axis=None)
    assert {'settings', 'parameters', 'runs', 'versions', 'revision', 'seconds'} <= set(about)
    assert 'resnet18' in about['parameters']['arch'] and about['parameters']['profile'] == 'smoke'
    assert about['versions'] == core.versions() and about['revision'] == core.revision()
    assert set(about['seconds']['training']) == set(about['runs']) == set(plots.NETWORKS)
    for key in about['runs'].values(): assert f'{key}/run.json' in smoke.runs


@pytest.mark.parametrize('name', ['fig5', *FIGURES])
def test_picture_is_drawn(smoke, name):
    "Each figure is a picture with something on it."
    with Image.open(smoke.results/f'{name}_resnet18.png') as picture:
        assert min(picture.size) > 100 and len(np.unique(np.array(picture.convert('L')))) > 10


@pytest.mark.parametrize('name', FIGURES)
def test_histograms_hold_every_bin_and_every_pixel(smoke, name):
    "The saved counts are whole histograms, whatever the picture leaves out."
    table, about = read(smoke, f'{name}_resnet18')
    assert set(table.network) == set(FIGURES[name])
    for _, histogram in table.groupby(['network', 'stage']):
        assert histogram.bin.tolist() == list(range(about['settings']['bins']))
        assert histogram['count'].sum() == about['settings']['size']**2


def test_numbers_of_figures_and_tables_agree(smoke):
    "Figure 6 counts the pixels of figure 5's maps, and the ERF sizes are sums over figure 6's bins."
    maps, counts, sizes = (read(smoke, f'{name}_resnet18')[0] for name in ('fig5', 'fig6', 'erf_sizes'))
    assert set(maps.network) == set(counts.network)
    for network, pixels in maps.groupby('network'):
        impact = pixels.pivot(index='y', columns='x', values='impact').to_numpy()
        count = counts[counts.network == network]['count'].to_numpy()
        moved = np.abs(erf.impact_histogram(torch.tensor(impact)).numpy() - count).sum()
        assert moved <= 4, 'saved to six digits, a pixel or two may cross an edge between bins'
        for view, dropped in erf.VIEWS.items():
            row = sizes[(sizes.network == network) & (sizes.stage == 'stage4') & (sizes['view'] == f'{view} bins')]
            assert row['size'].item() == count[dropped:].sum()


def test_repeat_from_elsewhere_trains_nothing_and_gives_the_same_numbers(smoke, tmp_path):
    "A second run takes the networks from the store; it may start in any folder, and leaves nothing there."
    def written(): return {p: p.stat().st_mtime_ns for p in smoke.folder.glob('runs/*/[!.]*')}
    def numbers(files): return {name: files[name] for name in smoke.files if name.endswith('.csv')}
    before = written()
    done = papermill(NOTEBOOK, smoke.folder, cwd=tmp_path, profile='smoke', arch='resnet18')
    assert done.returncode == 0, done.stderr[-3000:]
    assert 'to be trained: none' in printed(smoke.folder/'executed.ipynb')
    assert before and written() == before
    assert numbers(contents(smoke.folder/'results')) == numbers(smoke.files)
    assert contents(tmp_path) == {}


def test_one_figure_again_keeps_the_tables_whole(smoke):
    "A run of Figure 5 alone takes no row from the tables of sizes, comparisons and claims."
    done = papermill(NOTEBOOK, smoke.folder, profile='smoke', arch='resnet18', figures='5')
    assert done.returncode == 0, done.stderr[-3000:]
    now = contents(smoke.folder/'results')
    assert [n for n in smoke.files if n.endswith('.csv') and now[n] != smoke.files[n]] == []
    assert read(smoke, 'erf_sizes_resnet18')[1]['others']


def test_verdicts_of_several_runs_cover_both_choices(smoke, tmp_path):
    "With repeats the figure is that of the first run; sizes are means over the runs, and the JSON names all of them."
    results = tmp_path/'results'/'smoke'
    shutil.copytree(smoke.results, results); (tmp_path/'runs').symlink_to(smoke.folder/'runs')
    done = papermill(NOTEBOOK, tmp_path, profile='smoke', arch='resnet18', figures='9', repeats=2)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (results/'fig9_resnet18.csv').read_bytes() == (smoke.results/'fig9_resnet18.csv').read_bytes()
    assert set(json.loads((results/'fig9_resnet18.json').read_text())['runs']) == {'scenes', 'scenes 1', 'pcl_s4', 'pcl_s4 1'}
    one, two = (pd.read_csv(f/'erf_comparisons_resnet18.csv').set_index(['a', 'b', 'stage', 'images_from']) for f in (smoke.results, results))
    assert one.runs.eq(1).all() and two.runs[two.runs == 2].index.tolist() == [('pcl_s4', 'scenes', 'stage4', 'scenes')]
    same = two.index[two.runs == 1]
    pd.testing.assert_frame_equal(one.loc[same], two.loc[same], check_dtype=False)


def test_every_choice_of_images_stands_beside_the_chosen_one(smoke, tmp_path):
    "C10 is measured on scenes, objects and each network's own images (U16); verdict and figures rest on the chosen ones."
    (tmp_path/'runs').symlink_to(smoke.folder/'runs')
    done = papermill(NOTEBOOK, tmp_path, profile='smoke', arch='resnet18', figures='6', images_from='own')
    assert done.returncode == 0, done.stderr[-3000:]
    default, own = (pd.read_csv(f/'erf_comparisons_resnet18.csv') for f in (smoke.results, tmp_path/'results'/'smoke'))
    of_default, of_own = (t[(t.a == 'scenes') & (t.b == 'objects')].set_index('images_from') for t in (default, own))
    assert list(of_default.index) == list(of_own.index) == ['scenes', 'objects', 'own']
    assert of_default.chosen.tolist() == [True, False, False] and of_own.chosen.tolist() == [False, False, True]
    pd.testing.assert_frame_equal(of_default.drop(columns='chosen'), of_own.drop(columns='chosen'))
    assert own[own.b == 'init'].images_from.eq('own').all()
    before, now = (pd.read_csv(f/'fig6_resnet18.csv').pivot(index='bin', columns='network', values='count')
        for f in (smoke.results, tmp_path/'results'/'smoke'))
    assert before.scenes.equals(now.scenes) and not before.objects.equals(now.objects)


def test_batch_normalisation_has_one_source(smoke):
    "C15 is judged in relu_activity.ipynb alone."
    assert 'C15' not in set(read(smoke, 'erf_claims_resnet18')[0].claim)


def test_more_architectures_join_the_figure(smoke, tmp_path):
    "Two more, with the same settings: each has its figure, and all three share one."
    results = tmp_path/'results'/'smoke'
    shutil.copytree(smoke.results, results)
    done = papermill(NOTEBOOK, tmp_path, profile='smoke', arch='shufflenet_v2_x1_5,resnet34', figures='6')
    assert done.returncode == 0, done.stderr[-3000:]
    joint, archs = pd.read_csv(results/'fig6.csv'), ['shufflenet_v2_x1_5', 'resnet18', 'resnet34']
    assert list(joint.arch.unique()) == json.loads((results/'fig6.json').read_text())['archs'] == archs
    for arch in archs:
        pd.testing.assert_frame_equal(joint[joint.arch == arch].reset_index(drop=True), pd.read_csv(results/f'fig6_{arch}.csv'))
    assert sorted(p.name for p in results.glob('fig?.*')) == ['fig6.csv', 'fig6.json', 'fig6.png']


def test_unknown_parameter_ends_the_run(tmp_path):
    "A misspelt name fails before anything is computed; the last line says which names there are."
    done = papermill(NOTEBOOK, tmp_path, profile='smoke', arhc='resnet18')
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert "unknown parameter 'arhc' (did you mean 'arch'?)" in last and 'profile' in last
    assert set(contents(tmp_path)) == {'executed.ipynb'}


def test_defaults_are_valid():
    "The parameters cell itself passes, and -1 becomes the profile's value."
    assert check(NOTEBOOK)['images'] == core.PROFILES['smoke'].images and check(NOTEBOOK, images=5)['images'] == 5


@pytest.mark.parametrize('name, value, named', [
    ('arch', 'resnet19', "did you mean 'resnet18'?"),
    ('profile', 'tiny', 'valid: smoke, embedded, photos'),
    ('scenes', 'folder:nowhere', 'give folder:PATH with PATH/train/CLASS/*'),
    ('objects', 'image_net', 'valid: concept_scenes, concept_objects, folder:PATH'),
    ('images_from', 'places', 'valid: scenes, objects, own'),
    ('images', 0, 'parameter images: 0 is not a whole number'),
    ('images', 1.5, 'parameter images: 1.5 is not a whole number'),
    ('images', True, 'parameter images: True is not a whole number'),
    ('size', 0, 'is not a whole number from 16 to 4096'),
    ('epochs', 0, 'is not a whole number from 1 up'),
    ('stages', 'stage5', 'valid: stage3, stage4'),
    ('stages', '', 'give at least one'),
    ('figures', '4', 'valid: 5, 6, 7, 8, 9'),
    ('center', 'middle', 'valid: floor, mean4'),
    ('relu', 'none', 'valid: after, before, conv'),
    ('scheme', 'hard', 'valid: simple, complex'),
    ('pcl', 'tau', "'tau' is not name=value"),
    ('pcl', 'tau=2', 'a number from 0 to 1'),
    ('pcl', 'tau=high', 'a number from 0 to 1'),
    ('pcl', 'tua=.5', "did you mean 'tau'?"),
    ('bootstrap', 0, 'is not a whole number from 2 to 10000'),
    ('seed', -1, 'is not a whole number from 0 up'),
    ('repeats', 0, 'is not a whole number from 1 to 100'),
    ('repeats', 1.5, 'is not a whole number from 1 to 100'),
    ('workers', -1, 'is not a whole number from 0 up'),
    ('device', 'tpu9', "device 'tpu9' cannot be used here"),
    ('bins', 0, 'is not a whole number from 10 to 10000'),
    ('smooth', 0, 'is not a whole number from 1 to 50'),
    ('smooth', 2.5, 'is not a whole number from 1 to 50'),
    ('init_statistics', 'fresh', 'valid: stored, calibrated, batch'),
    ('log_counts', 'yes', 'neither True nor False'),
    ('imagse', 3, "did you mean 'images'?"),
])
def test_bad_value_is_refused_in_one_line(name, value, named):
    "The message says what is valid, on one line; nothing is computed."
    with pytest.raises(core.InputError) as refused: check(NOTEBOOK, **{name: value})
    assert named in str(refused.value) and '\n' not in str(refused.value)


