"""Data sets in the layouts that their publishers give them, files of every kind, and packing that is killed."""
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import Places365

from conftest import ROOT, contents
from pcl_nb import crops, data, images, runs, sources, training
from pcl_nb.base.core import InputError
from pcl_nb.lab.packing import _read_index

CLASSES = '/a/airfield', '/a/apartment_building/outdoor', '/b/bakery/shop'


def picture(path, h=40, w=50, seed=0, **how):
    "Write a small image of smooth colours."
    path.parent.mkdir(parents=True, exist_ok=True)
    small = np.random.default_rng([seed, h, w]).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    Image.fromarray(small).resize((w, h), Image.BICUBIC).save(path, **how)


def refresh():
    "Forget what was loaded, as a new process would."
    sources.forget()


@pytest.fixture
def places(tmp_path, monkeypatch):
    "Places365 in torchvision's form, three classes; the checksums of the lists are those of the small ones."
    base = tmp_path/'places365'
    base.mkdir()
    lists = {'categories_places365.txt': [f'{c} {i}' for i, c in enumerate(CLASSES)]}
    train = [(f'{c}/{i:08}.jpg', n) for n, c in enumerate(CLASSES) for i in range(1, 5)]
    val = [(f'Places365_val_{i:08}.jpg', i % 3) for i in range(1, 7)]
    lists['places365_train_standard.txt'] = [f'{p} {n}' for p, n in train]
    lists['places365_val.txt'] = [f'{p} {n}' for p, n in val]
    md5 = {}
    for name, lines in lists.items():
        (base/name).write_text('\n'.join(lines) + '\n')
        md5[name] = hashlib.md5((base/name).read_bytes()).hexdigest()
    for size, (h, w) in {'large': (52, 64), '256': (36, 36)}.items():
        for k, (p, n) in enumerate(train): picture(base/f'data_{size}_standard'/p.lstrip('/'), h, w + k % 3, k)
        for k, (p, n) in enumerate(val): picture(base/f'val_{size}'/p, h, w, 100 + k)
    monkeypatch.setattr(Places365, '_CATEGORIES_META', ('categories_places365.txt', md5['categories_places365.txt']))
    monkeypatch.setattr(Places365, '_FILE_LIST_META',
        {'train-standard': ('places365_train_standard.txt', md5['places365_train_standard.txt']),
                                                       'val': ('places365_val.txt', md5['places365_val.txt'])})
    refresh()
    return base


@pytest.fixture
def imagenet(tmp_path):
    "ImageNet in torchvision's form, three classes, two of one name."
    base = tmp_path/'imagenet'
    names = {'n01440764': ('tench', 'Tinca tinca'), 'n02012849': ('crane',), 'n03126707': ('crane',)}
    for k, wnid in enumerate(names):
        for i in range(2): picture(base/'train'/wnid/f'{wnid}_{i}.JPEG', 48, 60, 10*k + i)
        picture(base/'val'/wnid/f'ILSVRC2012_val_{k:08}.JPEG', 48, 60, 10*k + 5)
    torch.save((names, list(names)), base/'meta.bin')
    refresh()
    return base


def test_easyformat_is_a_folder(tmp_path):
    "Class names with a qualifier, endings in capitals."
    for split in ('train', 'val'):
        for c in ('apartment_building-outdoor', 'bakery-shop'): picture(tmp_path/split/c/'00000001.JPG')
    images = data.load(f'folder:{tmp_path}', 'train', 32)
    assert images.classes == ('apartment_building-outdoor', 'bakery-shop') and len(images) == 2


@pytest.mark.parametrize('variant', ['places365', 'places365-small@0'])
def test_places365(places, variant, monkeypatch):
    "Names, order, labels and pixels are those of torchvision's class."
    name, at, cap = variant.partition('@')
    for split, part in (('train', 'train-standard'), ('val', 'val')):
        images = data.load(f'{name}:{places}{at}{cap}', split, 32)
        theirs = Places365(places, part, small='small' in name)
        assert images.classes == ('airfield', 'apartment_building/outdoor', 'bakery/shop')
        wanted = sorted(theirs.imgs, key=lambda p: p[1])
        assert [images.images.path(i) for i in range(len(images))] == [p for p, _ in wanted]
        assert images.labels.tolist() == [y for _, y in wanted]
        assert torch.equal(images.images[1], data.decode(wanted[1][0]))
    monkeypatch.setenv('PCL_NB_DATA', str(places.parent))
    assert len(data.load(name, 'train', 32)) == 12 and data.check_data(name) == name


