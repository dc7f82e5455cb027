"""What a child of tests/test_fetch.py runs: a module of its own, since children import it anew."""
import os

from pcl_nb import photographs


def fetch_as(environ, origins, name):
    "Fetch a set under an environment, with other checksums."
    os.environ.update(environ)
    photographs.ORIGINS = origins
    photographs.fetch(name, progress=False)
