"""Photographs by name: archives of the same form as the real ones, served on the loopback address."""
import errno
import inspect
import io
import os
import random
import shutil
import tarfile
import threading
import time
import zipfile
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torchvision
from PIL import Image

from conftest import NBS, check, contents, processes
from fetching import fetch_as
from pcl_nb import data, photographs, reproduce, runs, sources, training
from pcl_nb.base import core, fetch

WNIDS = {'n03394916': 'French_horn', 'n03888257': 'parachute'}


class Server(SimpleHTTPRequestHandler):
    "Serves a folder, with ranges as real servers do; `rate` bytes a second."
    ranges, rate = True, None
    asked = []              # file, first byte that was sent

    def log_message(self, *args): pass

    def do_GET(self):
        try: f = open(self.translate_path(self.path), 'rb')
        except OSError: self.send_error(404); return
        with f:
            body = f.read()
            tag, asked = f'"{hash(body)}"', self.headers.get('Range')
            start = int(asked[6:-1]) if self.ranges and asked and self.headers.get('If-Range') == tag else 0
            if start and start >= len(body):
                self.send_response(416)
                for name, value in {'Content-Range': f'bytes */{len(body)}', 'Content-Length': 0}.items(): self.send_header(name, value)
                return self.end_headers()
            self.asked.append((self.path.rpartition('/')[2], start))
            self.send_response(206 if start else 200)
            self.send_header('Content-Length', len(body) - start)
            if self.ranges: self.send_header('ETag', tag)
            if start: self.send_header('Content-Range', f'bytes {start}-{len(body) - 1}/{len(body)}')
            self.end_headers()
            try: self.send(memoryview(body)[start:])
            except OSError: pass                                  # the client was killed

    def send(self, body):
        block = self.rate//50 if self.rate else len(body) or 1
        for i in range(0, len(body), block):
            self.wfile.write(body[i:i + block])
            if self.rate: time.sleep(.02)


@pytest.fixture
def mirror(tmp_path, monkeypatch):
    "An empty folder that is served, in place of all publishers; fetched sets go to another."
    served = tmp_path/'served'
    served.mkdir()
    monkeypatch.setattr(Server, 'asked', [])
    with ThreadingHTTPServer(('127.0.0.1', 0), partial(Server, directory=served)) as s:
        threading.Thread(target=s.serve_forever, daemon=True).start()
        monkeypatch.setenv('PCL_NB_DATA_URL', f'http://127.0.0.1:{s.server_port}')
        monkeypatch.setenv('PCL_NB_DATA', str(tmp_path/'data'))
        monkeypatch.setattr(photographs, 'ORIGINS', dict(photographs.ORIGINS))
        sources.forget()
        yield served
        s.shutdown()


def jpeg(i, size=(48, 40)):
    "Bytes of a noisy picture."
    Image.fromarray(np.random.default_rng(i).integers(0, 256, (*size[::-1], 3), np.uint8)).save(out := io.BytesIO(), 'JPEG')
    return out.getvalue()


def tar_of(files, mode='w'):
    "Bytes of a tar archive of name -> content."
    with tarfile.open(fileobj=(out := io.BytesIO()), mode=mode) as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return out.getvalue()


def serve(mirror, kind, trusted=True, **files):
    "Serve the files of a set; their checksums are the expected ones."
    (mirror/kind).mkdir(exist_ok=True)
    names = {name.replace('.', '_').replace('-', '_'): name for name in photographs.ORIGINS[kind]}
    for key, content in files.items():
        (mirror/kind/names[key]).write_bytes(content)
        if not trusted: continue
        url, known = photographs.ORIGINS[kind][names[key]]
        sums = {names[key]: (url, known and 'md5:' + fetch.sum_of(mirror/kind/names[key], 'md5'))}
        photographs.ORIGINS[kind] = photographs.ORIGINS[kind] | sums


