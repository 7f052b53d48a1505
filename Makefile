# Quorate. `make demo` and `make test` do all their set-up themselves; everything else is for daily work.
.DEFAULT_GOAL := help
SHELL := /bin/sh
CARGO ?= $(shell command -v cargo || echo $(HOME)/.cargo/bin/cargo)

.PHONY: help deps tools build guest demo test quick verify sim lab bench clean

help: ## This list
	@awk -F':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

deps: ## Install system packages (as root; prints what it does)
	@scripts/install-packages.sh

tools: deps ## Build cargo-deny into target/tools
	@test -x target/tools/bin/cargo-deny || { echo "tools: building cargo-deny"; \
	  $(CARGO) install --quiet --locked --debug --root target/tools cargo-deny; }

build: deps ## Build the program
	@$(CARGO) build --locked -p quorate-daemon

guest: deps ## Build the lab's guest image
	@scripts/build-guest.sh

demo: build guest ## Three hosts with real guests: migrate, drain, kill, cut, restart; ends with a table
	@target/debug/quorate lab demo

test: ## Install, build and run everything
	@scripts/test.sh

quick: ## Unit tests only
	@$(CARGO) test --quiet --workspace

verify: tools ## Format, house rules, lints, dependencies
	@$(CARGO) xtask verify --no-tests

sim: ## The simulator: 2000 seeds
	@$(CARGO) run --quiet --release -p quorate-sim -- --seeds 2000

lab: build guest ## The end-to-end tests in the lab
	@$(CARGO) test --quiet -p quorate-daemon --test lab -- --test-threads=1

bench: build guest ## Measurements: target/bench/*.json and a table each (wants a quiet machine)
	@QUORATE_BENCH_DIR="$(CURDIR)/target/bench" scripts/bench.sh

clean: ## Remove what was built
	@$(CARGO) clean
