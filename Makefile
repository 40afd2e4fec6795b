# Two commands on a fresh machine:  make demo  (the main job)  and  make test  (everything that CI runs).
PY    ?= python3.11
VENV  ?= .venv
OUT   ?= reports/demo
BIN   := $(VENV)/bin
STAMP := $(VENV)/.installed
export PATH := $(abspath $(BIN)):$(PATH)
export PYDEVD_DISABLE_FILE_VALIDATION = 1
.PHONY: setup demo test browser lint sync readme wheel
.DELETE_ON_ERROR:

demo: $(STAMP)
	$(BIN)/smsbench demo --out $(OUT)

demo test: export OMP_NUM_THREADS = 1
test: $(STAMP) browser lint sync
	$(BIN)/python -m pytest -q -n 2 --dist worksteal --durations 12 tests/notebooks.py
	$(BIN)/python -m pytest -q -n 2 --dist loadfile tests

setup: $(STAMP)
$(STAMP): settings.ini setup.py constraints.txt
	test -x $(BIN)/python || $(PY) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

# The reports are looked at in a real browser; without one those tests are skipped and say so.
browser:
	@command -v chromium >/dev/null || command -v chromium-browser >/dev/null || \
	 if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium >/dev/null; \
	 else echo 'chromium is not installed: the browser tests will be skipped'; fi

lint: $(STAMP)
	$(BIN)/ruff check .

# The same notebooks give the same package and README; fails when the tree was stale.
sync: $(STAMP)
	$(BIN)/nbdev_clean && $(BIN)/nbdev_clean --fname colab && $(BIN)/nbdev_export && $(MAKE) -s readme
	git diff --exit-code --stat -- nbs colab smsbench README.md README_files

readme: $(STAMP)
	$(BIN)/python -m jupyter nbconvert --log-level WARN --to markdown --output-dir . --output README \
	  --RegexRemovePreprocessor.enabled=True --RegexRemovePreprocessor.patterns="['\s*#\|\s*hide']" nbs/index.ipynb

wheel: $(STAMP)
	$(BIN)/python -m pip wheel -q . --no-deps -w dist
