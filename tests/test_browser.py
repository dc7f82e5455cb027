"""The explorer in a real browser: JupyterLab, a live kernel, and somebody who moves the slider."""
import base64
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import nbformat
import pytest
from PIL import Image

from conftest import NBS, ROOT, tagged

playwright = pytest.importorskip('playwright.sync_api', reason='playwright is not installed')
CHROMIUM = shutil.which('chromium') or shutil.which('chromium-browser')
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not CHROMIUM, reason='chromium is not installed')]

TOKEN = 'a-test'
QUIET = {  # no news from outside, no question about the kernel; every cell in the page, also those out of sight
    '@jupyterlab/apputils-extension/notification': {'fetchNews': 'false', 'checkForUpdates': False},
    '@jupyterlab/notebook-extension/tracker': {'windowingMode': 'none', 'autoStartDefaultKernel': True}}


def copied(folder, **given):
    "A copy of the notebook with other parameters: what the browser saves goes there."
    nb = nbformat.read(NBS/'explore.ipynb', as_version=4)
    [cell] = tagged(nb.cells)
    cell.source += ''.join(f'\n{name} = {value!r}' for name, value in given.items())
    nbformat.write(nb, folder/'explore.ipynb')
    return folder/'explore.ipynb'


@pytest.fixture
def lab(tmp_path, store):
    "A JupyterLab of its own that knows nothing of the user's settings: its address."
    for name, settings in QUIET.items():
        path = tmp_path/'settings'/f'{name}.jupyterlab-settings'
        path.parent.mkdir(parents=True, exist_ok=True); path.write_text(json.dumps(settings))
    (tmp_path/'work').mkdir()
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0)); port = s.getsockname()[1]
    own = {n: str(tmp_path/n)
        for n in ('JUPYTER_CONFIG_DIR', 'JUPYTER_DATA_DIR', 'JUPYTER_RUNTIME_DIR', 'JUPYTERLAB_WORKSPACES_DIR', 'IPYTHONDIR')}
    env = dict(os.environ, PYTHONPATH=str(ROOT), JUPYTERLAB_SETTINGS_DIR=str(tmp_path/'settings'), **own)
    with open(tmp_path/'server.log', 'w') as log:
        server = subprocess.Popen([sys.executable, '-m', 'jupyterlab', '--no-browser', '--allow-root', '--ServerApp.ip=127.0.0.1',
            f'--ServerApp.port={port}', '--ServerApp.port_retries=0',
            f'--IdentityProvider.token={TOKEN}', f'--ServerApp.root_dir={tmp_path/"work"}'], cwd=tmp_path, env=env, stdout=log, stderr=log,
            start_new_session=True)
    try:
        for _ in range(240):
            try: urllib.request.urlopen(f'http://127.0.0.1:{port}/api/status?token={TOKEN}', timeout=5).close(); break
            except (urllib.error.URLError, OSError): time.sleep(.25)
            assert server.poll() is None, (tmp_path/'server.log').read_text()[-2000:]
        else: pytest.fail('JupyterLab does not answer')
        yield f'http://127.0.0.1:{port}'
    finally:  # asked first: it takes its kernels with it
        server.send_signal(signal.SIGTERM)
        try: server.wait(15)
        except subprocess.TimeoutExpired: os.killpg(server.pid, signal.SIGKILL); server.wait()


@pytest.fixture
def page(tmp_path):
    "A page of a headless browser, with what it complained about as `page.said`."
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=['--no-sandbox', '--disable-dev-shm-usage', '--disable-gpu'])
        try:
            page = browser.new_page(viewport=dict(width=1440, height=1000))
            page.set_default_timeout(60_000)
            page.said = []
            page.on('pageerror', lambda e: page.said.append(str(e)))
            page.on('console', lambda m: page.said.append(m.text) if m.type == 'error' else None)
            yield page
            shoot(page, tmp_path, 'last')
        finally: browser.close()


def picture(page, name, nth=0):
    "The bytes of a picture in the panel."
    return base64.b64decode(page.locator('.pcl-explore').nth(1).locator(f'img.pcl-{name}').nth(nth).evaluate(
        "async i => { const b = new Uint8Array(await (await fetch(i.src)).arrayBuffer()); return btoa(String.fromCharCode(...b)) }"))


