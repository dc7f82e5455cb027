"A typed program that uses the public functions: mypy checks it against their annotations; it never runs."
from pathlib import Path
from typing import assert_type

import pandas as pd
import torch
from torch import Tensor, nn

from pcl_nb import cam, erf, focus_area, losses, metrics, models, networks, statistics
from pcl_nb.images import ImageSet
from pcl_nb.lab.recipe import recipe_for
from pcl_nb.lab.store import run, run_folder, trained
from pcl_nb.pcl import METHODS, Method
from pcl_nb.sources import load
from pcl_nb.training import Fitted, Recipe, fit, train_step


def measures(images: Tensor, labels: Tensor) -> float:
    "Focus area, ERF, class activation maps."
    model = models.create_model('resnet18', 5, width=.25, small_input=True, side=True)
    assert_type(model, models.StagedClassifier)
    found = focus_area.focus_area(model, images, rule='energy', tau=.4, target=labels, size=(56, 64))
    assert_type(found.coverage, Tensor); assert_type(found.prediction, Tensor)
    assert_type(focus_area.coverage_table(model, [(images, labels)]), pd.DataFrame)
    impact = erf.impact_map(model, images, stage='stage3', center='mean4')
    assert_type(impact, Tensor); assert_type(erf.erf_size(erf.impact_histogram(impact), drop=30), Tensor)
    logits, features = model(images, stages=('stage4',))
    maps = cam.class_activation_map(features['stage4'], model.head.weight, labels)
    assert_type(cam.normalize_map(maps), Tensor)
    return float(found.coverage.mean())


def any_network(module: nn.Module, images: Tensor) -> Tensor:
    "A network of one's own, and one by name."
    wrapped = models.wrap(module, {'stage3': 'layer3', 'stage4': 'layer4'}, head='fc')
    assert_type(wrapped, models.StagedClassifier)
    net = networks.network('efficientnet_lite0')
    assert_type(net, networks.Network); assert_type(networks.layer_maps(net, images), Tensor)
    return networks.layer_impact(net, images)


def in_a_loop(model: models.StagedClassifier, images: Tensor, labels: Tensor) -> Tensor:
    "Metrics, and PCL in a training step."
    coverage, size = metrics.FocusArea('threshold', .5, stage='stage4'), metrics.EffectiveReceptiveField(56, drop=30)
    coverage.update(model, images); size.update(model, images)
    assert_type(coverage.compute(), Tensor)
    loss = metrics.PCLLoss(model, METHODS['pcl'], stats=((.5,)*3, (.25,)*3))
    total: Tensor = loss(images, labels)['loss']
    train_step(model, METHODS['pcl'], torch.optim.SGD(model.parameters(), .1), images, labels)
    return total + losses.instance_consistency(images[:, 0, 0], images[:, 1, 0], 'js', detach=False)


class Own(Method):
    "A method of one's own."
    def losses(self, model: nn.Module, images: Tensor, labels: Tensor, stats: tuple | None = None) -> tuple:
        logits = model(images)
        return logits, dict(ce=nn.functional.cross_entropy(logits, labels))


def training(own: models.StagedClassifier | None) -> Fitted:
    "Recipes, runs, and what they give."
    recipe = recipe_for('smoke', method='pcl', seed=1)
    assert_type(recipe, Recipe); assert_type(recipe.key, str); assert_type(run_folder(recipe), Path)
    assert_type(load('concept_scenes', 'val', 56, 8), ImageSet)
    fitted = fit(recipe, own, progress=False)
    assert_type(fitted.metrics, pd.DataFrame)
    run(recipe, Path('here'), own, log='csv')
    statistics.draws(4, 200, 0)
    return trained(recipe, device='cpu', progress=lambda done, total: None, log='tensorboard')
