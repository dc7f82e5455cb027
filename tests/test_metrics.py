"Metrics of one's own evaluation loop, PCL in other trainers, logs by name: what chapter 18 offers, in use."
import importlib.util
import sys
import warnings
from unittest import mock

import pandas as pd
import pytest
import torch
import torch.distributed as dist
from torch import nn

from conftest import NBS, ROOT, code_cells, processes
from pcl_nb import erf, focus_area, methods, metrics, models, runs, train
from pcl_nb.base import core

BATCHES = 5, 1, 7, 2         # unequal
SECONDS = 300                # nothing takes this long, unless it hangs


def module(plain):
    "The chapter's module as with torchmetrics, or as without it."
    if not plain: return metrics
    spec = importlib.util.spec_from_file_location('pcl_nb.plain_metrics', ROOT/'pcl_nb'/'metrics.py')
    with mock.patch.dict(sys.modules, {'torchmetrics': None}): spec.loader.exec_module(m := importlib.util.module_from_spec(spec))
    assert m.Metric is m.Sums
    return m


def network():
    "A small network in double precision; the same in each process."
    with core.seeded('net'):
        return models.create_model('resnet18', 5, width=.25, small_input=True, side=True, init='torchvision').double().eval()


def images(n=sum(BATCHES)): return torch.randn(n, 3, 48, 40, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def labelled(): return images(12).float(), torch.arange(12) % 5


kinds = pytest.mark.parametrize('plain', [True, pytest.param(False, marks=pytest.mark.skipif(
    not importlib.util.find_spec('torchmetrics'), reason='torchmetrics is not installed: pip install torchmetrics'))],
    ids=['plain', 'torchmetrics'])


@kinds
@pytest.mark.parametrize('rule', focus_area.RULES)
def test_coverage_is_that_of_all_images(plain, rule):
    "The mean over the joint set, from batches of unequal size."
    metric, model = module(plain).FocusArea(rule, stage='stage3'), network()
    for x in images().split(BATCHES): metric.update(model, x)
    want = focus_area.focus_area(model, images(), rule=rule, stage='stage3').coverage.double().mean()
    torch.testing.assert_close(metric.compute(), want, rtol=1e-12, atol=0)


@kinds
def test_impact_map_is_that_of_all_images(plain):
    "To the last digits of float64; the ERF size to the pixel, also after a reset."
    m, model = module(plain), network()
    impact, size = m.ImpactMap((48, 40), stage='stage3'), m.EffectiveReceptiveField((48, 40), stage='stage3')
    for metric in impact, size: metric.update(model, images(3)*2); metric.reset()
    for x in images().split(BATCHES): impact.update(model, x); size.update(model, x)
    want = erf.impact_map(model, images(), stage='stage3')
    assert (impact.compute() - want).abs().max() < 1e-12*want.max()
    assert size.compute() == erf.erf_size(erf.impact_histogram(want))


@kinds
def test_undefined_images_are_left_out(plain):
    "As `summary` leaves them out: a map of one position has no coverage ratio."
    metric, small = module(plain).FocusArea(), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always'); metric.update(network(), small)
        assert metric.compute().isnan()
        metric.update(network(), images())
    assert any('is undefined' in str(w.message) for w in said)
    want = focus_area.focus_area(network(), images()).coverage.double().mean()
    torch.testing.assert_close(metric.compute(), want, rtol=1e-12, atol=0)


def test_metric_adds_nothing_to_a_checkpoint():
    "Neither the network nor the sums."
    class Net(nn.Module):
        def __init__(self): super().__init__(); self.net, self.coverage, self.erf = nn.Linear(2, 2), metrics.FocusArea(), metrics.ImpactMap(8)
    assert set(Net().state_dict()) == {'net.weight', 'net.bias'}


def gradient(parallel):
    "The gradient of PCL on this process' share, averaged by DistributedDataParallel."
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if parallel else (0, 1)
    loss, (x, y) = metrics.PCLLoss(network()), labelled()
    trained = nn.parallel.DistributedDataParallel(loss) if parallel else loss
    trained(x.double()[rank::ranks], y[rank::ranks])['loss'].backward()
    return torch.cat([p.grad.flatten() for p in loss.parameters()])


def member(folder, rank, ranks, plain):
    "In a child: the second process has fewer images, the third none."
    torch.set_num_threads(1)
    dist.init_process_group('gloo', init_method=f'file://{folder}/meet', rank=rank, world_size=ranks)
    m, model, mine = module(plain), network(), images().split((9, 6, 0))[rank]
    found = [m.FocusArea(), m.ImpactMap((48, 40)), m.EffectiveReceptiveField((48, 40))]
    for metric in found:
        for x in mine.split(4): metric.update(model, x)
    values = [[metric.compute() for metric in found] for _ in range(2)]          # the sums stay: a second one is the same
    torch.save((values, found[0].images, gradient(True)), folder/f'{rank}.pt')
    dist.destroy_process_group()


@kinds
@pytest.mark.slow
def test_processes_compute_the_value_over_all_their_images(plain, tmp_path):
    "Metrics as in one process, whatever each of three holds; PCL's gradient, too."
    children = [processes.Process(target=member, args=(tmp_path, rank, 3, plain), daemon=True) for rank in range(3)]
    for c in children: c.start()
    for c in children: c.join(SECONDS)
    for c in children: c.is_alive() and c.kill()
    assert [c.exitcode for c in children] == [0, 0, 0]
    coverage = focus_area.focus_area(network(), images()).coverage.double().mean()
    impact, want = erf.impact_map(network(), images()), gradient(False)
    for rank in range(3):
        values, seen, found = torch.load(tmp_path/f'{rank}.pt', weights_only=False)
        for ratio, mean, size in values:
            torch.testing.assert_close(ratio, coverage, rtol=1e-12, atol=0)
            assert (mean - impact).abs().max() < 1e-12*impact.max() and size == erf.erf_size(erf.impact_histogram(impact))
        assert seen == (9, 6, 0)[rank]
        torch.testing.assert_close(found, want, rtol=1e-8, atol=1e-11)


def test_collection_of_torchmetrics_takes_them():
    "They are metrics of torchmetrics where it is installed: one update for both, values by name."
    torchmetrics = pytest.importorskip('torchmetrics', reason='torchmetrics is not installed: pip install torchmetrics')
    both = torchmetrics.MetricCollection(dict(coverage=metrics.FocusArea(), erf=metrics.EffectiveReceptiveField((48, 40))))
    for x in images().split(BATCHES): both.update(network(), x)
    assert both.compute()['erf'] == erf.erf_size(erf.impact_histogram(erf.impact_map(network(), images())))
    first = both(network(), images(4))                                            # forward: the value of the batch
    torch.testing.assert_close(first['coverage'], focus_area.focus_area(network(), images(4)).coverage.double().mean())


def example(name):
    "The chapter's example for a package, executed: its names."
    cell, = (c.source for c in code_cells(NBS/'18_metrics.ipynb') if f'import {name}' in c.source or f'from {name}' in c.source)
    names = {**vars(metrics)}
    exec(compile(cell, name, 'exec'), names)
    assert sum(bool(line.strip()) for line in cell.splitlines()) <= 13
    return names


@pytest.mark.slow
def test_lightning_trains_pcl_and_logs_both_metrics(tmp_path):
    "The module of the chapter: the weights change, and the logged values are those of all validation images."
    lightning = pytest.importorskip('lightning', reason='lightning is not installed: pip install lightning')
    net = example('lightning')['Scenes'](models.create_model('resnet18', 5, width=.25, small_input=True, side=True, init='torchvision'))
    before, (x, y) = [p.detach().clone() for p in net.parameters()], labelled()
    loaders = [torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=b) for b in (6, 5)]
    trainer = lightning.Trainer(max_epochs=2, accelerator='cpu', logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path)
    trainer.fit(net, *loaders)
    assert all(not torch.equal(a, b) for a, b in zip(before, net.parameters()))
    model = net.loss.model.eval()
    torch.testing.assert_close(trainer.logged_metrics['coverage'].double(), focus_area.focus_area(model, x).coverage.double().mean())
    assert trainer.logged_metrics['erf'] == erf.erf_size(erf.impact_histogram(erf.impact_map(model, x, size=56)))