def test_validation_images_are_enough_where_nothing_is_trained(places, imagenet):
    "Without the training images, and in the case of Places365 without their list."
    shutil.rmtree(places/'data_large_standard'); (places/'places365_train_standard.txt').unlink(); shutil.rmtree(imagenet/'train')
    refresh()
    for name, n in {f'places365:{places}': 6, f'imagenet:{imagenet}': 3}.items():
        data.check_data(name, trains=False)
        assert len(data.load(name, 'val', 32)) == n and data.fingerprint(name, 32)
        with pytest.raises(InputError): data.check_data(name)


def test_places365_small_has_a_cap_or_a_list(places, tmp_path):
    "U12: the first images of each class, or those of a list with or without labels."
    assert data.load(f'places365-small:{places}@2', 'train', 32).labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert len(data.load(f'places365-small:{places}@2', 'val', 32)) == 6
    prints = {data.fingerprint(f'places365-small:{places}@{cap}', 32) for cap in (0, 1, 2)}
    assert len(prints) == 3
    chosen = tmp_path/'mine.txt'
    chosen.write_text('b/bakery/shop/00000003.jpg\n/a/airfield/00000002.jpg 0\n\n')
    images = data.load(f'places365-small:{places}@{chosen}', 'train', 32)
    assert images.labels.tolist() == [0, 2] and images.images.path(1).endswith('shop/00000003.jpg')
    for line, message in (('a/nowhere.jpg', 'line 1: label of a/nowhere.jpg is none'), ('a/airfield/00000002.jpg 3', 'valid: 0 to 2'),
        ('', 'names no image')):
        chosen.write_text(line); refresh()
        with pytest.raises(InputError, match=message): data.check_data(f'places365-small:{places}@{chosen}')
    with pytest.raises(InputError, match='neither a number'): data.check_data(f'places365-small:{places}@few')


def test_imagenet(imagenet):
    "Classes have one name each, labels follow the WordNet ids."
    images = data.load(f'imagenet:{imagenet}', 'train', 32)
    assert images.classes == ('tench', 'crane (n02012849)', 'crane (n03126707)') and images.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert len(data.load(f'imagenet:{imagenet}', 'train', 32, 3)) == 3


@pytest.mark.parametrize('what, source',
    [('categories_places365.txt', 'filelist_places365-standard.tar'), ('places365_val.txt', 'filelist_places365-standard.tar'),
    ('data_large_standard', 'train_large_places365standard.tar, which unpacks as data_large: rename it'), ('val_large', 'val_large.tar')])
def test_what_places365_lacks_is_named(places, what, source):
    "One line: which file, where to, where from."
    (places/what).rename(places/'elsewhere')
    with pytest.raises(InputError) as e: data.check_data(f'places365:{places}')
    assert what in str(e.value) and source in str(e.value) and str(places) in str(e.value) and '\n' not in str(e.value)


def test_a_damaged_list_and_a_lost_image_are_named(places):
    "torchvision's checksum, and files that a list names."
    path = places/'data_large_standard/a/airfield/00000001.jpg'
    path.rename(places/'lost')
    with pytest.raises(InputError, match='00000001.jpg.* is listed but missing'): data.check_data(f'places365:{places}')
    (places/'lost').rename(path)
    with open(places/'places365_val.txt', 'a') as f: f.write('x 0\n')
    with pytest.raises(InputError, match=r'places365_val.txt does not exist or is corrupted$'): data.check_data(f'places365:{places}')


@pytest.mark.parametrize('what, source',
    [('meta.bin', 'ILSVRC2012_devkit_t12.tar.gz'), ('train', 'ILSVRC2012_img_train.tar'), ('val', 'ILSVRC2012_img_val.tar'),
        ('train/n03126707', '2 of 3 class folders')])
def test_what_imagenet_lacks_is_named(imagenet, what, source):
    "One line: which file, where to, where from."
    (imagenet/what).rename(imagenet.parent/'elsewhere')
    with pytest.raises(InputError) as e: data.check_data(f'imagenet:{imagenet}')
    assert source in str(e.value) and str(imagenet) in str(e.value) and '\n' not in str(e.value)


