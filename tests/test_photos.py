"""Real photographs: two small folders beside the project, where they are present."""
import numpy as np
import pytest
import torch

from conftest import ROOT
from pcl_nb import data, runs, training

PHOTOS = '../shared/data/photos'
pytestmark = pytest.mark.skipif(not (ROOT/PHOTOS).is_dir(), reason=f'{PHOTOS} is not there')


@pytest.fixture(params=['scenes', 'objects'])
def name(request, tmp_path, monkeypatch):
    "A data set by its path from the project's root, whatever the current folder is."
    monkeypatch.chdir(tmp_path)
    return f'folder:{PHOTOS}/{request.param}'


def test_photographs_load(name):
    "Twenty classes, the same in both splits, the same share of each."
    splits = [data.load(name, split, 56, 40) for split in ('train', 'val')]
    for images in splits:
        assert len(images.classes) == 20 and images.classes == splits[0].classes
        assert images.labels.bincount().tolist() == [2]*20
        assert all(im.dtype == torch.uint8 and im.shape[0] == 3 and im.float().std() > 1 for im in images.images)


def test_photographs_become_normalised_batches(name):
    "Both schemes give crops of the size asked for, about zero on average with a spread of about one."
    images = data.load(name, 'train', 56, 40)
    stats = data.channel_stats(images)
    for scheme in data.SCHEME_NAMES:
        x = torch.cat([x for x, y in data.batches(images, scheme, 56, stats, 10)])
        assert x.shape == (40, 3, 56, 56) and x.mean().abs() < .3 and .7 < x.std() < 1.3


def test_a_network_trains_on_photographs(name):
    "One short epoch: all numbers are finite, and the weights have moved."
    recipe = runs.recipe_for('smoke', data=name, train=100, val=40)
    fitted = training.fit(recipe, progress=False)
    assert len(fitted.classes) == 20 and np.isfinite(fitted.metrics.to_numpy()).all()
    start = training.build_model(recipe, 20).head.weight
    assert torch.isfinite(fitted.model.head.weight).all() and not torch.equal(fitted.model.head.weight.cpu(), start)


def test_photographs_are_those_of_the_manifest(name):
    "Every file has the SHA-256 that the package lists for it."
    found = data.differences(data.source(name).folder, data.read_manifest(f"photos-{name.rpartition('/')[2]}"), progress=False)
    assert not any(found.values())
