"""The ERF experiment as a user runs it: papermill's command line at the smallest profile."""
import json
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from conftest import NBS, check, contents, papermill, papermill_command, printed
from pcl_nb import claims, plots, runs
from pcl_nb.base import core
from pcl_nb.lab import results

NOTEBOOK = NBS/'erf.ipynb'
FIGURES = {'fig6': plots.FIG6, 'fig7': plots.FIG7, 'fig8': plots.FIG8, 'fig9': plots.FIG9}  # histogram figures and their networks
KEY = ['arch', 'network', 'seed', 'settings', 'quantity']


@pytest.fixture(scope='module')
def smoke(tmp_path_factory):
    "All figures of one architecture, two runs of each network: the folder, and what was in it when the run had ended."
    folder = tmp_path_factory.mktemp('erf')
    done = papermill(NOTEBOOK, folder, profile='smoke', arch='resnet18', repeats=2)
    assert done.returncode == 0, done.stderr[-3000:]
    return SimpleNamespace(folder=folder, results=folder/'results'/'smoke', files=contents(folder/'results'), runs=contents(folder/'runs'))


def read(smoke, name):
    "The numbers and the provenance of a result."
    return pd.read_csv(smoke.results/f'{name}.csv'), json.loads((smoke.results/f'{name}.json').read_text())


def measurements(folder):
    "The table of measurements of a folder of results."
    return results.measurements(folder).set_index(KEY)


def same_table(a, b): pd.testing.assert_frame_equal(a.drop(columns='learned'), b.drop(columns='learned'), check_dtype=False)


@pytest.mark.parametrize('name', ['fig5', *FIGURES])
def test_result_has_finite_numbers_and_provenance(smoke, name):
    "Numbers are finite, and the JSON says by which settings, runs, versions and revision they came about."
    table, about = read(smoke, f'{name}_resnet18')
    assert len(table) and np.isfinite(table.select_dtypes('number')).all(axis=None) and table.notna().all(axis=None)
    assert {'settings', 'parameters', 'runs', 'versions', 'revision', 'seconds'} <= set(about)
    assert 'resnet18' in about['parameters']['arch'] and about['parameters']['profile'] == 'smoke'
    assert about['versions'] == core.versions() and about['revision'] == core.revision()
    assert set(about['seconds']['training']) == set(about['runs'])
    assert set(about['runs']) == {f'{n} {s}' for n in plots.NETWORKS for s in range(4 if n == 'scenes' else 2)}
    for key in about['runs'].values(): assert f'{key}/run.json' in smoke.runs


def test_every_run_is_measured(smoke):
    "Accuracy and ERF size of each run, the baseline's four times; C10 on each choice of images (U16); no other table is left behind."
    table = measurements(smoke.results).reset_index()
    default = table[table.settings == '']
    assert table.notna().drop(columns=['low', 'high']).all(axis=None) and table.run.nunique() == 18
    assert set(default[default.quantity == 'top1'].groupby('network').size().items()) == {(n, 4 if n == 'scenes' else 2) for n in plots.NETWORKS}
    assert set(default.quantity) == {'top1', *(f'{q} {s}' for q in ('erf', 'erf70') for s in ('stage3', 'stage4'))}
    sized = table[table.quantity != 'top1']
    assert (sized.low <= sized.high).all() and sized.images.eq(runs.PROFILES['smoke'].images).all()
    others = table[table.settings != '']
    assert set(zip(others.network, others.settings)) == {(n, f'images_from={f}') for n in ('scenes', 'objects') for f in ('objects', 'own')}
    assert {p.stem for p in smoke.results.glob('*.csv')} == {'measurements', *(f'fig{i}_resnet18' for i in range(5, 10))}