def test_a_network_trains_from_disk(imagenet, monkeypatch):
    "The whole recipe on a streamed set, and on the same set in memory by way of a folder that fits."
    recipe = runs.recipe_for('smoke', data=f'imagenet:{imagenet}', train=0, val=0, batch=2, size=28)
    fitted = training.fit(recipe, progress=False)
    assert np.isfinite(fitted.metrics.to_numpy()).all()
    folder = runs.recipe_for('smoke', data=f'folder:{imagenet}', train=0, val=0, batch=2, size=28)
    in_memory = training.fit(folder, progress=False)
    assert fitted.stats == in_memory.stats
    a, b = (m.filter(like='loss').to_numpy() for m in (fitted.metrics, in_memory.metrics))
    assert a.size and abs(a - b).max() < .05*abs(b).max()
    monkeypatch.setattr(images, 'MAX_BYTES', 100); refresh()
    assert isinstance(data.load(f'folder:{imagenet}', 'train', 28).images, data.Files)


def test_files_of_every_kind(tmp_path):
    "As a viewer shows them; what cannot be read is named."
    grey = np.linspace(0, 65535, 64*64).reshape(64, 64).astype(np.uint16)
    Image.fromarray(grey).save(tmp_path/'deep.png')
    assert (data.decode(tmp_path/'deep.png')[0].numpy() == grey >> 8).all()
    Image.new('RGBA', (8, 8), (200, 0, 0, 0)).save(tmp_path/'clear.png')
    assert (data.decode(tmp_path/'clear.png') == 255).all()
    Image.new('P', (8, 8), 0).save(tmp_path/'palette.png', transparency=0)
    assert (data.decode(tmp_path/'palette.png') == 255).all()
    Image.new('CMYK', (32, 32), (0, 255, 255, 0)).save(tmp_path/'print.jpg')
    red = data.decode(tmp_path/'print.jpg').float().mean((1, 2))
    assert red[0] > 200 and red[1] < 60 and red[2] < 60
    exif = Image.Exif(); exif[0x112] = 6
    picture(tmp_path/'turned.jpg', 40, 60, exif=exif)
    assert data.decode(tmp_path/'turned.jpg').shape == (3, 60, 40)
    Image.new('F', (8, 8)).save(tmp_path/'float.tiff')
    picture(tmp_path/'cut.jpg', 200, 200)
    (tmp_path/'cut.jpg').write_bytes((tmp_path/'cut.jpg').read_bytes()[:-200])
    good = ['deep.png', 'clear.png', 'palette.png', 'print.jpg', 'turned.jpg']
    images = data.ImageSet(data.Files(tmp_path, good), torch.arange(5), tuple('abcde'))
    levels = (0, 0, 0), (1/255,)*3
    memory = data.ImageSet([images.images[i] for i in range(5)], images.labels, images.classes)
    a, b = (next(data.batches(s, 'complex', 28, levels, 5))[0] for s in (images, memory))
    assert (a - b).abs().max() < 2
    for bad, why in (('float.tiff', 'floating-point'), ('cut.jpg', 'truncated')):
        broken = data.ImageSet(data.Files(tmp_path, [bad]), torch.zeros(1, dtype=torch.long), ('a',))
        for workers in (0, 1):
            with pytest.raises(InputError) as e: next(data.batches(broken, 'simple', 28, levels, 1, workers=workers))
            assert bad in str(e.value) and why in str(e.value) and '\n' not in str(e.value)
        with pytest.raises(InputError, match=bad): data.decode(tmp_path/bad)


def packing(name, out, **how):
    "The command line that packs."
    return subprocess.Popen([sys.executable, '-m', 'pcl_nb.data', 'pack', name, str(out), '--edge', '32', '--quiet'], cwd=ROOT,
        env={**os.environ, 'PYTHONPATH': str(ROOT)}, **how)


