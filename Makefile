# `make run` and `make test` need Python 3.11 or 3.12 with venv, and nothing else.
#   make run PARTICIPANTS=6 MALICIOUS=2
#   make run CONFIG=published ENVOY="data.source=image_folder data.folder=$HOME/cifar10 attack.first_round=1"
# (Detroit attacks from round 6 on, which the five published rounds would not see. Values must not hold blanks.)

PYTHON       ?= $(or $(shell for p in python3.11 python3.12; do $$p --version >/dev/null 2>&1 && echo $$p && break; done),python3)
PARTICIPANTS ?=
MALICIOUS    ?=
CONFIG       ?= demo
SET          ?=
ENVOY        ?=
RESULTS      ?= results
RESUME       ?=
ROUNDS       ?= 50
SEED         ?= 1

BIN        := .venv/bin
INSTALL    := $(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check
FEDERATION := $(BIN)/python local/federation.py $(if $(PARTICIPANTS),--participants $(PARTICIPANTS)) \
              $(if $(MALICIOUS),--malicious $(MALICIOUS)) $(foreach change,$(ENVOY),--set $(change))
NOTEBOOK   := $(BIN)/python experimenter/run.py --config $(CONFIG) --results $(RESULTS) $(if $(RESUME),--resume $(RESUME)) $(foreach change,$(SET),--set $(change))

# Tests that do not wait for each other's processes, on two cores.
PARALLEL := OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal --durations=15

# Of the faults CI tries one of each kind; `make faults` tries all, and links that are cut; `make soak` many at random.
SHORT := -k "not same_model and not many_points and not hangs and not make_run and not other_settings \
         and not restarted_while and not goes_on_without and not is_missed"

# PYTHON makes a .venv; one that is there may be another's.
ifeq ($(origin PYTHON)$(MAKELEVEL),command line0)
  FOUND := $(if $(wildcard .venv/ready),$(shell $(BIN)/python --version 2>/dev/null))
  ifneq ($(FOUND),$(if $(FOUND),$(shell $(PYTHON) --version 2>/dev/null)))
    $(info PYTHON=$(PYTHON) is not that of .venv ($(FOUND)), which stays: remove .venv for it)
  endif
endif

# Where Python must not write bytecode, each of a hundred processes would compile all that it imports, 8 seconds long.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: run notebook export test test-alone test-federation check faults-short faults-few soak-few \
        faults soak lint clean

# With which a run that was stopped goes on, its name is put behind: all that was chosen, here or in the environment.
CHOICES := PARTICIPANTS MALICIOUS CONFIG SET ENVOY RESULTS
chosen   = $(if $(filter-out file,$(origin $1)),$1='$($1)')
run: export CROWDGUARD_AGAIN := $(strip make run $(foreach name,$(CHOICES),$(call chosen,$(name))) RESUME=)

# What else stands on the command line would be ignored.
given   = $(if $(filter command,$(firstword $(origin $1))),$1)
STRANGE = $(filter-out $(CHOICES) RESUME PYTHON,$(foreach name,$(.VARIABLES),$(call given,$(name))))
run: .venv/ready
	$(if $(STRANGE),$(error make run knows no $(firstword $(STRANGE)), only $(CHOICES) RESUME PYTHON))
	$(NOTEBOOK) --check
	$(FEDERATION) -- $(NOTEBOOK)

# The notebook with the outputs of one run of the demo, and the figure of the README.
notebook: .venv/ready
	$(FEDERATION) -- $(NOTEBOOK)
	$(BIN)/python experimenter/outputs.py $(RESULTS)/FederatedCrowdGuard.ipynb
	cp $(RESULTS)/accuracy.png docs/figures/

export: .venv/ready
	$(NOTEBOOK) --export

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	cp FederatedCrowdGuard.ipynb clean.ipynb
	$(BIN)/nbdev-clean --fname clean.ipynb
	cmp clean.ipynb FederatedCrowdGuard.ipynb; differ=$$?; rm clean.ipynb; exit $$differ

# The federation waits half of its time, in which the tests that need none go on.
test: lint
	$(MAKE) --jobs 2 test-alone test-federation

test-alone: .venv/ready
	$(PARALLEL)

test-federation: .venv/ready
	$(BIN)/python local/federation.py -- $(BIN)/pytest --nbmake --nbmake-timeout=900 --durations=0 tests/live/test_live.py FederatedCrowdGuard.ipynb
	$(BIN)/pytest tests/live/test_hostile.py

# For daily work: lint and the tests that train nothing.
check: lint
	$(PARALLEL) -m "not slow"

# Faults are timed, so they do not run beside the tests; but most of the time both of these wait.
faults-short: .venv/ready
	$(MAKE) --jobs 2 faults-few soak-few

faults-few: .venv/ready
	$(BIN)/pytest --durations=0 tests/live/test_faults.py $(SHORT)

soak-few: .venv/ready
	SOAK_ROUNDS=8 $(BIN)/pytest tests/live/test_soak.py

faults: .venv/ready
	$(BIN)/pytest tests/live/test_hostile.py tests/live/test_faults.py tests/live/test_links.py

soak: .venv/ready
	SOAK_ROUNDS=$(ROUNDS) SOAK_SEED=$(SEED) SOAK_RESULTS=$(RESULTS)/soak $(BIN)/pytest tests/live/test_soak.py

.venv/ready: requirements.txt envoy/requirements.txt director/requirements.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 11) <= v < (3, 13) else f"$(PYTHON) is Python {v[0]}.{v[1]}: choose another one, as in make run PYTHON=python3.12")'
	$(PYTHON) -m venv $(if $(wildcard .venv/ready),,--clear) .venv
	$(INSTALL) -r requirements.txt
	$(INSTALL) --no-deps -r director/requirements.txt
	touch $@

# What can be made again; results/ and runs/, with which a run can go on, stay.
clean:
	rm -rf .venv .federation .metaflow generated_workspace
