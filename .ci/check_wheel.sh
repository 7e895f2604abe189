#!/usr/bin/env bash
# Usage: .ci/check_wheel.sh PYTHON, where PYTHON has `build` and `mypy`.
# Builds the sdist and, from it, the wheel; installs the wheel alone into a bare environment; then checks that nothing is
# missing from it, that all of it imports with the declared dependencies, that a model loses a concept there, that the
# same holds for the sdist, and that a type checker sees its types.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
root=$PWD
python=$root/${1:?usage: .ci/check_wheel.sh PYTHON}
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

echo "Building"
rm -rf build dist
"$python" -m build --outdir dist . >"$scratch/build.log" 2>&1 || { cat "$scratch/build.log" >&2; exit 1; }
wheel=$(echo "$root"/dist/*.whl)

echo "Installing $(basename "$wheel") into a bare environment"
"$python" -m venv "$scratch/bare"
bare=$scratch/bare/bin/python
"$bare" -m pip install --quiet --disable-pip-version-check -c constraints.txt "$wheel"

cd "$scratch" # away from the checkout, so that only what is installed can be imported
"$bare" -I - "$root" <<'PY'
import importlib
import pkgutil
import sys
import traceback
from importlib.metadata import distributions
from pathlib import Path

import sfumato

root = Path(sys.argv[1])
failed = False

# NVIDIA's libraries come with torch's default Linux wheel; they are torch's choice, not ours.
names = sorted({d.name.lower() for d in distributions() if not d.name.lower().startswith(("nvidia", "cuda", "triton"))})
print(f"{len(names)} packages: {' '.join(names)}")
# torch, diffusers, transformers and accelerate alone bring 49 today; sfumato and pip are the other two.
if len(names) > 52:
    failed = True
    print(f"A plain install may bring at most 52 packages, this one brings {len(names)}.", file=sys.stderr)

installed = Path(sfumato.__file__).parent
for source, target, patterns in (
    (root / "src/sfumato", installed, ["*"]),
    (root / "schedulers", installed / "schedulers", ["*.py"]),
    (root / "pipelines", installed / "pipelines", ["*.py"]),
    (root / "training", installed / "training", ["*.py", "*.yaml"]),
):
    files = (path.relative_to(source) for pattern in patterns for path in source.rglob(pattern) if path.is_file())
    for file in files:
        if "__pycache__" not in file.parts and not (target / file).exists():
            failed = True
            print(f"The wheel lacks {source.relative_to(root) / file}.", file=sys.stderr)

modules = [m.name for m in pkgutil.walk_packages(sfumato.__path__, "sfumato.") if not m.name.endswith("__main__")]
for name in modules:
    try:
        importlib.import_module(name)
    except Exception:
        failed = True
        print(f"import {name} fails:\n{traceback.format_exc()}", file=sys.stderr)
print(f"{len(modules)} modules import: {' '.join(modules)}")
sys.exit(failed)
PY

erase() { # what a new user does first, with the command and the call
    "$scratch/bare/bin/sfumato" --version
    "$bare" -I - <<'PY'
import logging

import sfumato
from sfumato.loading import assets_folder

logging.disable(logging.WARNING)
pipe = sfumato.load("atelier")
pipe.set_progress_bar_config(disable=True)
pipe.scheduler = sfumato.BDIAScheduler.from_config(pipe.scheduler.config)
erased = sfumato.unlearn(pipe, forget="sneaker", method="uce", verify=False)
erased.set_progress_bar_config(disable=True)
call = {"prompt": ["a photo of a red sneaker"] * 8, "num_inference_steps": 10, "guidance_scale": 3.0, "output_type": "pt"}
judge = sfumato.Judge.load(assets_folder() / "judge")
before, after = ([word["garment"] for word in judge.describe(one(**call).images)] for one in (pipe, erased))
print(f"sneakers before: {before.count('sneaker')} of 8, after: {after.count('sneaker')}")
assert before.count("sneaker") >= 6 and after.count("sneaker") <= 1
PY
}

echo "Erasing a concept with the wheel"
erase
echo "Erasing a concept with the sdist"
"$bare" -m pip uninstall --quiet --yes sfumato
"$bare" -m pip install --quiet --disable-pip-version-check --no-deps "$root"/dist/*.tar.gz
erase

echo "Type-checking the package and a consumer"
cat >mypy.ini <<'INI'
[mypy]
ignore_missing_imports = True
[mypy-diffusers.*,transformers.*]
follow_imports = skip
INI
cat >consumer.py <<'PY'
import sfumato
from sfumato import TimeShiftScheduler


def consume(scheduler: TimeShiftScheduler) -> None:
    reveal_type(scheduler.set_timesteps)
    reveal_type(sfumato.load)
    reveal_type(sfumato.unlearn)
PY
"$python" -m mypy --config-file mypy.ini --cache-dir cache --python-executable "$bare" -p sfumato -m consumer >mypy.log ||
    { cat mypy.log >&2; exit 1; }
cat mypy.log
if [ "$(grep -cE 'Revealed type is "(Overload\()?def ' mypy.log)" != 3 ]; then
    echo "A type checker must see the signature of each of these public names, not Any." >&2
    exit 1
fi