@pytest.mark.slow
def test_packing_survives_kills(tmp_path):
    "Killed at three moments and begun again: the same bytes as undisturbed, and nothing to be read before."
    for split, n in (('train', 700), ('val', 300)):
        for i in range(n): picture(tmp_path/'set'/split/f'class_{i % 2}'/f'{i}.jpg', 60 + i % 4, 80, i)
    name, killed = f"folder:{tmp_path/'set'}", 0
    assert packing(name, tmp_path/'whole').wait() == 0
    for blocks in (1, 2, 4):
        p = packing(name, tmp_path/'out')
        sizes = lambda: sum((tmp_path/'out'/f'done-{s}').stat().st_size//8 for s in ('train', 'val')
            if (tmp_path/'out'/f'done-{s}').exists())
        while p.poll() is None and sizes() < min(256*blocks, 950): time.sleep(.001)
        p.send_signal(signal.SIGKILL); p.wait()
        if not (tmp_path/'out/index.json').exists():
            killed += 1
            with pytest.raises(InputError, match='no complete packed set'): data.check_data(f"packed:{tmp_path/'out'}")
            with open(tmp_path/'out/train.bin', 'ab') as f: f.write(b'half a block')   # what a kill while writing leaves
    assert killed
    assert packing(name, tmp_path/'out').wait() == 0
    whole, again = (contents(tmp_path/d) for d in ('whole', 'out'))
    assert whole == again and sorted(n for n in whole if n[0] != '.') == ['begun.json', 'index.json', 'train.bin', 'val.bin']
    refresh()
    packed, files = (data.load(n, 'train', 28) for n in (f"packed:{tmp_path/'out'}", name))
    assert len(packed) == 700 and packed.labels.tolist() == files.labels.tolist() and packed.classes == files.classes
    a, b = (torch.cat([x for x, y in data.batches(s, 'complex', 28, ((0, 0, 0), (1/255,)*3), 100)]) for s in (packed, files))
    assert (a - b).abs().max() < 2                                          # the same evaluation crop


def test_a_packed_set_is_found_and_checked(imagenet):
    "In the set's own folder, for its size; not after the set has changed."
    name = f'imagenet:{imagenet}'
    before = data.fingerprint(name, 28)
    folder = data.pack(name, edge=data.base_size(28), progress=False)
    refresh()
    assert folder.parent == imagenet and isinstance(data.load(name, 'val', 28).images,
        data.Packed) and isinstance(data.load(name, 'val', 56).images, data.Files)
    assert data.fingerprint(name, 28) != before
    assert data.fingerprint(name, 28) == data.fingerprint(f'packed:{folder}', 28)
    assert len(data.load(f'packed:{folder}', 'train', 28, 3)) == 3
    picture(imagenet/'train/n01440764/new.JPEG'); refresh()
    with pytest.raises(InputError, match='was packed from other images'): data.load(name, 'val', 28)
    with pytest.raises(InputError, match='begun with other images'): data.pack(name, folder, data.base_size(28))
    with open(folder/'val.bin', 'ab') as f: f.write(b'x')
    _read_index.cache_clear()
    with pytest.raises(InputError, match='not what was packed'): data.check_data(f'packed:{folder}')


def test_command_line(imagenet, capsys):
    "Help, a summary of a set, and an error in one line."
    with pytest.raises(SystemExit) as e: data.main(['pack', '--help'])
    assert e.value.code == 0 and '--edge' in capsys.readouterr().out
    assert data.main(['check', f'imagenet:{imagenet}']) == 0
    assert capsys.readouterr().out == 'train: 6 images, 3 classes\nval: 3 images, 3 classes\n'
    with pytest.raises(SystemExit): data.main(['pack', 'concept_scenes'])
    assert 'cannot be packed' in capsys.readouterr().err


def test_workers_stay_for_the_next_epoch(imagenet):
    "The same two processes, also after an epoch that was broken off; who comes while they are busy gets the same batches from others."
    images = data.load(f'imagenet:{imagenet}', 'train', 28)
    def epoch(e, workers=2): return data.batches(images, 'complex', 28, ((0, 0, 0), (1/255,)*3), 2, True, epoch=e, workers=workers)
    def pixels(e, workers): return torch.cat([x for x, y in epoch(e, workers)])
    wanted = [pixels(e, 0) for e in range(3)]
    assert torch.equal(pixels(0, 2), wanted[0])
    loader = images.images.loaders[2, False]
    processes = [w.pid for w in loader._iterator._workers]
    broken = epoch(2); next(broken); broken.close()
    assert torch.equal(pixels(1, 2), wanted[1])
    assert images.images.loaders[2, False] is loader and [w.pid for w in loader._iterator._workers] == processes
    pairs = list(zip(epoch(1), epoch(2)))
    assert torch.equal(torch.cat([x for (x, _), _ in pairs]), wanted[1]) and torch.equal(torch.cat([x for _, (x, _) in pairs]), wanted[2])
    assert torch.equal(pixels(0, 2), wanted[0])


