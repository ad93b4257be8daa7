# make demo: fine-tune a pretrained ViT on real images.   make test: run the tests.
# make bench: ours against other tools, 40 minutes.   All set up .venv first.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.PHONY: demo test bench lint clean

$(STAMP): requirements.txt requirements-dev.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

demo: $(STAMP)
	$(BIN)/python bench/demo.py

test: $(STAMP)
	$(BIN)/python -m pytest

bench: $(STAMP)
	$(BIN)/python bench/compare.py

lint: $(STAMP)
	$(BIN)/ruff check .

clean:
	rm -rf $(VENV) output .pytest_cache .ruff_cache