def imagenette(mirror, n=5, size=(48, 40), extra=(), **kwargs):
    "Serve a set of Imagenette's form."
    files = {f'imagenette2-320/{s}/{w}/{w}_{i}.JPEG': jpeg(i, size) for s in ('train', 'val') for w in WNIDS for i in range(n)}
    files = files | {'imagenette2-320/noisy_imagenette.csv': b'path'} | dict(extra)
    serve(mirror, 'imagenette', imagenette2_320_tgz=tar_of(files, 'w:gz'), **kwargs)


def places(mirror, n=20):
    "Serve a set of the form of Places365's validation images."
    lists = {'categories_places365.txt': b'/a/abbey 0\n/b/bakery/shop 1\n',
        'places365_val.txt': ''.join(f'Places365_val_{i:08}.jpg {i % 2}\n' for i in range(n)).encode()}
    serve(mirror, 'places365-val', filelist_places365_standard_tar=tar_of(lists),
        val_256_tar=tar_of({f'val_256/Places365_val_{i:08}.jpg': jpeg(i) for i in range(n)}))


def caltech(mirror):
    "Serve a set of Caltech-101's form: a zip archive that holds a tar archive."
    names = [f'101_ObjectCategories/{c}/image_{i:04}.jpg' for c in ('Leopards', 'ewer', 'BACKGROUND_Google') for i in range(1, 11)]
    with zipfile.ZipFile(out := io.BytesIO(), 'w') as z:
        z.writestr('caltech-101/101_ObjectCategories.tar.gz', tar_of({n: jpeg(i) for i, n in enumerate(names)}, 'w:gz'))
        z.writestr('__MACOSX/caltech-101/._101_ObjectCategories.tar.gz', b'left by a tool')
        z.writestr('caltech-101/Annotations.tar', b'not read')
    serve(mirror, 'caltech101', caltech_101_zip=out.getvalue())


def miniplaces(mirror, shade=0):
    "Serve a set of the form of MiniPlaces, for which no checksum is known."
    files = {f'images/train/c/coast/{i:08}.jpg': jpeg(i + shade) for i in range(6)}
    files |= {f'images/train/b/bakery/shop/{i:08}.jpg': jpeg(i) for i in range(6)}
    files |= {f'images/{s}/{i:08}.jpg': jpeg(i + 50) for s in ('val', 'test') for i in range(4)}
    serve(mirror, 'miniplaces', data_tar_gz=tar_of(files, 'w:gz'), categories_txt=b'/c/coast 0\n/b/bakery/shop 1\n',
        val_txt=''.join(f'val/{i:08}.jpg {i % 2}\n' for i in range(4)).encode())


def sizes(name): return tuple(len(data.load(name, s, 32)) for s in ('train', 'val'))


def start(name='imagenette'):
    "The process that fetches a set."
    environ = {k: v for k, v in os.environ.items() if k.startswith('PCL_NB_')}
    p = processes.Process(target=fetch_as, args=(environ, photographs.ORIGINS, name))
    p.start()
    return p


# Sets

def test_every_set_is_fetched_and_read_by_name(mirror, tmp_path):
    "Classes and splits of each; the second time nothing is asked for."
    imagenette(mirror); places(mirror); caltech(mirror); miniplaces(mirror)
    for name in photographs.ORIGINS: assert photographs.fetch(name, progress=False) == tmp_path/'data'/name
    asked = len(Server.asked)
    found = {name: (*sizes(name), data.load(name, 'val', 32).classes) for name in photographs.ORIGINS}
    assert found == {'imagenette': (10, 10, ('French_horn', 'parachute')), 'places365-val': (16, 4, ('abbey', 'bakery-shop')),
        'caltech101': (16, 4, ('Leopards', 'ewer')), 'miniplaces': (12, 4, ('bakery-shop', 'coast'))}
    for name in photographs.ORIGINS: photographs.fetch(name, progress=False)
    assert len(Server.asked) == asked
    assert not [p for p in (tmp_path/'data').rglob('.*')]


def test_fetched_images_are_the_archives_bytes(mirror, tmp_path):
    "No image is decoded and written again."
    imagenette(mirror)
    home = photographs.fetch('imagenette', progress=False)
    assert {p: b for p, b in contents(home).items() if p != 'origin.json'} == {
        f'{s}/{c}/{w}_{i}.JPEG': jpeg(i) for s in ('train', 'val') for w, c in WNIDS.items() for i in range(5)}


