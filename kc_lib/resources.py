"""Where the files that come with the library lie: data, notebooks, and the folder that results go to.

A wheel carries ``data`` and ``notebooks`` inside the package. In a checkout, and in an editable installation of one, they
lie beside the package, so that nothing has to be copied. This is the only file that knows.
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

_PACKAGE = Path(str(files("kc_lib")))
# The root of the checkout; None in an installed wheel.
CHECKOUT = None if (_PACKAGE / "data").is_dir() else _PACKAGE.parent
DATA = (CHECKOUT or _PACKAGE) / "data"
NOTEBOOKS = (CHECKOUT or _PACKAGE) / "notebooks"
OUTPUTS = (CHECKOUT or Path.cwd()) / "outputs"
