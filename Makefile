# make demo    install into .venv, then all three stages on images that draw themselves, and a table of results
# make test    install into .venv, then the tests
# Both take arguments:   make demo ARGS="seed=1 output_dir=runs/demo1"   make test ARGS="-k parity"
# Python other than python3:   make demo PYTHON=python3.12

PYTHON ?= python3
VENV ?= .venv

.PHONY: demo test install
.DELETE_ON_ERROR:

install: $(VENV)/installed

$(VENV)/installed: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --upgrade pip
	$(VENV)/bin/pip install --quiet -r requirements.txt
	touch $@

demo: install
	$(VENV)/bin/python docs/demo.py configs/demo.yaml $(ARGS)

test: install
	$(VENV)/bin/python -m pytest tests $(ARGS)