def test_a_set_without_a_published_checksum_is_recorded(mirror, tmp_path, capsys):
    "Another file is refused from then on; files that were never read to their end are not recorded."
    serve(mirror, 'miniplaces', data_tar_gz=b'not an archive', categories_txt=b'/c/coast 0\n', val_txt=b'val/1.jpg 0\n')
    with pytest.raises(core.InputError, match='not a complete archive'): photographs.fetch('miniplaces', progress=False)
    archives = tmp_path/'data'/'archives'/'miniplaces'
    assert not (archives/'SHA256SUMS').exists()
    shutil.rmtree(archives)
    miniplaces(mirror)
    home = photographs.fetch('miniplaces', progress=False)
    assert capsys.readouterr().out.count('no checksum is published') == len((archives/'SHA256SUMS').read_text().splitlines()) == 3
    shutil.rmtree(home)
    (archives/'data.tar.gz').unlink()
    miniplaces(mirror, shade=9)
    with pytest.raises(core.InputError, match='it was not kept'): photographs.fetch('miniplaces', progress=False)
    assert not (archives/'data.tar.gz').exists() and not home.exists()


@pytest.mark.parametrize('kind, base', photographs.PICKED.items())
def test_photographs_behind_the_figures_are_made_again(mirror, tmp_path, monkeypatch, kind, base):
    "From the published archives by the manifest; an image that differs is refused, or reported where Pillow writes it."
    caltech(mirror); miniplaces(mirror)
    home = photographs.fetch(base, progress=False)
    if base == 'miniplaces': made = {f: (home/f).read_bytes() for f in ('train/coast/00000001.jpg', 'val/coast/00000000.jpg')}
    else:
        Image.open(home/'train'/'Leopards'/'image_0001.jpg').convert('RGB').resize((128, 128), Image.Resampling.BICUBIC).save(
            out := io.BytesIO(), 'JPEG', quality=90)
        made = {'val/leopards/image_0001.jpg': out.getvalue()}
    for f, b in made.items(): core.write_atomic(tmp_path/'made'/f, b)
    listed = {f: fetch.sum_of(tmp_path/'made'/f) for f in made}
    monkeypatch.setattr(photographs, 'read_manifest', lambda name: listed)
    assert contents(photographs.fetch(kind, progress=False)).items() >= made.items()
    listed = dict.fromkeys(listed, '0'*64)
    other = f'{kind}:{tmp_path}/data/other'
    if base == 'miniplaces':
        with pytest.raises(core.InputError, match='differ from the manifest'): photographs.fetch(other, progress=False)
    else: photographs.fetch(other, progress=False)


# Interruptions

def test_kills_at_random_moments_lose_nothing(mirror, tmp_path, monkeypatch):
    "SIGKILL again and again: the set is absent or complete, the download goes on, the bytes are those of an undisturbed fetch."
    imagenette(mirror, n=60, size=(160, 120))
    whole = contents(photographs.fetch(f'imagenette:{tmp_path}/undisturbed/set', progress=False))
    size = (mirror/'imagenette'/'imagenette2-320.tgz').stat().st_size
    monkeypatch.setattr(Server, 'rate', size)                     # the whole file takes a second
    monkeypatch.setattr(Server, 'asked', [])
    home, rng, kills = tmp_path/'data'/'imagenette', random.Random(0), 0
    for _ in range(50):
        asked, p = len(Server.asked), start()
        while p.is_alive() and len(Server.asked) == asked: p.join(.01)
        p.join(rng.uniform(0, .6))
        if p.is_alive(): p.kill(); kills += 1
        p.join()
        if home.exists(): break
        with pytest.raises(core.InputError, match='fetch it: python -m pcl_nb.data fetch imagenette'): data.check_data('imagenette')
    assert contents(home) == whole and kills >= 2, kills
    firsts = [first for _, first in Server.asked]
    assert firsts == sorted(firsts) and 0 < firsts[-1] < size, 'each attempt begins where the one before ended'
    photographs.fetch('imagenette', progress=False)
    sources.forget()
    assert sizes('imagenette') == (120, 120)


