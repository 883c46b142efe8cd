"""Everything is in settings.ini; this file hands it to setuptools."""
import sys
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
settings = ConfigParser(delimiters=["="])
settings.read(here / "settings.ini", encoding="utf-8")
config = settings["DEFAULT"]

if sys.version_info < tuple(map(int, config["min_python"].split("."))):  # before pip looks for releases that there are none of
    sys.exit("flatmin_nb needs Python {} or later, and this is {}.{}".format(config["min_python"], *sys.version_info))

setup(
    name=config["lib_name"],
    version=config["version"],
    description=config["description"],
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    url=config["git_url"],
    author=config["author"],
    license="Apache-2.0",
    packages=find_packages(include=["flatmin_nb", "flatmin_nb.*"]),
    install_requires=config["requirements"].split(),
    extras_require={"sweep": config["sweep_requirements"].split(), "dev": (config["dev_requirements"] + " " + config["sweep_requirements"]).split()},
    entry_points={"console_scripts": config["console_scripts"].split()},
    python_requires=f">={config['min_python']}",
    zip_safe=False,
)
