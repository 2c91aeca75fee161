# Each target sets up what it needs. It looks for Python 3.11 to 3.14; `make PYTHON=/path/to/python` names one.
CANDIDATES := python3.12 python3.13 python3.14 python3.11 python3 python
PYTHON ?= $(shell for p in $(CANDIDATES); do "$$p" -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))' 2>/dev/null && { echo "$$p"; break; }; done)
NEED_PYTHON = test -n "$(PYTHON)" || { echo "Kestrel needs Python 3.11 to 3.14 with venv; none of $(CANDIDATES) is one. Install it (on Debian and Ubuntu: python3-venv), or run: make PYTHON=/path/to/python"; exit 1; }
CONFIG := configs/quickstart.yaml
VENV := .venv/bin

.PHONY: quickstart test test-fast check schema images readme performance results results-page fuzz lock hashed licences test-floor clean

quickstart: .venv/ready   ## the whole chain on the embedded toy model, on a CPU, offline
	$(VENV)/python preprocess.py --config $(CONFIG) --show 1
	$(VENV)/python train.py --config $(CONFIG)
	$(VENV)/python generate.py --config $(CONFIG)
	$(VENV)/python evaluate.py --config $(CONFIG)

test: .venv/ready-dev browser check   ## every check and every test
	$(VENV)/python -m pytest -n 2 --dist worksteal

test-fast: .venv/ready-dev check   ## the same checks, and the unit tests of kestrel/
	$(VENV)/python -m pytest -n 2 --dist worksteal tests --ignore=tests/chain --ignore=tests/project --ignore=tests/faults --ignore=tests/fuzz

check: .venv/ready-dev   ## formatter, linter, types, which wing imports which, and the licences of all packages
	$(VENV)/ruff format --check .
	$(VENV)/ruff check .
	$(VENV)/mypy kestrel *.py docs benchmarks Images tools
	$(VENV)/lint-imports
	@$(VENV)/python tools/dependencies.py licences | diff -q - docs/licences.md >/dev/null || { echo "docs/licences.md is not that of the installed packages: make licences"; exit 1; }

schema: .venv/ready   ## configs/schema.json, from the settings
	$(VENV)/python -m kestrel.config.settings > configs/schema.json

readme: .venv/ready   ## what README.md quotes, from a run of the quickstart
	$(VENV)/python docs/fill_readme.py

performance: .venv/ready   ## the tables of docs/performance.md and docs/scaling.md, from benchmarks/results
	$(VENV)/python docs/fill_performance.py
	$(VENV)/python docs/fill_scaling.py
	$(VENV)/python docs/fill_hardware.py

# make results DIALOGUES="FILE ..." MODEL=FOLDER [JOBS=8] [MINUTES=60]; what the record holds already is not run again.
results: .venv/ready   ## docs/results.md: a real model with Kestrel and with other recipes, on a GPU
	$(VENV)/python -m pip install --quiet --disable-pip-version-check -r benchmarks/requirements.txt -c requirements.lock.txt
	$(VENV)/python benchmarks/results.py --text $(DIALOGUES) --model $(MODEL) --jobs $(or $(JOBS),8) --minutes $(or $(MINUTES),600)
	$(VENV)/python docs/fill_results.py

results-page: .venv/ready   ## docs/results.md and its picture, from benchmarks/results
	$(VENV)/python docs/fill_results.py

images: .venv/ready-dev browser   ## the README's pictures, from the quickstart's run
	$(VENV)/python Images/make_images.py

# The report and the chat page are tested in a real browser. Where none can be installed, these tests are skipped.
.PHONY: browser
browser:
	@command -v chromium >/dev/null && command -v chromedriver >/dev/null || { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && apt-get update -qq && apt-get install -qqy --no-install-recommends chromium chromium-driver fonts-dejavu-core >/dev/null; } || echo "chromium is missing and only root can install it: the browser tests will be skipped"

.venv/ready: requirements.txt requirements.lock.txt
	@$(NEED_PYTHON)
	"$(PYTHON)" -m venv .venv
	@echo "installing $$(grep -c == requirements.txt) packages and what they need into .venv: $$(sed -n 's/==.*//p' requirements.txt | tr '\n' ' ')"
	$(VENV)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt -c requirements.lock.txt
	@touch $@

.venv/ready-dev: .venv/ready requirements-dev.txt requirements-web.txt
	@echo "installing what the tests need: $$(sed -n 's/==.*//p' requirements-dev.txt | tr '\n' ' ')"
	$(VENV)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt -c requirements.lock.txt
	@touch $@

fuzz: .venv/ready-dev   ## a million damaged inputs to every reader; half an hour on one core
	$(VENV)/python -m pip install --quiet --disable-pip-version-check atheris==3.0.0
	$(VENV)/python tests/fuzz/fuzz.py --share 1000000

lock:   ## requirements.lock.txt and requirements.hashes.txt, from a fresh installation of requirements-dev.txt
	@$(NEED_PYTHON)
	rm -rf .venv-lock
	"$(PYTHON)" -m venv .venv-lock
	.venv-lock/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	.venv-lock/bin/python tools/dependencies.py lock > .venv-lock/lock && mv .venv-lock/lock requirements.lock.txt
	.venv-lock/bin/python -m pip install --quiet --disable-pip-version-check uv==0.13.9
	.venv-lock/bin/uv pip compile requirements.lock.txt --quiet --no-deps --universal --python-version 3.11 --generate-hashes --no-header --no-annotate --no-emit-package torch > .venv-lock/hashes
	{ echo "# The lock with the sha256 of every file of each package, torch apart. Made by \`make lock\`; do not edit."; cat .venv-lock/hashes; } > requirements.hashes.txt
	rm -rf .venv-lock

# torch first, from where its build for this machine is; everything else only if it is the file that was locked.
hashed: requirements.hashes.txt   ## .venv with hashes checked
	@$(NEED_PYTHON)
	"$(PYTHON)" -m venv .venv
	$(VENV)/python -m pip install --quiet --disable-pip-version-check $(shell grep '^torch==' requirements.lock.txt)
	$(VENV)/python -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes -r requirements.hashes.txt
	@touch .venv/ready .venv/ready-dev

licences: .venv/ready-dev   ## docs/licences.md, from the packages in the lock
	$(VENV)/python tools/dependencies.py licences > .venv/licences && mv .venv/licences docs/licences.md

# The tests of what uses the libraries most. FLOOR_TORCH=torch==2.13.0 where the oldest build is not available.
FLOOR_TESTS := prompt data model/test_quantization.py model/test_loss.py generation/test_respond.py training/test_trainer.py chain/test_generate.py
FLOOR_TORCH := $(shell grep '^torch==' requirements-floor.txt)
test-floor:   ## prompt, data, model, training and generation with the versions of requirements-floor.txt
	@$(NEED_PYTHON)
	rm -rf .venv-floor
	"$(PYTHON)" -m venv .venv-floor
	grep -v '^torch==' requirements-floor.txt > .venv-floor/others.txt
	.venv-floor/bin/python -m pip install --quiet --disable-pip-version-check "$(FLOOR_TORCH)" -r .venv-floor/others.txt $(shell grep -E '^(pytest|hypothesis)[a-z-]*==' requirements-dev.txt)
	.venv-floor/bin/python -m pytest $(addprefix tests/,$(FLOOR_TESTS))

clean:   ## removes the environments and the quickstart's run
	rm -rf .venv .venv-lock .venv-floor runs/quickstart
