"""Impact maps against what they are by definition, and their memory."""
import resource
import sys

import pytest
import torch
from torch import nn

from conftest import processes
from pcl_nb import erf, models

SIZE = 32


def random_model(arch):
    "A narrow network in double precision, its normalisation layers as if it had been trained."
    torch.manual_seed(0)
    model = models.create_model(arch, 5, width=.25, small_input=True, init='torchvision').double()
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            for values, low, high in ((m.weight, .5, 1.5), (m.bias, -.5, .5), (m.running_mean, -.5, .5), (m.running_var, .5, 2)):
                nn.init.uniform_(values, low, high)
    return model.eval()


def random_images(n, size=SIZE):
    "The same `n` images whenever they are asked for."
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def naive_impact(model, images, stage):
    "One image at a time through the whole network; the features as a hook on the stage sees them."
    total = 0.
    for image in images:
        found = []
        hook = model.net.get_submodule(model.stages[stage]).register_forward_hook(lambda m, args, output: found.append(output.clone()))
        x = image[None].clone().requires_grad_()
        model.net(x)
        hook.remove()
        k, h, w = found[0].shape[1:]
        y = sum(found[0][0, c, h//2, w//2] for c in range(k))/k
        y.backward()
        total = total + x.grad[0].abs().sum(0)/3
    return total/len(images)


@pytest.mark.parametrize('stage', ['stage3', 'stage4'])
@pytest.mark.parametrize('arch', models.ARCHS)
def test_map_is_the_mean_of_single_gradients(arch, stage):
    "Batched and cut off behind the stage, the map is that of single images and whole passes."
    model, images = random_model(arch), random_images(3)
    naive = naive_impact(model, images, stage)
    assert naive.min() >= 0 and naive.max() > 0
    torch.testing.assert_close(erf.impact_map(model, images, stage=stage, batch_size=2), naive, rtol=1e-9, atol=1e-9*naive.max().item())


LAST = {   # the last convolution of stages 3 and 4, by name
    'shufflenet_v2_x1_5': ('stage3.7.branch2.5', 'conv5.0'), 'resnet18': ('layer3.1.conv2', 'layer4.1.conv2'),
    'resnet34': ('layer3.5.conv2', 'layer4.2.conv2'), 'resnet50': ('layer3.5.conv3', 'layer4.2.conv3'),
    'densenet121': ('features.denseblock3.denselayer24.conv2', 'features.denseblock4.denselayer16.conv2')}


@pytest.mark.parametrize('arch', models.ARCHS)
def test_literal_reading_is_of_the_last_convolution(arch):
    "With relu='conv' the map is that of the last convolution's own output, before its batch normalisation."
    model, images = random_model(arch), random_images(3)
    for stage, name in zip(('stage3', 'stage4'), LAST[arch]):
        model.stages[f'{stage} end'] = name
        naive = naive_impact(model, images, f'{stage} end')
        del model.stages[f'{stage} end']
        fast = erf.impact_map(model, images, stage=stage, relu='conv', batch_size=2)
        assert naive.max() > 0
        torch.testing.assert_close(fast, naive, rtol=1e-9, atol=1e-9*naive.max().item())


def test_initialised_networks_at_published_width():
    "Without training, on noise: .24 % of the image in a ResNet18 whose blocks start as the identity, 70 % else in training mode."
    images = torch.randn(8, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    def share(arch, init, shared=0):
        torch.manual_seed(0)
        impact = erf.impact_map(models.create_model(arch, 365, init=init), images, shared=shared)
        return 100*erf.erf_size(erf.impact_histogram(impact)).item()/224**2
    for shared in 0, 8: assert abs(share('resnet18', 'zero_residual', shared) - .24) < .02
    assert abs(share('shufflenet_v2_x1_5', 'torchvision') - 6) < 2 and abs(share('resnet18', 'torchvision', 8) - 70) < 2


def small_net():
    "Two convolutions, the second one followed by a ReLU that ends the stage; then pooling and the head."
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 6, 3, stride=2, padding=1), nn.ReLU(),
                         nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 2))


@pytest.mark.parametrize('relu', models.RELU)
@pytest.mark.parametrize('center', erf.CENTERS)
def test_map_is_the_finite_difference(center, relu):
    "Nudging one pixel at a time gives the same map, for either centre and side of the ReLU."
    torch.manual_seed(0)
    net, nudge = small_net().double(), 1e-6
    model, images = models.StagedClassifier(net, dict(stage4='3'), '6'), random_images(2, 8)

    def y(x):
        "Mean over channels at the centre of the 4 x 4 map: one position, or the four around its middle."
        f = net[:4 if relu == 'after' else 3](x)
        return f[:, :, 2, 2].mean(1) if center == 'floor' else f[:, :, 1:3, 1:3].mean((1, 2, 3))

    nudges = nudge*torch.eye(3*8*8, dtype=torch.float64).view(-1, 3, 8, 8)
    with torch.no_grad(): slopes = torch.stack([(y(image + nudges) - y(image - nudges))/(2*nudge) for image in images])
    want = slopes.view(len(images), 3, 8, 8).abs().mean((0, 1))
    assert want.max() > 0
    torch.testing.assert_close(erf.impact_map(model, images, center=center, relu=relu), want, rtol=1e-6, atol=1e-8)


def test_every_replicate_is_of_some_image():
    "With very few images, too, a bootstrap replicate is a map: intervals and ratios of its sizes are numbers."
    maps = erf.impact_replicates(random_model('resnet18'), random_images(2), replicates=100)[1]
    assert (erf.erf_size(erf.impact_histogram(maps)) > 0).all()


def peak():
    "Most memory that this process has had in use so far, MiB."
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/(2**20 if sys.platform == 'darwin' else 2**10)


def peaks_of_a_stream(batches, answers):
    "In a child: how many images, and the peak after a tenth of them and after all."
    torch.set_num_threads(1)
    model, seen, total = models.create_model('resnet18', 5, width=.25, init='torchvision'), [], [0]
    def stream():
        for _ in range(batches):
            yield torch.rand(16, 3, 64, 64)
            total[0] += 16
            seen.append(peak())
    erf.impact_map(model, stream())
    answers.put((total[0], seen[batches//10], peak()))


def test_memory_does_not_grow_with_images():
    "Ten times as many images, the same peak: not even the images' own maps, 22 MiB, may be kept."
    answers = processes.SimpleQueue()
    child = processes.Process(target=peaks_of_a_stream, args=(100, answers), daemon=True)
    child.start()
    child.join()
    assert child.exitcode == 0
    images, early, late = answers.get()
    assert images == 1600 and late - early < 10, (early, late)
