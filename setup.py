"""What pyproject.toml cannot say: ``data/`` and ``notebooks/`` lie beside the package; a wheel carries them inside it."""

from setuptools import find_packages, setup

FOLDERS = {"kc_lib.data": "data", "kc_lib.notebooks": "notebooks"}

setup(
    packages=[*find_packages(include=["kc_lib*"]), *FOLDERS],
    package_dir=FOLDERS,
    include_package_data=False,  # else setuptools takes every folder of data for a package that was forgotten
    # What the user fetched into data/external is left out.
    package_data={
        "kc_lib": ["py.typed"],
        "kc_lib.data": ["models/**/*", "relations/**/*", "text/**/*"],
        "kc_lib.notebooks": ["*.ipynb"],
    },
)
