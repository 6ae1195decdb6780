"""Builds the wheel, installs it into an empty environment, leaves the checkout, and imports every module.

Except those of packages that are extras.
"""

import subprocess
import sys
import tempfile
import venv
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parent.parent
IMPORT_ALL = """
import importlib, pathlib, pkgutil, metamom
assert pathlib.Path(metamom.__file__).is_relative_to({environment!r}), metamom.__file__
of_extras = ("metamom.interop.lightning", "metamom.interop.flower")
names = [m.name for m in pkgutil.walk_packages(metamom.__path__, "metamom.")]
names = [name for name in names if not name.startswith(of_extras) and not name.endswith("__main__")]
for name in names:
    importlib.import_module(name)
assert {{"metamom.tasks.omniglot", "metamom.experiments.compare"}} <= set(names), names
assert (pathlib.Path(metamom.__file__).parent / "py.typed").exists()
from metamom.nets import pretrained, shipped
assert sorted(path.stem for path in shipped.FOLDER.glob("*.json")) == {weights!r}
for name in {weights!r}:
    pretrained(name)
print(f"imported {{len(names)}} modules")
"""


def main() -> None:
    """Raise at the first step that fails."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        pip = ["-m", "pip", "--quiet", "--disable-pip-version-check"]
        subprocess.run([sys.executable, *pip, "wheel", "--no-deps", "-w", folder, str(CHECKOUT)], check=True)
        (wheel,) = place.glob("metamom-*.whl")
        environment = place / "environment"
        venv.create(environment, with_pip=True)
        python = str(environment / "bin" / "python")
        # torch by its pin, which may be a CPU build; the wheel's own range would take the newest
        pins = [
            line for line in (CHECKOUT / "requirements-dev.txt").read_text().splitlines() if line.startswith("torch==")
        ]
        subprocess.run([python, *pip, "install", *pins, str(wheel)], check=True, cwd=place)
        weights = sorted(path.stem for path in (CHECKOUT / "metamom" / "nets" / "weights").glob("*.json"))
        program = IMPORT_ALL.format(environment=str(environment), weights=weights)
        subprocess.run([python, "-c", program], check=True, cwd=place)
        subprocess.run([str(environment / "bin" / "metamom"), "--version"], check=True, cwd=place)


if __name__ == "__main__":
    main()
