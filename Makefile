# make demo      set up .venv; train a small DeepSeek-V3 on this machine; generate from it
# make test      set up .venv; run the test suite (PYTEST_ARGS="tests/model -k rope" for a part)
# make lint      style, types and import direction
# make bench     tokens a second of training and decoding, and their share of this machine's peak
# make setup     only the .venv

.PHONY: setup demo test lint bench

python := .venv/bin/python
dsv3 := $(python) -m dsv3_jax.cli

setup:
	@scripts/setup.sh

demo: setup
	$(python) train.py configs/demo.py
	$(dsv3) generate runs/demo --prompt 'def ' --prompt 'import ' --temperature 0.7

test: setup
	$(python) -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

lint:
	@scripts/setup.sh test,serve,lint
	$(python) -m ruff check
	$(python) -m ruff format --check
	$(python) -m pyright
	.venv/bin/lint-imports

bench: setup
	$(dsv3) bench train --config configs/bench_tiny.py
	$(dsv3) bench decode --config configs/bench_tiny.py