@pytest.mark.parametrize('images', [1, 100, 239])
def test_a_kill_while_unpacking_counts_for_nothing(mirror, tmp_path, images):
    "What is unpacked so far is no set; the next attempt asks for nothing and gives the same bytes."
    imagenette(mirror, n=60, size=(160, 120))
    whole = contents(photographs.fetch(f'imagenette:{tmp_path}/undisturbed/set', progress=False))
    p = start()
    unfinished, deadline = tmp_path/'data'/'.imagenette.unfinished', time.monotonic() + 60
    while p.is_alive() and time.monotonic() < deadline and len(list(unfinished.rglob('*.JPEG'))) < images: pass
    p.kill()                                                      # SIGKILL; nothing if it has just ended
    p.join()
    home, asked = tmp_path/'data'/'imagenette', len(Server.asked)
    if not home.exists():
        with pytest.raises(core.InputError, match='fetch it'): data.check_data('imagenette')
    assert contents(photographs.fetch('imagenette', progress=False)) == whole and len(Server.asked) == asked
    assert not unfinished.exists()


def test_processes_that_fetch_the_same_set_share_one_download(mirror, tmp_path):
    "One downloads, the others wait."
    imagenette(mirror)
    found = [start() for _ in range(3)]
    for p in found: p.join(60)
    assert [p.exitcode for p in found] == [0]*3 and len(Server.asked) == 1 and sizes('imagenette') == (10, 10)


@pytest.mark.parametrize('ranges', [True, False])
def test_a_file_that_changes_between_two_attempts_is_not_mixed(mirror, tmp_path, monkeypatch, ranges):
    "With a server that knows no ranges, or another version of the file, the download starts again."
    monkeypatch.setattr(Server, 'ranges', ranges)
    (mirror/'a').write_bytes(old := bytes(10**5))
    url, path = f"{os.environ['PCL_NB_DATA_URL']}/a", tmp_path/'a'
    monkeypatch.setattr(Server, 'send', lambda self, body: self.wfile.write(body[:1000]))
    with pytest.raises(core.InputError, match='ended after 1000 of 100000 bytes'): fetch.download(url, path, False)
    monkeypatch.undo(); monkeypatch.setattr(Server, 'ranges', ranges)
    (mirror/'a').write_bytes(new := bytes([1])*10**5)
    fetch.download(url, path, False)
    assert path.read_bytes() == new != old and Server.asked[-1] == ('a', 0)
    assert not path.with_name('.a.part').exists() and not path.with_name('.a.etag').exists()


@pytest.mark.parametrize('more, sent', [(b'', []), (b'x', [('a', 0)])])
def test_a_kill_after_the_last_byte_costs_no_download(mirror, tmp_path, more, sent):
    "A complete part only gets its name; one that is too long is no part of the file."
    (mirror/'a').write_bytes(body := bytes(1000))
    (tmp_path/'.a.part').write_bytes(body + more)
    (tmp_path/'.a.etag').write_text(f'"{hash(body)}"')
    fetch.download(f"{os.environ['PCL_NB_DATA_URL']}/a", tmp_path/'a', False)
    assert (tmp_path/'a').read_bytes() == body and Server.asked == sent and not list(tmp_path.glob('.a.*'))


# What is refused

def test_a_wrong_checksum_is_refused_and_not_kept(mirror, tmp_path):
    "Over the network nothing stays; a file placed by hand stays for its owner, unused."
    imagenette(mirror, trusted=False)
    with pytest.raises(core.InputError, match='has the MD5 .* and should have 3df6f0d01a2c9592104656642f5e78a3; it was not kept'):
        photographs.fetch('imagenette', progress=False)
    assert contents(tmp_path/'data') == {}
    core.write_atomic(tmp_path/'data'/'archives'/'imagenette'/'imagenette2-320.tgz', b'mine')
    with pytest.raises(core.InputError, match='remove it to fetch it again'): photographs.fetch('imagenette', progress=False)
    assert list(contents(tmp_path/'data')) == ['archives/imagenette/imagenette2-320.tgz']