def shoot(page, tmp_path, name):
    "A screenshot, for who wants to look."
    for folder in filter(None, (tmp_path, os.environ.get('PCL_NB_SCREENSHOTS'))):
        Path(folder).mkdir(parents=True, exist_ok=True); page.screenshot(path=Path(folder)/f'{name}.png')


def run_all(page):
    "Run all cells; again, where the notebook was not connected to its kernel yet and dropped the command."
    def prompts(): return ''.join(page.locator('.jp-InputPrompt').all_inner_texts())
    for _ in range(10):
        page.locator('.lm-MenuBar-item', has_text='Run').first.click()
        page.locator('.lm-Menu-item[data-command="runmenu:run-all"]').click()
        page.wait_for_timeout(2000)
        while '*' in prompts(): page.wait_for_timeout(500)
        if '[1]' in prompts(): return
    pytest.fail('the cells do not run')


def until(condition, page, seconds=20):
    "Wait for what the kernel sends."
    for _ in range(int(seconds*10)):
        if condition(): return
        page.wait_for_timeout(100)
    assert condition()


def test_the_slider_moves_the_picture(lab, page, tmp_path):
    "All cells run, the panel comes up, and each control changes what it should and nothing else."
    copied(tmp_path/'work', profile='smoke', workers=1)
    page.goto(f'{lab}/lab/tree/explore.ipynb?token={TOKEN}')
    page.get_by_text('Python 3 (ipykernel) | Idle').wait_for()
    run_all(page)
    real, panel = (page.locator('.pcl-explore').nth(i) for i in (0, 1))
    panel.wait_for()
    page.locator('.jp-OutputArea-output', has_text='s in all').wait_for()
    real.scroll_into_view_if_needed()
    until(lambda: all(real.locator('img').evaluate_all('l => l.map(i => i.naturalWidth > 0)')), page)
    assert real.get_by_text('military uniform').count(), 'a real network on a real photograph'
    shoot(page, tmp_path, 'explore_real')
    panel.scroll_into_view_if_needed()
    assert panel.locator('img.pcl-focus-area').count() == 2, 'baseline and PCL side by side'
    until(lambda: all(panel.locator('img').evaluate_all('l => l.map(i => i.naturalWidth > 0)')), page)
    shoot(page, tmp_path, 'explore')

    def pictures():
        return {(name, nth): picture(page, name, nth) for name in ('CAM', 'focus-area', 'erased', 'impact-map') for nth in (0, 1)}
    was, slider = pictures(), panel.locator('.noUi-handle').first
    slider.focus(); page.keyboard.press('ArrowRight'); page.keyboard.press('ArrowRight')
    until(lambda: all(picture(page, n, 1) != was[n, 1] for n in ('focus-area', 'erased')), page)
    assert float(slider.get_attribute('aria-valuetext')) > .5
    now = pictures()
    assert {name for (name, _), b in now.items() if b != was[name, _]} == {'focus-area', 'erased'}
    shoot(page, tmp_path, 'explore_tau')

    panel.locator('.widget-dropdown', has_text='stage').locator('select').select_option('stage3')
    until(lambda: panel.get_by_text('no linear head at stage3').count() == 1, page)
    shoot(page, tmp_path, 'explore_stage3')
    panel.locator('.widget-dropdown', has_text='stage').locator('select').select_option('stage4')
    panel.locator('.widget-dropdown', has_text='rule').locator('select').select_option('energy')
    panel.locator('input[type=number]').first.fill('7'); page.keyboard.press('Enter')
    until(lambda: picture(page, 'CAM', 0) != now['CAM', 0], page)
    shoot(page, tmp_path, 'explore_image')

    upload = tmp_path/'upload.png'
    Image.new('RGB', (90, 60), 'teal').save(upload)
    now = pictures()
    panel.locator('.widget-dropdown', has_text='images').locator('select').select_option('upload')
    with page.expect_file_chooser() as chooser: panel.locator('button', has_text='Upload').click()
    chooser.value.set_files(upload)
    until(lambda: picture(page, 'CAM', 0) != now['CAM', 0], page)
    shoot(page, tmp_path, 'explore_upload')

    outputs = page.locator('.jp-OutputArea-output')
    assert page.locator('.jp-OutputArea-output[data-mime-type="application/vnd.jupyter.error"]').count() == 0
    assert not [t for t in outputs.all_inner_texts() if 'Traceback' in t or 'Error' in t]
    assert not [m for m in page.said if 'widget' in m.lower() or 'explore' in m.lower()]
