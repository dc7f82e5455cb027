"""The erasing methods as runs: trained, interrupted, resumed, stored and loaded; in every architecture; refused settings."""
import copy

import pytest
import torch
import torchvision

from pcl_nb import methods, models, runs, training
from pcl_nb.base import core

ERASING = tuple(methods.OFFICIAL)


class Stopped(Exception):
    "Ends a training on purpose."


def stop_in_second_epoch(done, total):
    "A progress function that interrupts a run of two epochs behind the first."
    if done > total//2: raise Stopped


def same(a, b):
    "Two networks have the same weights and buffers under the same names."
    a, b = a.state_dict(), b.state_dict()
    return list(a) == list(b) and all(torch.equal(a[k].cpu(), b[k].cpu()) for k in a)


@pytest.mark.parametrize('name', ERASING)
def test_run_is_resumed_stored_and_loaded(tmp_path, name):
    "A run that was interrupted ends with the weights of one that was not; what is loaded is the same network."
    recipe = runs.recipe_for('smoke', method=name, epochs=2)
    whole = training.fit(recipe, progress=False)
    with pytest.raises(Stopped): runs.run(recipe, tmp_path, progress=stop_in_second_epoch)
    calls = []
    resumed = runs.run(recipe, tmp_path, progress=lambda done, total: calls.append((done, total)))
    assert calls[0][0]*2 == calls[0][1], 'resumed behind the first epoch'
    loaded = runs.load_run(tmp_path, recipe)
    assert same(resumed.model, whole.model) and same(loaded.model, whole.model)
    images = torch.randn(4, 3, 28, 28)
    whole.model.to('cpu', memory_format=torch.contiguous_format)  # sums in another order would round differently
    with torch.no_grad(): assert torch.equal(loaded.model(images), whole.model(images))


def test_own_network_with_two_branches_is_stored_and_loaded(tmp_path):
    "ACoL duplicates the last stage of a network from elsewhere, too."
    def own():
        return models.wrap(torchvision.models.regnet_y_400mf(num_classes=16),
            {'stage3': 'trunk_output.block3', 'stage4': 'trunk_output.block4'})
    recipe = runs.recipe_for('smoke', arch='custom', method='acol', size=64, train=16, val=16)
    trained = runs.run(recipe, tmp_path, own(), progress=False).model
    assert isinstance(trained, methods.TwoBranch) and same(runs.load_run(tmp_path, recipe, own()).model, trained)


@pytest.mark.parametrize('arch', models.ARCHS)
@pytest.mark.parametrize('name', ERASING)
@pytest.mark.parametrize('official', [False, True], ids=['appendix', 'official'])
def test_each_architecture_takes_a_step(arch, name, official):
    "Every weight moves; the network remains one with stages, head and a copy, and its state loads into another one."
    torch.manual_seed(0)
    method = methods.get_method(name, **methods.OFFICIAL[name] if official else {})
    def prepared(): return method.prepare(models.create_model(arch, 5, width=.25, small_input=True, side=method.side, init='torchvision'))
    model, images, labels = prepared(), torch.randn(6, 3, 32, 32), torch.arange(6) % 5
    before = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), .1)
    logits, items = method.losses(model, images, labels)
    sum(items.values()).backward()
    optimizer.step()
    assert logits.shape == (6, 5) and all(torch.isfinite(v) for v in items.values())
    assert [n for (n, p), q in zip(model.named_parameters(), before.parameters()) if p.grad is None or torch.equal(p, q)] == []
    twin = prepared()
    twin.load_state_dict(model.state_dict())
    model.eval(); twin.eval()
    with torch.no_grad():
        answer, maps = model(images, stages=('stage3', 'stage4'))
        assert torch.isfinite(answer).all() and torch.equal(answer, twin(images)) and torch.equal(answer, copy.deepcopy(model)(images))
        for stage, f in maps.items(): assert torch.equal(f, model.stage_features(images, stage))
        if name != 'acol' or official: torch.testing.assert_close(model.head(maps['stage4'].mean((2, 3))), answer, rtol=1e-4, atol=1e-4)
    assert isinstance(model, models.StagedClassifier) and [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks] == []


@pytest.mark.parametrize('name', ERASING)
def test_mixed_precision_trains(name):
    "Masks and fusions survive autocast."
    metrics = training.fit(runs.recipe_for('smoke', method=name, amp='bf16', train=32, val=16), device='cpu', progress=False).metrics
    assert metrics.filter(like='loss').notna().all().all()


@pytest.mark.parametrize('name, options, message', [
    ('has', dict(patches=[16, 225]), 'larger than the image'), ('has', dict(drop_rate=2), 'a rate from 0 to 1'),
    ('acol', dict(threshold=0), 'a threshold between 0 and 1'), ('adl', dict(stage='stage2'), 'valid: stage4, stage3'),
    ('amloss', dict(sigma=1), 'a threshold between 0 and 1'),
])
def test_recipe_refuses_bad_settings(name, options, message):
    "In one line, before anything is computed."
    with pytest.raises(core.InputError, match=message) as e: runs.recipe_for('smoke', method=name, options=options)
    assert '\n' not in str(e.value)
