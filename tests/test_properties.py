"""What holds for every input: gradients, bounds, invariances and symmetries; and the numbers that are the same however they are computed."""
import math
from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from torch import nn

from conftest import contents
from pcl_nb import cam, erf, focus_area, losses, methods, models, runs, training
from pcl_nb.base import core

always = settings(max_examples=60, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
QUICK = runs.recipe_for('smoke')
STATS = (.5,)*3, (.25,)*3       # mean, std of a normalisation


# Gradients

class Kept:
    "Inside, `detach` gives what it gave the first time, in turn: a finite difference then leaves alone what no gradient flows through."
    def __init__(self): self.values, self.turn = [], 0

    def __call__(self, compute):
        plain, self.turn = torch.Tensor.detach, 0
        def detach(t):
            if self.turn == len(self.values): self.values.append(plain(t).clone())
            self.turn += 1
            return self.values[self.turn - 1]
        with mock.patch.object(torch.Tensor, 'detach', detach): return compute()


@pytest.mark.parametrize('shape', [(4, 3), (1, 3), (4, 1)], ids=str)
@pytest.mark.parametrize('detach', [True, False], ids=['teacher', 'both sides'])
@pytest.mark.parametrize('loss, distance',
    [*((losses.instance_consistency, d) for d in losses.DISTANCES),
        *((losses.category_consistency, d) for d in (*losses.DISTANCES, 'correlation'))],
                         ids=lambda v: v if isinstance(v, str) else v.__name__[:8])
def test_gradient_of_a_consistency_loss(loss, distance, detach, shape):
    "The analytic gradient is the finite difference, for one image and for one category, too, and for scores far apart."
    g = torch.Generator().manual_seed(0)
    z, e = (scale*torch.randn(shape, generator=g, dtype=torch.float64) for scale in (1, 5))
    kept = Kept()
    assert torch.autograd.gradcheck(lambda z, e: kept(lambda: loss(z, e, distance, detach)), (z.requires_grad_(), e.requires_grad_()))


class Tiny(nn.Module):
    "Smooth, with batch normalisation; few enough parameters that each can be nudged."
    def __init__(self):
        super().__init__()
        self.stage3 = nn.Sequential(nn.Conv2d(3, 3, 3, 2, 1, bias=False), nn.BatchNorm2d(3), nn.Tanh())
        self.stage4 = nn.Sequential(nn.Conv2d(3, 4, 2), nn.Softplus())
        self.fc = nn.Linear(4, 3)

    def forward(self, x): return self.fc(self.stage4(self.stage3(x)).mean((2, 3)))


class Total(nn.Module):
    "A method's loss items, added up, the same random draws at every call."
    def __init__(self, method, model):
        super().__init__()
        self.method, self.model = method, model

    def forward(self, x, y):
        torch.manual_seed(0)
        return sum(self.method.losses(self.model, x, y, STATS)[1].values())


OPTIONS = [*((name, {}) for name in methods.METHODS),
    ('pcl', dict(detach=False, mask='soft', ipc_distance='js', cpc_distance='correlation', fill='black')),
           ('pcl', dict(mask='soft', target='truth', fill='noise', ipc_distance='mse', cpc_distance='mse', side_weight=.5)),
           ('pcl_s4', dict(detach=False)),
           ('acol', methods.OFFICIAL['acol']), ('adl', dict(drop_rate=1, stage='stage3+stage4')), ('amloss', dict(weight=2., sigma=.3))]


@pytest.mark.parametrize('name, options', OPTIONS, ids=[' '.join([n, *(f'{k}={v}' for k, v in o.items())]) for n, o in OPTIONS])
def test_gradient_of_every_method(name, options):
    "The gradient of the total loss, through the network in training mode, is the finite difference in every parameter; a step of training takes it."
    torch.manual_seed(3)
    method = methods.get_method(name, **options)
    model = models.wrap(Tiny(), dict(stage3='stage3', stage4='stage4'), 'fc', side=method.side)
    with torch.no_grad(): model(torch.randn(8, 3, 8, 8))
    total = Total(method, method.prepare(model)).double().train()
    x, y = torch.randn(4, 3, 8, 8, dtype=torch.float64), torch.tensor([0, 1, 2, 1])
    names, values = zip(*((n, p.detach().clone().requires_grad_()) for n, p in total.named_parameters()))
    kept = Kept()
    def loss(*values): return kept(lambda: torch.func.functional_call(total, dict(zip(names, values)), (x, y)))
    assert torch.autograd.gradcheck(loss, values)
    torch.manual_seed(0)
    training.train_step(total.model, method, torch.optim.SGD(total.parameters(), 0.), x, y, STATS)
    torch.testing.assert_close([p.grad for p in total.parameters()], list(torch.autograd.grad(loss(*values), values)))


# Class activation maps and focus area

def maps(low=-1000, high=1000, dtype=np.float32):
    "Raw maps (B,h,w): flat ones and single pixels among them."
    values = st.floats(low, high, width=np.dtype(dtype).itemsize*8) if np.dtype(dtype).kind == 'f' else st.integers(low, high)
    return arrays(dtype, array_shapes(min_dims=3, max_dims=3, max_side=6), elements=values).map(torch.from_numpy)


def flat(m): return m.amax((1, 2)) == m.amin((1, 2))


@always
@given(maps(), st.integers(-20, 20), st.sampled_from([.1, .5, .9]))
def test_normalised_map_knows_no_scale(m, power, tau):
    "It lies in [0,1] and reaches both ends unless it is flat; a factor changes neither it nor the region; a sign turns it over."
    n = cam.normalize_map(m)
    assert (n >= 0).all() and (n <= 1).all() and torch.equal(n.amax((1, 2)), (~flat(m)).float()) and (n.amin((1, 2)) == 0).all()
    scaled = 2.**power*m.double()                     # a power of two: without rounding
    assert torch.equal(cam.normalize_map(scaled), cam.normalize_map(m.double()))
    wide = m[m.amax((1, 2)) - m.amin((1, 2)) > 1e-6].double()
    torch.testing.assert_close(cam.normalize_map(3*wide + 7), cam.normalize_map(wide), rtol=0, atol=1e-6)
    torch.testing.assert_close(cam.normalize_map(-m), torch.where(flat(m)[:, None, None], 0, 1 - n), rtol=0, atol=1e-6)
    for mask in cam.MASKS:
        assert torch.equal(cam.erasing_mask(scaled, (9, 11), mask, tau), cam.erasing_mask(m.double(), (9, 11), mask, tau))


def classifier(size):
    "A linear classifier of images, the same for the same size."
    weight = torch.randn(3*size[0]*size[1], 5, generator=torch.Generator().manual_seed(0))
    return lambda x: x.flatten(1) @ weight


@always
@given(maps(), st.tuples(st.integers(1, 12), st.integers(1, 12)), st.floats(0, 1), st.floats(0, 1))
def test_focus_area_grows_and_shrinks_with_tau(m, size, a, b):
    "Coverage is a share; regions of one map lie in each other: smaller for a higher threshold, larger for a larger share of the mass. A flat map has none."
    images, nobody, low, high = torch.zeros(len(m), 3, *size), torch.zeros(len(m), dtype=torch.long), min(a, b), max(a, b)
    for rule in ('threshold', 'energy'):
        small, large = (focus_area.region(None, images, m, nobody, rule, tau)
            for tau in ((high, low) if rule == 'threshold' else (low, high)))
        assert small.shape == (len(m), *size) and (small <= large).all() and not large[flat(m)].any()
    assert torch.equal(focus_area.region(None, images, m, nobody, 'threshold', 0.).flatten(1).all(1),
        ~flat(m)) and not focus_area.region(None, images, m, nobody, 'energy', 0.).any()


@always
@given(maps(), st.tuples(st.integers(1, 12), st.integers(1, 12)), st.floats(0, 1), st.integers(-20, 20))
def test_energy_region_is_the_smallest_that_holds_its_share(m, size, tau, power):
    "It holds the share, without its weakest pixel it would not, and a factor does not change it."
    found = focus_area.energy_mask(m, size, tau)
    mass = nn.functional.interpolate(m[:, None], size=size, mode='bilinear', align_corners=False)[:, 0].clamp(min=0).double()
    held, whole = (mass*found).sum((1, 2)), mass.sum((1, 2))
    some = found.flatten(1).any(1)
    assert torch.equal(some, ~flat(m) & (whole > 0) & (tau > 0))
    assert (held[some] >= tau*whole[some]*(1 - 1e-9)).all()
    fence = 2.**-15*(m.amax((1, 2)) - m.amin((1, 2))).double()          # what differs by less is a tie
    weakest = torch.where(found, mass, torch.inf).amin((1, 2))
    assert ((held - weakest)[some] <= (tau*whole*(1 + 1e-9) + fence)[some]).all()
    assert torch.equal(focus_area.energy_mask(2.**power*m.double(), size, tau), focus_area.energy_mask(m.double(), size, tau))


@always
@given(maps(), st.tuples(st.integers(2, 12), st.integers(2, 12)), st.integers(1, 9))
def test_sufficient_region_keeps_the_prediction(m, size, steps):
    "Shown alone it keeps the prediction of the whole image, after however many steps; a flat map has none."
    model, images = classifier(size), torch.randn(len(m), 3, *size, generator=torch.Generator().manual_seed(1))
    prediction = model(images).argmax(1)
    found = focus_area.region(model, images, m, prediction, 'sufficient', steps=steps)
    alone = model(images*found[:, None]).argmax(1)
    assert (found.flatten(1).any(1) != flat(m)).all() and torch.equal(alone[~flat(m)], prediction[~flat(m)])


# Impact maps

@always
@given(maps(0, 2**20, np.int64), st.integers(1, 2**10), st.integers(-2**20, 2**20), st.integers(1, 120), st.randoms(use_true_random=False))
def test_histogram_counts_every_pixel_at_its_height(m, factor, shift, bins, random):
    "It sums to H*W, knows neither place nor positive affine maps (in whole numbers: without rounding), and a flat map is in the lowest bin."
    m = m.double()
    h = erf.impact_histogram(m, bins)
    assert h.dtype == torch.int64 and (h >= 0).all() and (h.sum(-1) == m[0].numel()).all()
    assert torch.equal(erf.impact_histogram(m*factor + shift, bins), h)
    order = random.sample(range(m[0].numel()), m[0].numel())
    assert torch.equal(erf.impact_histogram(m.flatten(1)[:, order].view_as(m), bins), h)
    assert (h[flat(m), 0] == m[0].numel()).all() and (h[~flat(m), 0] > 0).all() and (h[~flat(m), -1] > 0).all()
    sizes = torch.stack([erf.erf_size(h, drop) for drop in range(bins)])
    assert (sizes.diff(dim=0) <= 0).all() and (sizes[0] == m[0].numel()).all()


def mirror(model, axis, symmetric=False):
    "The network with every kernel mirrored; with `symmetric`, the mean of both."
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 4: p.copy_((p + p.flip(axis))/2 if symmetric else p.flip(axis))
    return model


@pytest.mark.parametrize('axis', [-1, -2], ids=['left-right', 'up-down'])
@pytest.mark.parametrize('arch, size, small, center',
    [('resnet18', 33, True, 'floor'), ('resnet50', 65, False, 'floor'), ('shufflenet_v2_x1_5', 33, True, 'mean4'),
        ('densenet121', 32, True, 'mean4')])
def test_impact_map_turns_with_image_and_network(arch, size, small, center, axis):
    "Images and kernels mirrored mirror the map, where the grid of positions is its own mirror image; with symmetric kernels, the images alone do."
    torch.manual_seed(0)
    model = models.create_model(arch, 5, width=.25, small_input=small, init='torchvision').double()
    with torch.no_grad(): model.train()(torch.randn(8, 3, size, size, dtype=torch.float64))
    x = torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    def impact(x): return erf.impact_map(model, x, center=center)
    first = impact(x)
    assert not torch.allclose(first, first.flip(axis), rtol=.1)
    mirror(model, axis)
    torch.testing.assert_close(impact(x.flip(axis)), first.flip(axis), rtol=1e-7, atol=1e-9*first.max().item())
    mirror(model, axis, symmetric=True)
    torch.testing.assert_close(impact(x.flip(axis)), impact(x).flip(axis), rtol=1e-7, atol=1e-9*first.max().item())


# The same numbers

@pytest.mark.slow
def test_one_worker_and_two_train_the_same(tmp_path, monkeypatch):
    "The same recipes and seeds: weights and metrics agree byte by byte; another seed gives others."
    recipes, found = [replace(QUICK, method='pcl'), replace(QUICK, method='has', seed=1), QUICK, replace(QUICK, seed=1)], []
    for workers in (1, 2):
        monkeypatch.setenv('PCL_NB_RUNS', str(tmp_path/str(workers)))
        assert runs.train_all(recipes, workers, device='cpu', progress=False) == len(recipes)
        found.append({k: v for k, v in contents(tmp_path/str(workers)).items() if k.endswith(('weights.safetensors', 'metrics.csv'))})
    assert len(found[0]) == 2*len(recipes) and found[0] == found[1]
    assert len({v for k, v in found[0].items() if k.endswith('weights.safetensors')}) == len(recipes)


# Of all weights' norm, or of the map's maximum. Sums in another order differ in the last digits; each step of training enlarges that about tenfold.
THREADS = dict(map=1e-4, step=1e-4, epoch=1e-2)


def test_threads_change_only_last_digits():
    "One and two threads: an impact map, the weights after one step and those after four agree to `THREADS`; the runs have different names."
    def weights(**changes):
        fitted = [training.fit(replace(QUICK, method='pcl', threads=n, **changes), device='cpu', progress=False) for n in (1, 2)]
        return fitted[0].model, *(torch.cat([v.flatten().double() for v in f.model.state_dict().values()]) for f in fitted)
    for part, changes in dict(step=dict(train=QUICK.batch), epoch={}).items():
        model, one, two = weights(**changes)
        assert (one - two).norm() <= THREADS[part]*one.norm()
    x, found = torch.randn(8, 3, 28, 28, generator=torch.Generator().manual_seed(0)), []
    for n in (1, 2):
        with core.threads(n): found.append(erf.impact_map(model, x))
    assert (found[0] - found[1]).abs().max() <= THREADS['map']*found[0].max()
    assert replace(QUICK, threads=1).key != replace(QUICK, threads=2).key


# Learning rates, by hand: lr (1 + cos(pi t))/2 with t = done/epochs, and a tenth every 30 of 80 epochs.
COSINE = {0: .1, 10: .0853553, 13: .0761249, 20: .05, 30: .0146447, 39: .000154133}
STEP = {0: .1, 29: .1, 30: .01, 59: .01, 60: .001, 79: .001}
STEPS = dict(simple=[.05, .0480970, .0426777, .0345671, .025, .0154329, .0073223, .0019030],      # two epochs of four steps: t = 0, 1/8 ... 7/8
             complex=[.05, .05, .05, .005, .005, .005, .0005, .0005])                             # eight epochs of one step: 3/8 of them lie between two drops


def test_schedules_are_the_papers():
    "Rates at the beginning of epochs of both full recipes, and what else the appendix fixes."
    for scheme, table, epochs, decay in (('simple', COSINE, 40, 2e-4), ('complex', STEP, 80, 1e-4)):
        r = runs.recipe_for('paper', scheme, data='concept_scenes', train=1, val=1)
        assert (r.epochs, r.weight_decay, r.lr, r.momentum, r.batch, r.size) == (epochs, decay, .1, .9, 256, 224)
        for epoch, rate in table.items():
            assert math.isclose(training.learning_rate(scheme, r.lr, epoch/epochs, r.gamma), rate, rel_tol=1e-5)


@pytest.mark.parametrize('scheme', STEPS)
def test_each_step_takes_its_rate(monkeypatch, scheme):
    "What the optimiser is given in training, step by step; and the last one of each epoch is in the metrics."
    step, seen = training.train_step, []
    def look(model, method, optimizer, *args):
        seen.append((optimizer.param_groups[0]['lr'], optimizer.param_groups[0]['momentum'], optimizer.param_groups[0]['weight_decay']))
        return step(model, method, optimizer, *args)
    monkeypatch.setattr(training, 'train_step', look)
    recipe = runs.recipe_for('smoke', scheme, **(dict(epochs=2) if scheme == 'simple' else dict(epochs=8, train=16)))
    fitted = training.fit(recipe, device='cpu', progress=False)
    assert np.allclose([s[0] for s in seen], STEPS[scheme],
        rtol=1e-4) and {s[1:] for s in seen} == {(.9, training.SCHEMES[scheme].weight_decay)}
    assert np.allclose(fitted.metrics.lr, STEPS[scheme][3::4] if scheme == 'simple' else STEPS[scheme], rtol=1e-4)
