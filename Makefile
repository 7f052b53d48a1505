# Quorate. `make demo` and `make test` do all their set-up themselves; everything else is for daily work.
.DEFAULT_GOAL := help
SHELL := /bin/sh
CARGO ?= $(shell command -v cargo || echo $(HOME)/.cargo/bin/cargo)

.PHONY: help deps tools build guest guest-debian demo test quick verify sim lab san bench install uninstall clean

# `make install` puts files below these; packages set DESTDIR.
DESTDIR ?=
PREFIX ?= /usr
BINARY ?= target/release/quorate
BINDIR = $(DESTDIR)$(PREFIX)/bin
SHARE = $(DESTDIR)$(PREFIX)/share
UNITS = $(DESTDIR)$(PREFIX)/lib/systemd/system
COMPLETIONS = $(SHARE)/bash-completion/completions/quorate $(SHARE)/zsh/site-functions/_quorate \
  $(SHARE)/fish/vendor_completions.d/quorate.fish

help: ## This list
	@awk -F':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

deps: ## Install system packages (as root; prints what it does)
	@scripts/install-packages.sh

tools: deps ## Build cargo-deny into target/tools
	@test -x target/tools/bin/cargo-deny || { echo "tools: building cargo-deny"; \
	  $(CARGO) install --quiet --locked --debug --root target/tools cargo-deny; }

build: deps ## Build the program
	@$(CARGO) build --locked -p quorate-daemon

guest: deps ## Build the lab's guest image
	@scripts/build-guest.sh

guest-debian: deps ## Build the lab's Debian guest (as root; minutes, 300 MB)
	@scripts/build-debian-guest.sh

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

lab: build guest guest-debian ## The end-to-end tests in the lab
	@$(CARGO) test --quiet -p quorate-daemon --test lab -- --test-threads=1

san: deps ## Reservations on a real SAN: a LIO target and two hosts with kernels of their own
	@scripts/build-san-guest.sh
	@QUORATE_SAN=1 $(CARGO) test --quiet -p quorate-san --test san -- --test-threads=1 --nocapture

bench: build guest ## Measurements: target/bench/*.json and a table each (wants a quiet machine)
	@QUORATE_BENCH_DIR="$(CURDIR)/target/bench" scripts/bench.sh

target/release/quorate:
	@$(CARGO) build --locked --release -p quorate-daemon

install: $(BINARY) ## Install the program, its systemd unit, manual pages and completions (PREFIX, DESTDIR)
	@install -D -m 755 $(BINARY) $(BINDIR)/quorate
	@install -d $(UNITS) $(SHARE)/man/man1 $(dir $(COMPLETIONS))
	@sed 's|/usr/bin/quorate|$(PREFIX)/bin/quorate|' dist/quorate.service > $(UNITS)/quorate.service
	@sed 's|/usr/bin/quorate|$(PREFIX)/bin/quorate|' dist/quorate-witness.service > $(UNITS)/quorate-witness.service
	@$(BINDIR)/quorate man --to $(SHARE)/man/man1
	@$(BINDIR)/quorate completion bash > $(SHARE)/bash-completion/completions/quorate
	@$(BINDIR)/quorate completion zsh > $(SHARE)/zsh/site-functions/_quorate
	@$(BINDIR)/quorate completion fish > $(SHARE)/fish/vendor_completions.d/quorate.fish
	@echo "installed below $(DESTDIR)$(PREFIX); next: systemctl daemon-reload, then quorate init or quorate join"

uninstall: ## Remove what `make install` put there; the state in /var/lib/quorate and running guests stay
	@rm -f $(BINDIR)/quorate $(UNITS)/quorate.service $(UNITS)/quorate-witness.service $(SHARE)/man/man1/quorate.1 $(SHARE)/man/man1/quorate-*.1 $(COMPLETIONS)

clean: ## Remove what was built
	@$(CARGO) clean
