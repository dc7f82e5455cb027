"""initialisation.ipynb as a user runs it, at the smallest profile."""
import json
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from torchvision.transforms.functional import to_pil_image

from conftest import NBS, check, papermill, printed
from pcl_nb import data, erf, models, reproduce, runs, sources
from pcl_nb.base import core
from pcl_nb.lab import jobs

NOTEBOOK = NBS/'initialisation.ipynb'


@pytest.fixture(scope='module')
def smoke(tmp_path_factory):
    "Two architectures."
    folder = tmp_path_factory.mktemp('initialisation')
    done = papermill(NOTEBOOK, folder, profile='smoke', archs='resnet18,shufflenet_v2_x1_5')
    assert done.returncode == 0, done.stderr[-3000:]
    return SimpleNamespace(folder=folder, results=folder/'results'/'smoke',
        table=pd.read_csv(folder/'results'/'smoke'/'initialisation.csv'), said=printed(folder/'executed.ipynb'))


def test_every_combination_is_measured(smoke):
    "A row a combination and view; equal weights give equal shares; nothing is trained."
    assert len(smoke.table) == 2*3*3*3*2 and smoke.table.share.between(0, 1).all()
    wide = smoke.table.pivot(index=['arch', 'statistics', 'reading', 'view'], columns='init', values='share')
    assert (wide.zero_residual == wide.torchvision)['shufflenet_v2_x1_5'].all()
    assert (wide.zero_residual < wide.torchvision)['resnet18'].all()
    assert not any((smoke.folder/'runs').glob('*/run.json'))
    about = json.loads((smoke.results/'initialisation.json').read_text())
    assert about['runs'] == {} and {'settings', 'parameters', 'versions', 'cpu_seconds'} <= set(about)
    assert (smoke.results/'initialisation.png').read_bytes().startswith(b'\x89PNG')


@pytest.mark.parametrize('statistics', erf.STATISTICS)
def test_share_is_that_of_impact_map(smoke, statistics):
    "A row is the ERF size of the network that its columns name, on the images that the notebook says."
    P = dict(size=64, scenes='concept_scenes', profile='smoke')
    like, stats = runs.recipe_of('init', 'resnet18', P), data.channel_stats(data.load('concept_scenes', 'train', 64, 6))
    x = torch.cat([x for x, _ in runs.random_batches('concept_scenes', 6, like, stats, 6, 0)])
    with core.seeded('model', 0): model = models.create_model('resnet18', 16, width=.25, init='torchvision')
    if statistics == 'calibrated': erf.calibrate(model, [x])
    rows = smoke.table.query(f"arch == 'resnet18' and init == 'torchvision' and statistics == '{statistics}'")
    assert len(rows) == 6
    for r in rows.itertuples():
        impact = erf.impact_map(model, x, relu=r.reading, shared=erf.SHARED if statistics == 'batch' else 0)
        size = erf.erf_size(erf.impact_histogram(impact), erf.VIEWS[int(r.view[:2])]).item()
        assert abs(size/64**2 - r.share) < .003, r


def test_text_follows_from_the_table(smoke):
    "The combinations that are named are those in which every network's share is below the limit."
    first = smoke.table.query("view == '90 bins'").groupby(['init', 'statistics', 'reading'], sort=False).share.max()
    named = smoke.said.partition('stage4: below 5% of the image in all 2 networks with ')[2].splitlines()[0]
    assert named == ('; '.join(' '.join(k) for k in first[first < .05].index) or 'none')
    done = papermill(NOTEBOOK, smoke.folder, profile='smoke', archs='resnet18', small=1)
    assert done.returncode == 0
    assert printed(smoke.folder/'executed.ipynb').count('; ') >= 26, 'all 27 combinations are below the whole image'


@pytest.mark.parametrize('name, value, named', [
    ('inits', 'kaiming', 'valid: zero_residual, torchvision, pytorch'),
    ('statistics', 'running', 'valid: stored, calibrated, batch'), ('stages', 'stage5', 'valid: stage3, stage4'),
    ('shared', 1, 'is not a whole number from 2 to 1024'), ('width', 0., 'is not a number from 0.05'),
    ('small', 2., 'is not a number from 0 to 1')])
def test_bad_value_is_refused_in_one_line(name, value, named):
    "The message names the parameter and what is valid."
    with pytest.raises(core.InputError) as raised: check(NOTEBOOK, **{name: value})
    assert named in str(raised.value) and '\n' not in str(raised.value)


@pytest.mark.slow
def test_reproduced_without_training(tmp_path, capsys):
    "`pcl-reproduce --only initialisation` runs it, and leaves it out the second time."
    command = ['--only', 'initialisation', '--profile', 'smoke', '--archs', 'resnet18', '--quiet',
               '--out', str(tmp_path/'out')]
    for state in ('done', 'up to date'):
        assert reproduce.main(command) == 0
        said = capsys.readouterr().out
        assert '0 networks, 0 to be trained' in said and state in said
    assert np.isfinite(pd.read_csv(tmp_path/'out'/'initialisation.csv').share).all()


def test_changed_photographs_are_seen(tmp_path):
    "Without networks, too, a result depends on its images."
    def receipt(shade):
        for split in ('train', 'val'):
            (tmp_path/'photos'/split/'a').mkdir(parents=True, exist_ok=True)
            to_pil_image(torch.full((3, 40, 40), shade/255)).save(tmp_path/'photos'/split/'a'/f'{shade}.png')
        sources.forget()                                      # kept within a process
        job = reproduce.Job('initialisation', dict(scenes=f"folder:{tmp_path/'photos'}"))
        return jobs._receipt(job, {}, tmp_path)
    assert receipt(10) != receipt(20)
