.PHONY: check test demo docs

check:  ## what the linter says
	ruff check
	ruff format --check

test:  ## the fast tests
	pytest -m "not slow"

demo:  ## train the digits and show how good each width is
	python examples/train_accelerate.py --overwrite_output_dir

docs:  ## serve the site of the documentation
	mkdocs serve --config-file docs/mkdocs.yml