def test_how_many_workers(monkeypatch):
    "None for a CPU, the share of the cores for an accelerator, or what the environment says."
    monkeypatch.delenv('PCL_NB_WORKERS', raising=False)
    monkeypatch.setattr(crops, 'cores', lambda: 16)
    assert data.default_workers('cpu') == 0 and data.default_workers('cuda') == 15
    monkeypatch.setenv('LOCAL_WORLD_SIZE', '4')
    assert data.default_workers('cuda') == 3
    monkeypatch.setenv('PCL_NB_WORKERS', '2')
    assert data.default_workers('cpu') == 2
    monkeypatch.setenv('PCL_NB_WORKERS', 'all')
    with pytest.raises(InputError, match='PCL_NB_WORKERS'): data.default_workers()


ORDINARY = 'coast/1.ppm', 'coast/2.PPM', 'Bay/x y.ppm', 'é/0.ppm'      # in both splits


def tiny(folder, *names):
    "Images of 2 x 2 pixels, each with bytes of its own."
    for split in ('train', 'val'):
        for name in names:
            (folder/split/name).parent.mkdir(parents=True, exist_ok=True)
            (folder/split/name).write_bytes(b'P6 2 2 255\n' + split.encode()[:1]*6 + name.encode()[-6:])
    refresh()
    return f'folder:{folder}'


def test_fingerprints_of_ordinary_layouts_stay(tmp_path, monkeypatch):
    "Stored runs are found again: in memory, a part of the images, and on disk; whatever tools leave behind."
    name = tiny(tmp_path, *ORDINARY)
    assert (data.fingerprint(name, 32), data.fingerprint(name, 32, 2, 2)) == ('648ff1735389c52c', 'a1e1e6b7431d7d19')
    tiny(tmp_path, 'coast/._1.ppm', '.ipynb_checkpoints/1.ppm')
    assert data.fingerprint(name, 32) == '648ff1735389c52c' and data.count(name) == (4, 4, 3)
    monkeypatch.setattr(images, 'MAX_BYTES', 1); refresh()
    assert data.fingerprint(name, 32) == '31089ac3c3fcdaab'


def test_other_labels_are_another_set(tmp_path):
    "The same files in the same order, in other classes: another fingerprint, so another run."
    prints = set()
    for n, (layout, classes) in enumerate({('a/x/1.ppm', 'a/y/1.ppm', 'b/z.ppm'): ('a', 'b'),
            ('a/x/1.ppm', 'b/y/1.ppm', 'b/z.ppm'): ('a', 'b'),
            ('a/x/1.ppm', 'a/y/1.ppm', 'b/z/z.ppm'): ('a/x', 'a/y', 'b/z')}.items()):
        name = tiny(tmp_path/str(n), *layout)
        assert data.load(name, 'val', 32).classes == classes
        prints.add(data.fingerprint(name, 32))
    assert len(prints) == 3


def test_places365_as_it_is_unpacked(places, tmp_path):
    "Its folders of letters as `folder:`: the classes of its own list, in its order, for training and packing."
    for split in ('train', 'val'): shutil.copytree(places/'data_256_standard', tmp_path/'set'/split)
    name = f"folder:{tmp_path/'set'}"
    images, official = data.load(name, 'train', 28), data.load(f'places365-small:{places}@0', 'train', 28)
    assert images.classes == tuple(c.lstrip('/') for c in CLASSES)
    assert images.labels.tolist() == official.labels.tolist()
    assert all((a == b).all() for a, b in zip(images.images, official.images))
    packed = data.load(f"packed:{data.pack(name, tmp_path/'packed', 32, progress=False)}", 'val', 28)
    assert packed.classes == images.classes and packed.labels.tolist() == images.labels.tolist()