@pytest.mark.parametrize('bad', ['../pwned.jpg', 'imagenette2-320/../../pwned.jpg', '{tmp}/pwned.jpg',
    'imagenette2-320/train/n03394916/../../../../../pwned.jpg'])
def test_a_member_outside_its_folder_is_refused(mirror, tmp_path, bad):
    "Even of an archive with the expected checksum: nothing is written outside, and there is no set."
    imagenette(mirror, extra={bad.format(tmp=tmp_path): jpeg(1)})
    with pytest.raises(core.InputError, match='is refused: its member .* is outside its folder'):
        photographs.fetch('imagenette', progress=False)
    assert not list(tmp_path.rglob('pwned*')) and list(contents(tmp_path/'data')) == ['archives/imagenette/imagenette2-320.tgz']


def test_links_in_an_archive_are_not_made(mirror, tmp_path):
    "A link that leads out, and a file written through it."
    files = {f'imagenette2-320/{s}/{w}/{i}.JPEG': jpeg(i) for s in ('train', 'val') for w in WNIDS for i in range(2)}
    with tarfile.open(fileobj=(out := io.BytesIO()), mode='w:gz') as tar:
        link = tarfile.TarInfo('imagenette2-320/train/n03394916')
        link.type, link.linkname = tarfile.SYMTYPE, str(tmp_path)
        tar.addfile(link)
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size, info.mode = len(content), 0o6777
            tar.addfile(info, io.BytesIO(content))
    serve(mirror, 'imagenette', imagenette2_320_tgz=out.getvalue())
    home = photographs.fetch('imagenette', progress=False)
    assert not [p for p in home.rglob('*') if p.is_symlink() or p.is_file() and p.stat().st_mode & 0o7111]
    assert not list(tmp_path.glob('*.JPEG')) and sizes('imagenette') == (4, 4)


@pytest.mark.parametrize('given, says', [
    ('imagenete', "unknown data set to fetch 'imagenete' (did you mean 'imagenette'?); valid: places365-val, miniplaces,"),
    ('folder:x', "unknown data set to fetch 'folder'"),
    ('imagenette', 'imagenette/imagenette2-320.tgz cannot be fetched (HTTP Error 404: Not Found); place the file as '),
])
def test_what_cannot_be_fetched_is_one_line(mirror, tmp_path, capsys, given, says):
    "Exit code 2; the line names the nearest name, or the address and where to place the file."
    with pytest.raises(SystemExit) as raised: data.main(['fetch', given, '--quiet'])
    line = capsys.readouterr().err.splitlines()[-1]
    assert raised.value.code == 2 and says in line and contents(tmp_path) == {}
    if given == 'imagenette': assert line.endswith(f'{tmp_path}/data/archives/imagenette/imagenette2-320.tgz')


def test_without_a_network_the_file_can_be_placed_by_hand(mirror, tmp_path, monkeypatch):
    "The place that the message names is the right one."
    imagenette(mirror)
    monkeypatch.setenv('PCL_NB_DATA_URL', 'http://127.0.0.1:9')
    with pytest.raises(core.InputError, match=r'127\.0\.0\.1:9/.* cannot be fetched .*; place the file as ') as raised:
        photographs.fetch('imagenette', progress=False)
    shutil.copy(mirror/'imagenette'/'imagenette2-320.tgz', str(raised.value).rpartition(' as ')[2])
    photographs.fetch('imagenette', progress=False)
    assert sizes('imagenette') == (10, 10)


def test_a_full_disk_leaves_no_set(mirror, tmp_path, monkeypatch):
    "Before the download, during it, and while unpacking: one line; afterwards the same command succeeds."
    imagenette(mirror)
    def full(*args): raise OSError(errno.ENOSPC, 'No space left on device')
    with monkeypatch.context() as m:
        m.setattr(fetch.shutil, 'disk_usage', lambda p: shutil._ntuple_diskusage(100, 90, 10))
        with pytest.raises(core.InputError, match='needs .* MB more, .* has 0 MB free; make room'): photographs.fetch('imagenette', False)
    with monkeypatch.context() as m:
        m.setattr(fetch.os, 'fsync', full)
        with pytest.raises(core.InputError, match='is full; make room and try again'): photographs.fetch('imagenette', False)
    with monkeypatch.context() as m:
        m.setattr(photographs.shutil, 'copyfileobj', full)
        with pytest.raises(core.InputError, match='No space left on device; make room'): photographs.fetch('imagenette', False)
    assert [p for p in contents(tmp_path/'data') if not p.startswith('archives/')] == []
    photographs.fetch('imagenette', False)
    assert sizes('imagenette') == (10, 10)