@pytest.mark.parametrize('name', ['fig5', *FIGURES])
def test_picture_is_drawn(smoke, name):
    "Each figure is a picture with something on it."
    with Image.open(smoke.results/f'{name}_resnet18.png') as picture:
        assert min(picture.size) > 100 and len(np.unique(np.array(picture.convert('L')))) > 10
    lines = (smoke.results/f'{name}_resnet18.svg').read_bytes()
    assert b'<svg' in lines and b'<dc:date>' not in lines and len(lines) < 10**6


@pytest.mark.parametrize('name', FIGURES)
def test_histograms_hold_every_bin_and_every_pixel(smoke, name):
    "The saved counts are whole histograms, whatever the picture leaves out."
    table, about = read(smoke, f'{name}_resnet18')
    assert set(table.network) == set(FIGURES[name])
    for _, histogram in table.groupby(['network', 'stage']):
        assert histogram.bin.tolist() == list(range(about['settings']['bins']))
        assert histogram['count'].sum() == pytest.approx(about['settings']['size']**2, rel=1e-4)
        assert histogram.runs.eq(4 if histogram.network.iloc[0] == 'scenes' else 2).all() and (histogram['std'] >= 0).all()


def test_numbers_of_figures_and_measurements_agree(smoke):
    "The ERF sizes are sums over figure 6's bins, in the mean over runs; figure 5 shows the first run."
    (maps, _), (counts, _), table = read(smoke, 'fig5_resnet18'), read(smoke, 'fig6_resnet18'), measurements(smoke.results).value
    assert set(maps.network) == set(counts.network) == set(plots.FIG6)
    for network, lines in maps.groupby('network'):
        count = counts[counts.network == network]['count'].to_numpy()
        shown = np.bincount(lines.filter(regex=r'^x\d').to_numpy().ravel()//100, minlength=100)
        for name, dropped in dict(erf=10, erf70=30).items():
            runs = table.loc['resnet18', network, :, '', f'{name} stage4']
            assert runs.mean() == pytest.approx(count[dropped:].sum(), rel=1e-4) and runs.iloc[0] == shown[dropped:].sum()


def test_repeat_from_elsewhere_trains_nothing_and_gives_the_same_numbers(smoke, tmp_path):
    "A second run takes the networks from the store; it may start in any folder, and leaves nothing there."
    def written(): return {p: p.stat().st_mtime_ns for p in smoke.folder.glob('runs/*/[!.]*')}
    def numbers(files): return {name: files[name] for name in smoke.files if name.endswith(('.csv', '.png', '.svg'))}
    before = written()
    done = papermill_command(NOTEBOOK, smoke.folder, cwd=tmp_path, profile='smoke', arch='resnet18', repeats=2)
    assert done.returncode == 0, done.stderr[-3000:]
    assert 'to be trained: none' in printed(smoke.folder/'executed.ipynb')
    assert before and written() == before
    assert numbers(contents(smoke.folder/'results')) == numbers(smoke.files)
    assert contents(tmp_path) == {}


def test_one_figure_again_keeps_the_measurements(smoke):
    "A run of Figure 5 alone takes no row from the table of measurements."
    done = papermill(NOTEBOOK, smoke.folder, profile='smoke', arch='resnet18', figures='5', repeats=2)
    assert done.returncode == 0, done.stderr[-3000:]
    now = contents(smoke.folder/'results')
    assert [n for n in smoke.files if n.endswith('.csv') and now[n] != smoke.files[n]] == []


def test_one_run_has_no_verdicts(smoke, tmp_path):
    "One run of each network: lines without bands, rows of the first seed alone, and arrows in place of verdicts."
    (tmp_path/'runs').symlink_to(smoke.folder/'runs')
    done = papermill(NOTEBOOK, tmp_path, profile='smoke', arch='resnet18', figures='9')
    assert done.returncode == 0, done.stderr[-3000:]
    one = tmp_path/'results'/'smoke'
    assert pd.read_csv(one/'fig9_resnet18.csv')['std'].isna().all()
    now = measurements(one)
    assert set(now.index.get_level_values('seed')) == {0} and set(now.index.get_level_values('network')) == {'scenes', 'pcl_s4'}
    same_table(now, measurements(smoke.results).loc[now.index])
    assert claims.judge(results.measurements(one)).verdict.eq('').all()


def test_images_of_a_choice_are_settings(smoke, tmp_path):
    "With images_from=own (U16) figures and rows are on those images; measured by the defaults too, C10 is the same as before."
    (tmp_path/'runs').symlink_to(smoke.folder/'runs')
    done = papermill(NOTEBOOK, tmp_path, profile='smoke', arch='resnet18', figures='6', images_from='own', repeats=2)
    assert done.returncode == 0, done.stderr[-3000:]
    own, default = measurements(tmp_path/'results'/'smoke'), measurements(smoke.results)
    both = own.index.intersection(default.index)
    assert set(both.get_level_values('settings')) == {'', 'images_from=objects', 'images_from=own'}
    same_table(own.loc[both], default.loc[both])
    assert set(own.loc['resnet18', 'init'].index.get_level_values('settings')) == {'images_from=own'}
    before, now = (pd.read_csv(f/'fig6_resnet18.csv').pivot(index='bin', columns='network', values='count')
        for f in (smoke.results, tmp_path/'results'/'smoke'))
    assert before.scenes.equals(now.scenes)


@pytest.mark.slow
def test_several_architectures_share_a_figure(tmp_path):
    "Each has its figure, and those of one run share one."
    done = papermill(NOTEBOOK, tmp_path, profile='smoke', arch='resnet18,shufflenet_v2_x1_5', figures='5,9')
    assert done.returncode == 0, done.stderr[-3000:]
    folder, archs = tmp_path/'results'/'smoke', ['shufflenet_v2_x1_5', 'resnet18']
    joint = pd.read_csv(folder/'fig9.csv')
    assert list(joint.arch.unique()) == json.loads((folder/'fig9.json').read_text())['archs'] == archs
    for arch in archs:
        pd.testing.assert_frame_equal(joint[joint.arch == arch].reset_index(drop=True), pd.read_csv(folder/f'fig9_{arch}.csv'))
    scales = pd.read_csv(folder/'fig5.csv')
    assert list(scales) == ['arch', 'network', 'lowest', 'highest'] and len(scales) == 6       # the maps are in the parts
    assert json.loads((folder/'fig5.json').read_text())['parts'] == [f'fig5_{a}.json' for a in archs]
    assert sorted(p.name for p in folder.glob('fig?.*')) == [f'fig{i}.{e}' for i in (5, 9) for e in ('csv', 'json', 'png', 'svg')]


@pytest.mark.slow
def test_unknown_parameter_ends_the_run(tmp_path):
    "A misspelt name fails before anything is computed; the last line says which names there are."
    done = papermill_command(NOTEBOOK, tmp_path, profile='smoke', arhc='resnet18')
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert "unknown parameter 'arhc' (did you mean 'arch'?)" in last and 'profile' in last
    assert set(contents(tmp_path)) == {'executed.ipynb'}


def test_defaults_are_valid():
    "The parameters cell itself passes, and -1 becomes the profile's value."
    assert check(NOTEBOOK)['images'] == runs.PROFILES['smoke'].images and check(NOTEBOOK, images=5)['images'] == 5


@pytest.mark.parametrize('name, value, named', [
    ('arch', 'resnet19', "did you mean 'resnet18'?"),
    ('profile', 'tiny', 'valid: smoke, embedded, hard, photos'),
    ('profile', 'hard', 'give scenes concept_scenes_hard'),
    ('scenes', 'folder:nowhere', 'give folder:PATH with PATH/train/CLASS/*'),
    ('objects', 'image_net', 'valid: concept_scenes, concept_scenes_hard, concept_objects, folder:PATH'),
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
    ('repeats', 0, 'give a number of 1 to 100'),
    ('repeats', '2,resnet19:3', "did you mean 'resnet18'?"),
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