def test_case_alone_keeps_labels(tmp_path):
    "Kitchen in one split, kitchen in the other: sorted apart, one label."
    for split, kitchen in (('train', 'Kitchen'), ('Test', 'kitchen')):
        for c, grey in ((kitchen, 0), ('Bath', 90), ('alley', 200)):
            picture(tmp_path/split/c/'1.png'); Image.new('RGB', (8, 8), (grey,)*3).save(tmp_path/split/c/'1.png')
    refresh()
    train, val = (data.load(f'folder:{tmp_path}', s, 28) for s in ('train', 'val'))
    assert train.classes == val.classes == ('Bath', 'Kitchen', 'alley')
    assert train.images[:, 0, 0, 0].tolist() == val.images[:, 0, 0, 0].tolist() == [90, 0, 200]
    assert data.fingerprint(f'folder:{tmp_path}', 28) and data.pack(f'folder:{tmp_path}', edge=16, progress=False)


def test_what_tools_leave_in_imagenet(imagenet):
    "Neither images nor classes; a folder that is no class is named, and a split that was not sorted into folders."
    before = data.load(f'imagenet:{imagenet}', 'train', 32), data.fingerprint(f'imagenet:{imagenet}', 32)
    for name in ('.ipynb_checkpoints/1.JPEG', '__MACOSX/n01440764/1.JPEG', 'n01440764/._1.JPEG',
            'n01440764/.thumbnails/1.JPEG'):
        picture(imagenet/'train'/name)
    refresh()
    after = data.load(f'imagenet:{imagenet}', 'train', 32), data.fingerprint(f'imagenet:{imagenet}', 32)
    assert after[0].labels.tolist() == before[0].labels.tolist() and after[1] == before[1]
    picture(imagenet/'train/extra/1.JPEG'); refresh()
    with pytest.raises(InputError, match="'extra' in .*train' is not a class of ImageNet"):
        data.check_data(f'imagenet:{imagenet}')
    shutil.rmtree(imagenet/'train/extra')
    for f in (imagenet/'val').rglob('*.JPEG'): f.rename(imagenet/'val'/f.name)
    for d in (imagenet/'val').iterdir():
        if d.is_dir(): d.rmdir()
    refresh()
    with pytest.raises(InputError, match='holds no class folder.*ILSVRC2012_img_val.tar'):
        data.check_data(f'imagenet:{imagenet}')


def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    "Its images would be missing without a word."
    name = tiny(tmp_path, *ORDINARY, 'coast/more/1.ppm')
    scan = os.scandir

    def scandir(path):
        if str(path).endswith('more'): raise PermissionError(13, 'Permission denied', str(path))
        return scan(path)
    monkeypatch.setattr(os, 'scandir', scandir)
    with pytest.raises(InputError, match="coast/more' cannot be read: Permission denied"): data.check_data(name)


def test_names_endings_and_links(tmp_path, capsys):
    "A trailing slash, blanks, letters beyond ASCII, endings in capitals, linked splits and classes: the same images."
    name = tiny(tmp_path/'näch ste', *ORDINARY)
    for c in ('coast/3.JPG', 'coast/4.JPEG'):
        for split in ('train', 'val'): picture(tmp_path/'näch ste'/split/c, 9, 9)
    (tmp_path/'links').mkdir(); (tmp_path/'links'/'train').symlink_to(tmp_path/'näch ste'/'train', True)
    (tmp_path/'links'/'val').mkdir()
    for c in ('coast', 'Bay', 'é'): (tmp_path/'links'/'val'/c).symlink_to(tmp_path/'näch ste'/'val'/c, True)
    refresh()
    for n in (name, name + '/', f"folder:{tmp_path/'links'}/"):
        assert data.count(n) == (6, 6, 3) and data.fingerprint(n, 32) == data.fingerprint(name, 32), n
    (tmp_path/'näch ste'/'val'/'coast'/'1.ppm').write_bytes(b'')
    refresh()
    with pytest.raises(InputError, match="coast/1.ppm' is not an image that can be read"): data.load(name, 'val', 28)
    (tmp_path/'none'/'train').mkdir(parents=True); (tmp_path/'none'/'val').mkdir()
    for call, says in ((lambda: data.check_data(f"folder:{tmp_path/'none'}"), 'is empty; it needs one folder'),
            (lambda: data.check_data(f"folder:{tmp_path/'näch ste'/'train'}"), 'has: give folder:')):
        with pytest.raises(InputError, match=says): call()
    tiny(tmp_path/'näch ste', 'cardigan/0.ppm', 'Cardigan/0.ppm', 'coast/1.ppm')
    assert data.main(['check', name]) == 0 and "'Cardigan' and 'cardigan' are two classes" in capsys.readouterr().out
