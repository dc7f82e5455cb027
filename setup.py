"""Requirements from settings.ini, so that nbdev and pip read the same list; all else is in pyproject.toml."""
from configparser import ConfigParser
from pathlib import Path

from setuptools import setup

settings = ConfigParser()
settings.read_string(Path(__file__).with_name('settings.ini').read_text(encoding='utf-8'))
settings = settings['DEFAULT']

setup(install_requires=settings['requirements'].split(),
      extras_require={'dev': settings['dev_requirements'].split(), 'bench': settings['bench_requirements'].split(),
                      'cluster': settings['cluster_requirements'].split(),
                      'real': settings['real_requirements'].split(),
                      'trainers': settings['trainers_requirements'].split()})
