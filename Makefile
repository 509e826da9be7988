.PHONY: check test demo bench wheel

check:
	ruff check
	ruff format --check
	pyright

test:
	pytest -n 2 --dist loadfile

demo:
	python -m fastpo.train configs/demo.yaml

bench:
	pytest bench

wheel:
	pip wheel --no-deps --wheel-dir dist .