def test_a_folder_that_holds_other_files_is_not_replaced(mirror, tmp_path):
    "One line names what to do."
    core.write_atomic(tmp_path/'data'/'imagenette'/'mine.txt', b'kept')
    with pytest.raises(core.InputError, match='holds other files; use them as folder:'): photographs.fetch('imagenette', False)
    assert contents(tmp_path/'data') == {'imagenette/mine.txt': b'kept'}


# By name, everywhere

def test_fetched_sets_are_data_of_every_command(mirror, capsys, store):
    "Parameters of a notebook, pcl-reproduce, a network trained on a set, a packed copy; before the fetch, one line."
    given = dict(scenes='places365-val', objects='imagenette')
    line = ['--profile', 'smoke', '--only', 'fig6', '--dry-run', '--scenes', 'places365-val', '--objects', 'imagenette']
    with pytest.raises(core.InputError, match='fetch it: python -m pcl_nb.data fetch places365-val'): check(NBS/'erf.ipynb', **given)
    with pytest.raises(SystemExit): reproduce.main(line)
    assert 'python -m pcl_nb.data fetch' in capsys.readouterr().err.splitlines()[-1]
    places(mirror); imagenette(mirror)
    for name in given.values(): assert data.main(['fetch', name, '--quiet']) == 0
    assert 'train: 16 images, 2 classes\nval: 4 images, 2 classes\n' in capsys.readouterr().out
    checked = check(NBS/'erf.ipynb', **given)
    assert {name: getattr(checked, name) for name in given} == given
    assert reproduce.main(line) == 0
    recipe = runs.recipe_for('smoke', data='imagenette')
    assert training.fit(recipe, progress=False).classes == ('French_horn', 'parachute')
    assert recipe.key == runs.recipe_for('smoke', data=f"imagenette:{os.environ['PCL_NB_DATA']}/imagenette").key
    before = data.load('imagenette', 'val', 32).labels
    data.pack('imagenette', edge=37, progress=False)
    sources.forget()
    assert type(data.load('imagenette', 'val', 32).images).__name__ == 'Packed' and data.load('imagenette', 'val', 32).labels.equal(before)


def test_checksums_are_those_of_torchvision_or_unknown():
    "None is made up: MiniPlaces has none."
    sums = {kind: {known for _, known in files.values()} for kind, files in photographs.ORIGINS.items()}
    assert sums.pop('miniplaces') == {None} and all(s.startswith('md5:') and len(s) == 36 for known in sums.values() for s in known)
    official = torchvision.datasets
    assert photographs.ORIGINS['imagenette'] == {'imagenette2-320.tgz': (official.Imagenette._ARCHIVES['320px'][0],
        'md5:' + official.Imagenette._ARCHIVES['320px'][1])}
    for url, known in photographs.ORIGINS['places365-val'].values():
        assert url.startswith(official.Places365._BASE_URL) and (url.rpartition('/')[2], known[4:]) in {
            official.Places365._DEVKIT_META['standard'], official.Places365._IMAGES_META['val', True]}
    source = inspect.getsource(official.Caltech101.download)
    assert all(url in source and known[4:] in source for url, known in photographs.ORIGINS['caltech101'].values())


def test_the_manifests_are_those_of_image_folders():
    "Each image once, in the same classes in both splits."
    for name in photographs.PICKED:
        listed = photographs.read_manifest(name)
        classes = {s: {p.split('/')[1] for p in listed if p.startswith(f'{s}/')} for s in ('train', 'val')}
        assert classes['train'] == classes['val'] and len(classes['val']) == 20 and len(set(listed.values())) == len(listed)
