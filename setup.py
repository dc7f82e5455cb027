"""Requirements from settings.ini, as nbdev reads them, and experiments in the wheel; all else is in pyproject.toml."""
import shutil
from configparser import ConfigParser
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

here = Path(__file__).parent

settings = ConfigParser()
settings.read_string((here/'settings.ini').read_text(encoding='utf-8'))
settings = settings['DEFAULT']


class Build(build_py):
    "The experiments and their manifest become pcl_nb/nbs of the wheel; the repository holds them once, in nbs."
    def run(self):
        super().run()
        if self.editable_mode: return
        to = Path(self.build_lib)/'pcl_nb'/'nbs'
        to.mkdir(parents=True, exist_ok=True)
        for path in (*(here/'nbs').glob('[a-z]*.ipynb'), here/'nbs'/'figures.yaml'):
            if path.name != 'index.ipynb': shutil.copy(path, to)


setup(cmdclass={'build_py': Build}, install_requires=settings['requirements'].split(),
      extras_require={'dev': settings['dev_requirements'].split(), 'bench': settings['bench_requirements'].split(),
                      'cluster': settings['cluster_requirements'].split(),
                      'real': settings['real_requirements'].split(),
                      'trainers': settings['trainers_requirements'].split()})
