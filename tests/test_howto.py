"The pages that add a method, a data set, a claim: followed to the letter in a copy of the repository."
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from conftest import ROOT, code_cells

PAGES = sorted((ROOT/'howto').glob('*.md'))
LEFT_OUT = '.git', '.venv', '__pycache__', '_docs', 'runs', 'results', '.pytest_cache', '.hypothesis', '.mypy_cache'


def steps(page):
    "(language, code, the paragraph before it) of each block."
    return re.findall(r'([^\n]*)\n\n```(\w+)\n(.*?)^```$', page.read_text(), re.M | re.S)


def follow(page, folder):
    "All steps of a page in order, in a copy of the repository; (code, what it printed) of each that runs."
    shutil.copytree(ROOT, folder, ignore=lambda d, names: {*LEFT_OUT} & {*names})
    env = {k: v for k, v in os.environ.items() if not k.startswith('PCL_NB_')}
    env |= dict(PATH=f"{Path(sys.executable).parent}:{env['PATH']}", PYTHONPATH=f"{folder}:{env.get('PYTHONPATH', '')}")
    done = []
    for before, language, code in steps(page):
        notebook = re.search(r'In `(nbs/\S+\.ipynb)`, a new cell at the end:', before)
        if notebook:
            nb = nbformat.read(folder/notebook[1], as_version=4)
            nb.cells.append(nbformat.v4.new_code_cell(code.rstrip()))
            nbformat.write(nb, folder/notebook[1])
            continue
        command = [sys.executable, '-c', code] if language == 'python' else ['bash', '-euc', code]
        ran = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
        assert ran.returncode == 0, f'{code}\n{ran.stdout[-2000:]}{ran.stderr[-3000:]}'
        done.append((code, ran.stdout + ran.stderr))
    return done


@pytest.mark.slow
@pytest.mark.parametrize('page', PAGES, ids=lambda p: p.stem)
def test_page_works_to_the_letter(page, tmp_path):
    "Every step succeeds, and ends with what the page promises."
    done = follow(page, tmp_path/'copy')
    said = '\n'.join(text for _, text in done)
    want = dict(add_a_method=['loss_entropy', 'resnet18 confidence on concept_scenes, top-1', "'undefined': "],
        add_a_data_set=['baseline on folder:my_scenes, top-1', 'baseline on table:my_scenes/table.csv, top-1'],
        add_a_claim=['erf stage3', 'supported', 'C23,'])[page.stem]
    assert [w for w in want if w not in said] == [], said[-3000:]
    if page.stem == 'add_a_data_set':
        top = re.findall(r'top-1 (\S+), top-5 (\S+),', said)
        assert len(top) == 2 and top[0] == top[1]                    # the same images by both names


def test_pages_are_short():
    "Three pages; a block that goes into a notebook obeys its limits."
    assert [p.stem for p in PAGES] == ['add_a_claim', 'add_a_data_set', 'add_a_method']
    for page in PAGES:
        assert len(page.read_text().splitlines()) <= 110
        for _, _, code in steps(page): assert len(code.splitlines()) <= 30 and max(map(len, code.splitlines())) <= 120
        for name in re.findall(r'In `(nbs/\S+)`', page.read_text()): assert code_cells(ROOT/name)
