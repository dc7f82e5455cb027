"""What is committed: the numbers of the README stand in a table, and no file is large."""
import re

import pandas as pd
import pytest

from conftest import ROOT

EMBEDDED = ROOT/'figures'/'embedded'
PAGES = {'# What C9 depends on': 'reference/initialisation.md'}      # of what does not stand in the README
SECTIONS = {'## What came out': ('claims', 'effects', 'null_calibration', 'calibration_runs'), '# What C9 depends on': ('initialisation',)}


def section(text, heading):
    "The text under a heading, to the next one."
    return re.split(r'\n#{2,3} ', text[text.index(heading) + len(heading):], maxsplit=1)[0]


def numbers(text):
    "Numbers with a decimal point, or before a per cent sign: those that were measured."
    return {n.lstrip('+-') for n in re.findall(r'[+-]?\d*\.\d+|[+-]?\d+(?= %)', text)}


def committed(names):
    "Every number of the tables, as it may be printed."
    found = set()
    for name in names:
        for v in pd.read_csv(EMBEDDED/f'{name}.csv').select_dtypes('number').stack().dropna().abs():
            found |= {f'{x:.{d}f}'.lstrip('0') if lead else f'{x:.{d}f}' for x in (v, 100*v) for d in (0, 1, 2, 3) for lead in (True, False)}
    return found


@pytest.mark.parametrize('heading', SECTIONS)
def test_numbers_of_the_readme_are_committed(heading):
    "Each measured number of the results is in a committed table."
    found, there = numbers(section((ROOT/PAGES.get(heading, 'README.md')).read_text(), heading)), committed(SECTIONS[heading])
    assert found and not {n for n in found if n not in there and n.lstrip('0') not in there}


def test_a_number_that_nobody_measured_is_found():
    "The check can fail."
    assert '123.456' not in committed(['claims']) and numbers('grew by +12.3 % [1.0, .944]') == {'12.3', '1.0', '.944'}


def test_committed_results_are_small():
    "No file above 1 MB, 25 MB in all."
    sizes = [p.stat().st_size for p in (ROOT/'figures').rglob('*') if p.is_file()]
    assert max(sizes) <= 10**6 and sum(sizes) < 25*10**6
