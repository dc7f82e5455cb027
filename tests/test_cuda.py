"""The same on a GPU: mixed precision trains, impact maps agree with the CPU's."""
import numpy as np
import pytest
import torch

from pcl_nb import data, erf, focus_area, methods, models, runs, training
from pcl_nb.base import core

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason='no CUDA device')]


@pytest.mark.parametrize('amp', ['', 'bf16', 'fp16'])
@pytest.mark.parametrize('method', methods.METHODS)
def test_training_gives_finite_numbers(method, amp):
    "In each precision the metrics are finite and the weights are single precision, finite and on the GPU."
    fitted = training.fit(runs.recipe_for('smoke', method=method, amp=amp, epochs=2), device='cuda', progress=False)
    assert np.isfinite(fitted.metrics.iloc[-1]).all()
    for p in fitted.model.parameters(): assert p.is_cuda and p.dtype == torch.float32 and torch.isfinite(p).all()


@pytest.mark.parametrize('amp', ['bf16', 'fp16'])
def test_interrupted_run_resumes(tmp_path, amp):
    "The checkpoint holds what mixed precision needs: a run goes on behind the epoch it had reached."
    class Stopped(Exception): pass
    def stop(done, total):
        if done > total//2: raise Stopped
    recipe, calls = runs.recipe_for('smoke', amp=amp, epochs=2), []
    with pytest.raises(Stopped): runs.run(recipe, tmp_path, device='cuda', progress=stop)
    fitted = runs.run(recipe, tmp_path, device='cuda', progress=lambda done, total: calls.append((done, total)))
    assert calls[0][0]*2 == calls[0][1] and fitted.metrics.epoch.tolist() == [1, 2]


def test_run_of_the_gpu_loads_on_the_cpu(store):
    "A stored run is the same network wherever it is loaded."
    recipe = runs.recipe_for('smoke')
    on_gpu = runs.run(recipe, device='cuda', progress=False)
    on_cpu = runs.trained(recipe, device='cpu', progress=False)
    for a, b in zip(on_gpu.model.parameters(), on_cpu.model.parameters()): assert torch.equal(a.cpu(), b.cpu())


@pytest.mark.parametrize('arch', models.ARCHS)
def test_impact_map_agrees_with_the_cpu(arch):
    "In double precision both devices give the same map, and the same ERF size up to a pixel at a bin's edge."
    scenes = data.draw_concepts('scenes', 'val', 8, 64)
    images = next(data.batches(scenes, 'simple', 56, data.channel_stats(scenes)))[0].double()
    with torch.random.fork_rng(): torch.manual_seed(0); model = models.create_model(arch, 5, width=.25, small_input=True, init='torchvision').double()
    for stage in ('stage3', 'stage4'):
        want = erf.impact_map(model.cpu(), images, stage=stage)
        found = erf.impact_map(model.cuda(), images, stage=stage)
        assert found.is_cuda
        torch.testing.assert_close(found.cpu(), want, rtol=1e-6, atol=1e-6*want.max().item())
        sizes = [erf.erf_size(erf.impact_histogram(m)).item() for m in (found, want)]
        assert abs(sizes[0] - sizes[1]) <= 2


def test_single_precision_map_is_close_to_the_cpu():
    "What experiments use: within a few per cent, as ReLUs near zero and TF32 allow."
    torch.manual_seed(0)
    model, images = models.create_model('resnet18', 5, width=.25, small_input=True, init='torchvision'), torch.randn(32, 3, 56, 56)
    want, found = erf.impact_map(model.cpu(), images), erf.impact_map(model.cuda(), images).cpu()
    assert (found - want).abs().sum() < .05*want.sum()


@pytest.mark.parametrize('rule', focus_area.RULES)
def test_focus_area_agrees_with_the_cpu(rule):
    "In double precision both devices mark the same region, up to pixels on the fence; everything stays on the GPU."
    torch.manual_seed(0)
    model, images = models.create_model('resnet18', 5, width=.25, small_input=True, init='torchvision').double(), torch.randn(8, 3, 56, 56).double()
    want = focus_area.focus_area(model.cpu(), images, rule=rule)
    found = focus_area.focus_area(model.cuda(), images, rule=rule)
    assert found.mask.is_cuda and found.coverage.is_cuda
    assert torch.equal(found.prediction.cpu(), want.prediction) and (found.mask.cpu() != want.mask).sum() <= 8


def test_a_stream_is_measured_on_the_gpu():
    "Images and ground truth come from the CPU, whatever device the network is on."
    images = data.draw_concepts('scenes', 'val', 40, 64)
    stats, model = data.channel_stats(images), models.create_model('resnet18', 16, width=.25, small_input=True, init='torchvision')
    def table(m):
        return focus_area.coverage_table(m, data.batches(images, 'simple', 56, stats, 16), area=data.evidence(images, 'simple', 56))
    want, found = table(model.double()), table(model.cuda())
    assert np.abs(found.coverage - want.coverage).max() < .01 and np.abs(found.recall - want.recall).max() < .05


@pytest.mark.parametrize('method', methods.METHODS)
def test_the_same_recipe_gives_the_same_bits(method):
    "Trained twice on one GPU, a network is the same to the last bit."
    recipe = runs.recipe_for('smoke', method=method, epochs=2)
    first, second = (training.fit(recipe, device='cuda', progress=False).model.state_dict() for _ in range(2))
    assert [k for k in first if not torch.equal(first[k], second[k])] == []


@pytest.mark.parametrize('arch', models.ARCHS)
def test_an_impact_map_is_measured_again_to_the_bit(arch):
    "So that a CSV of a GPU can be had again."
    with torch.random.fork_rng(): torch.manual_seed(0); model = models.create_model(arch, 5, width=.25, small_input=True, init='torchvision').cuda()
    images = torch.randn(16, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    with core.repeatable(): first, second = (erf.impact_map(model, images) for _ in range(2))
    assert torch.equal(first, second)


def test_the_global_stream_of_the_gpu_goes_on():
    "What a seeded block draws on the GPU is not missing from the stream behind it."
    torch.cuda.manual_seed(1); want = torch.rand(4, device='cuda')
    torch.cuda.manual_seed(1)
    with core.seeded(5): torch.rand(9, device='cuda')
    assert torch.equal(torch.rand(4, device='cuda'), want)
