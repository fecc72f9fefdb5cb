"""Packaging: every field comes from settings.ini; the entry notebooks travel inside the package as mbnb/notebooks/."""
import shutil
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

root = Path(__file__).resolve().parent
parser = ConfigParser(delimiters=["="])
parser.read(root / "settings.ini", encoding="utf-8")
cfg = parser["DEFAULT"]


def lines(key): return [line.strip() for line in cfg[key].splitlines() if line.strip()]


def entry_notebooks():
    "Pages carry a number; the notebooks at the top of nbs/ that carry none are the entry pages (the index apart)."
    return sorted(p for p in (root / "nbs").glob("[a-z]*.ipynb") if p.stem != "index")


class BuildWithNotebooks(build_py):
    def run(self):
        super().run()
        if self.editable_mode: return       # a checkout has them in nbs/
        folder = Path(self.build_lib) / "mbnb" / "notebooks"
        folder.mkdir(parents=True, exist_ok=True)
        for page in entry_notebooks(): shutil.copyfile(page, folder / page.name)


extras = {key.removesuffix("_requirements"): lines(key) for key in cfg if key.endswith("_requirements")}
extras["all"] = sorted({req for name, reqs in extras.items() if name not in ("dev", "track") for req in reqs})

setup(
    name=cfg["lib_name"], version=cfg["version"], description=cfg["description"], author=cfg["author"], license=cfg["license"],
    license_files=["LICENSE"], keywords=cfg["keywords"].split(), classifiers=lines("classifiers"),
    long_description=(root / "README.md").read_text(encoding="utf-8"), long_description_content_type="text/markdown",
    python_requires=">=" + cfg["min_python"], install_requires=lines("requirements"), extras_require=extras,
    packages=find_packages(include=["mbnb", "mbnb.*"]), entry_points={"console_scripts": lines("console_scripts")},
    package_data={"mbnb": ["js/*"]}, cmdclass={"build_py": BuildWithNotebooks}, zip_safe=False,
)
