# Each target does its own set-up. Python 3.11 or 3.12 is looked for; `make PYTHON=/path/to/python` names one.
CANDIDATES := python3.12 python3.11 python3 python
PYTHON ?= $(shell for p in $(CANDIDATES); do "$$p" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' 2>/dev/null && { echo "$$p"; break; }; done)
CONFIG := configs/quickstart.yaml
VENV := .venv/bin

.PHONY: quickstart test check schema images readme performance fuzz lock licences test-floor clean

quickstart: .venv/ready   ## the whole chain on the embedded toy model, on a CPU, offline
	$(VENV)/python preprocess.py --config $(CONFIG) --show 1
	$(VENV)/python train.py --config $(CONFIG)
	$(VENV)/python generate.py --config $(CONFIG)
	$(VENV)/python evaluate.py --config $(CONFIG)

test: .venv/ready-dev browser check   ## formatter, linter, types, and every test
	$(VENV)/python -m pytest -n 2

check: .venv/ready-dev
	$(VENV)/ruff format --check .
	$(VENV)/ruff check .
	$(VENV)/mypy kestrel *.py docs benchmarks Images tools

schema: .venv/ready   ## configs/schema.json, from the settings
	$(VENV)/python -m kestrel.config.settings > configs/schema.json

readme: .venv/ready   ## what README.md quotes, from a run of the quickstart
	$(VENV)/python docs/fill_readme.py

performance: .venv/ready   ## the tables of docs/performance.md and docs/scaling.md, from benchmarks/results
	$(VENV)/python docs/fill_performance.py
	$(VENV)/python docs/fill_scaling.py

images: .venv/ready-dev browser   ## the README's pictures, of the quickstart run
	$(VENV)/python Images/make_images.py

# Report and chat are tested in a real browser; without it and without root the tests say that they are skipped.
.PHONY: browser
browser:
	@command -v chromium >/dev/null && command -v chromedriver >/dev/null || { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && apt-get update -qq && apt-get install -qqy --no-install-recommends chromium chromium-driver fonts-dejavu-core >/dev/null; } || echo "chromium is not installed and cannot be installed without root: the browser tests will be skipped"

.venv/ready: requirements.txt requirements.lock.txt
	@test -n "$(PYTHON)" || { echo "Kestrel needs Python 3.11 or 3.12 with venv; found none among $(CANDIDATES). Install one (on Debian: python3-venv), or: make PYTHON=/path/to/python"; exit 1; }
	"$(PYTHON)" -m venv .venv
	$(VENV)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt -c requirements.lock.txt
	@touch $@

.venv/ready-dev: .venv/ready requirements-dev.txt requirements-web.txt
	$(VENV)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt -c requirements.lock.txt
	@touch $@

fuzz: .venv/ready-dev   ## a million damaged inputs to every reader; half an hour of one core
	$(VENV)/python -m pip install --quiet --disable-pip-version-check atheris==3.0.0
	$(VENV)/python tests/fuzz/fuzz.py --share 1000000

lock:   ## requirements.lock.txt, from requirements-dev.txt in an environment of its own
	@test -n "$(PYTHON)" || { echo "Python 3.11 or 3.12 is needed"; exit 1; }
	rm -rf .venv-lock
	"$(PYTHON)" -m venv .venv-lock
	.venv-lock/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	.venv-lock/bin/python tools/dependencies.py lock > .venv-lock/lock && mv .venv-lock/lock requirements.lock.txt
	rm -rf .venv-lock

licences: .venv/ready-dev   ## docs/licences.md, from what the lock names
	$(VENV)/python tools/dependencies.py licences > .venv/licences && mv .venv/licences docs/licences.md

# The rooms that lean on the libraries most. FLOOR_TORCH=torch==2.13.0 where no build of the floor can be had.
FLOOR_TESTS := prompt data model/test_quantization.py model/test_loss.py generation/test_respond.py training/test_trainer.py chain/test_generate.py
FLOOR_TORCH := $(shell grep '^torch==' requirements-floor.txt)
test-floor:   ## dataset, prompt, model, training and answers with the oldest versions of requirements-floor.txt
	@test -n "$(PYTHON)" || { echo "Python 3.11 or 3.12 is needed"; exit 1; }
	rm -rf .venv-floor
	"$(PYTHON)" -m venv .venv-floor
	grep -v '^torch==' requirements-floor.txt > .venv-floor/others.txt
	.venv-floor/bin/python -m pip install --quiet --disable-pip-version-check "$(FLOOR_TORCH)" -r .venv-floor/others.txt $(shell grep -E '^(pytest|hypothesis)[a-z-]*==' requirements-dev.txt)
	.venv-floor/bin/python -m pytest $(addprefix tests/,$(FLOOR_TESTS))

clean:   ## removes what the quickstart and the set-up made
	rm -rf .venv .venv-lock .venv-floor runs/quickstart