@pytest.mark.slow
def test_timm_task_trains_pcl():
    "The task of the chapter, for a network of timm: its step is that of the method, and it validates the network alone."
    timm = pytest.importorskip('timm', reason='timm is not installed: pip install timm')
    pytest.importorskip('timm.task', reason='this timm has no tasks: pip install -U timm')
    torch.manual_seed(0)
    net = models.wrap(timm.create_model('regnety_002', num_classes=5), {'stage3': 's3', 'stage4': 's4'}, head='head.fc', side=True)
    x, y = torch.randn(4, 3, 64, 64), torch.arange(4)
    task = example('timm')['PCLTask'](net).train()
    found = task(x, y)
    found['loss'].backward()
    assert {'loss', 'output', 'ce', 'side', 'ipc', 'cpc'} == set(found) and all(p.grad is not None for p in net.parameters())
    task.eval()
    assert torch.equal(task.get_eval_model()(x), net(x))
    logits, items = methods.get_method('pcl').losses(net, x, y)
    torch.testing.assert_close(task(x, y)['loss'], sum(items.values()))


def test_log_from_the_command_line(tmp_path, capsys):
    "`--log csv` trains the same; an unknown name is refused in one line that names the valid ones."
    command = ['--profile', 'smoke', '--quiet', '--device', 'cpu', '--out']
    assert train.main([*command, str(tmp_path/'a'), '--log', 'csv']) == train.main([*command, str(tmp_path/'b')]) == 0
    assert (tmp_path/'a'/'metrics.csv').read_bytes() == (tmp_path/'b'/'metrics.csv').read_bytes()
    with pytest.raises(SystemExit): train.main([*command, str(tmp_path/'c'), '--log', 'wandb'])
    assert 'valid: csv, tensorboard' in capsys.readouterr().err and not (tmp_path/'c').exists()


def test_log_for_tensorboard_without_it_is_one_line(tmp_path):
    "What to install."
    with mock.patch.dict(sys.modules, {'torch.utils.tensorboard': None}), pytest.raises(core.InputError, match='pip install tensorboard'):
        runs.run(runs.recipe_for('smoke'), tmp_path/'run', progress=False, log='tensorboard')


def test_log_for_tensorboard(tmp_path):
    "A scalar for each number of each epoch."
    pytest.importorskip('tensorboard', reason='tensorboard is not installed: pip install tensorboard')
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    fitted = runs.run(runs.recipe_for('smoke', epochs=2, validate_every=1), tmp_path/'run', device='cpu', progress=False, log='tensorboard')
    events = EventAccumulator(str(tmp_path/'run'/'tensorboard')).Reload()
    table = pd.DataFrame({tag: [e.value for e in events.Scalars(tag)] for tag in events.Tags()['scalars']})
    assert {'lr', 'loss/ce', 'train/top1', 'val/top1'} <= set(table)
    assert list(table['val/top1']) == pytest.approx(list(fitted.metrics.val_top1), rel=1e-5)
